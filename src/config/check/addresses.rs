//! What the file listens on: no two may be one place.

use std::net::{IpAddr, SocketAddr};

use super::Checker;
use crate::config::listeners::Address;
use crate::config::yaml::Position;

/// An address of the file, and where it stands.
pub(super) struct Listening {
    /// Without a line where the file does not say it: it is a default.
    place: Position,
    address: Address,
    /// Whether it is a listener's, which may stand beside a less specific one, as in nginx: the kernel gives a connection to the most
    /// specific one.
    is_listener: bool,
}

impl Listening {
    pub(super) fn listener(place: Position, address: Address) -> Listening {
        Listening {
            place,
            address,
            is_listener: true,
        }
    }

    /// Of the control thread.
    pub(super) fn port(place: Position, address: SocketAddr) -> Listening {
        Listening {
            place,
            address: Address::Tcp(address),
            is_listener: false,
        }
    }

    fn is_default(&self) -> bool {
        self.place.line == 0
    }

    fn is_in_the_way_of(&self, other: &Listening) -> bool {
        match (&self.address, &other.address) {
            (Address::Tcp(one), Address::Tcp(two)) if self.is_listener && other.is_listener => {
                is_same(*one, *two)
            }
            (Address::Tcp(one), Address::Tcp(two)) => overlap(*one, *two),
            (Address::Unix(one), Address::Unix(two)) => one == two,
            (Address::Tcp(_), Address::Unix(_)) | (Address::Unix(_), Address::Tcp(_)) => false,
        }
    }
}

impl Checker {
    /// Says each address that is taken by an earlier one. Lanes share their ports, so that the kernel would give connections to either
    /// of two listeners at random, with and without TLS.
    pub(super) fn one_place_each(&mut self, all: &[Listening]) {
        for (index, later) in all.iter().enumerate() {
            let earlier = all[..index]
                .iter()
                .find(|earlier| earlier.is_in_the_way_of(later));
            let Some(earlier) = earlier else { continue };
            let (here, there) = match later.is_default() {
                false => (later, earlier),
                true => (earlier, later),
            };
            let at = match there.is_default() {
                false => format!(
                    "at line {}, column {}",
                    there.place.line, there.place.column
                ),
                true => "its default".to_owned(),
            };
            let mend = match here.address {
                Address::Tcp(_) => "use another port",
                Address::Unix(_) => "use another path",
            };
            let message = format!(
                "{} is taken by {} ({}, {at}): {mend}",
                here.address, there.place.path, there.address
            );
            self.say_of_file(&here.place, message);
        }
    }

    /// Warns of endpoints that are listeners of this very file.
    pub(super) fn warn_of_circles(&mut self, all: &[Listening]) {
        for (place, endpoint) in std::mem::take(&mut self.endpoints) {
            let mut listeners = all.iter().filter(|listening| listening.is_listener);
            if let Some(listener) = listeners.find(|listener| is_at(&endpoint, &listener.address)) {
                let message = format!(
                    "{endpoint} is weir's own listener, {}, so that requests would go in a circle: use the app's address",
                    listener.place.path
                );
                self.warn(&place, message);
            }
        }
    }
}

/// Whether connections to `endpoint` come to `listener` in this host.
fn is_at(endpoint: &str, listener: &Address) -> bool {
    match listener {
        Address::Unix(_) => listener.to_string() == endpoint,
        Address::Tcp(listener) => {
            let local = endpoint.replacen("localhost:", "127.0.0.1:", 1);
            local.parse().is_ok_and(|endpoint: SocketAddr| {
                let stays = endpoint.ip().is_loopback() || endpoint.ip().is_unspecified();
                is_same(endpoint, *listener) || (stays && overlap(endpoint, *listener))
            })
        }
    }
}

fn is_same(one: SocketAddr, two: SocketAddr) -> bool {
    let scope = |address: SocketAddr| match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    };
    let canonical =
        |address: SocketAddr| (address.ip().to_canonical(), scope(address), address.port());
    // Each port 0 is another one.
    one.port() != 0 && canonical(one) == canonical(two)
}

/// Whether a connection could be for either. What listens at `[::]` takes IPv4, too.
fn overlap(one: SocketAddr, two: SocketAddr) -> bool {
    let is_all = |ip: IpAddr, of: IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_unspecified() && of.is_ipv4(),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    let (first, second) = (one.ip().to_canonical(), two.ip().to_canonical());
    let any = is_all(first, second) || is_all(second, first);
    is_same(one, two) || (one.port() != 0 && one.port() == two.port() && any)
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;

    fn said(text: &str) -> String {
        let said = fixture::read(&format!("upstream: http://x:1\n{text}"));
        said.err().unwrap_or_default().join("\n")
    }

    #[test]
    fn two_listeners_at_one_address_are_told_with_both_places() {
        let text = "listeners:\n  - address: 127.0.0.1:8080\n  - address: 127.0.0.1:8080\n";
        assert_eq!(
            said(text),
            "line 4, column 14: listeners[1].address: 127.0.0.1:8080 is taken by listeners[0].address (127.0.0.1:8080, at line 3, column 14): use another port"
        );
        let text = "listeners:\n  - address: unix:/a\n  - address: unix:/a\n";
        assert_eq!(
            said(text),
            "line 4, column 14: listeners[1].address: unix:/a is taken by listeners[0].address (unix:/a, at line 3, column 14): use another path"
        );
    }

    #[test]
    fn an_address_is_taken_once() {
        let taken = |listeners: &[&str], more: &str| {
            let addresses = listeners
                .iter()
                .map(|address| format!("  - address: '{address}'\n"));
            let listeners: String = addresses.collect();
            let said = said(&format!("listeners:\n{listeners}{more}\n"));
            assert!(said.is_empty() || said.contains("is taken by"), "{said}");
            !said.is_empty()
        };
        assert!(taken(&["0.0.0.0:1", "0.0.0.0:1"], ""));
        assert!(taken(&["127.0.0.1:1", "[::ffff:127.0.0.1]:1"], ""));
        // The more specific one gets its connections, as in nginx.
        assert!(!taken(&["0.0.0.0:1", "127.0.0.1:1", "[::]:1"], ""));
        assert!(!taken(&["127.0.0.1:0", "127.0.0.1:0"], ""));
        assert!(!taken(&["127.0.0.1:1", "127.0.0.2:1", "unix:/a"], ""));
        // The ports of the control thread are not shared.
        assert!(taken(&["127.0.0.1:9901"], ""));
        assert!(taken(&["0.0.0.0:9901"], ""));
        assert!(taken(&["[::]:9901"], ""));
        assert!(!taken(&["[::1]:9901"], ""));
        assert!(!taken(&["127.0.0.1:9901"], "admin: {address: 127.0.0.1:1}"));
        assert!(taken(&["127.0.0.1:2"], "metrics: {address: 0.0.0.0:2}"));
        let both = "admin: {address: 127.0.0.1:2}\nmetrics: {address: 127.0.0.1:2}";
        assert!(taken(&["127.0.0.1:1"], both));
        let free = "admin: {address: 127.0.0.1:0}\nmetrics: {address: 127.0.0.1:0}";
        assert!(!taken(&["127.0.0.1:1"], free));
        assert!(taken(
            &["127.0.0.1:1"],
            "metrics: {address: 127.0.0.1:9901}"
        ));
    }

    #[test]
    fn an_endpoint_that_is_a_listener_is_warned_of() {
        let warned = |listener: &str, endpoint: &str| {
            let text = format!("listen: '{listener}'\nupstream: '{endpoint}'\n");
            fixture::warned(&text).join("\n")
        };
        assert_eq!(
            warned("0.0.0.0:8080", "http://localhost:8080"),
            "line 2, column 11: upstream: localhost:8080 is weir's own listener, listen, so that requests would go in a circle: use the app's address"
        );
        for (listener, endpoint) in [
            ("127.0.0.1:80", "http://127.0.0.1"),
            ("[::]:1", "http://127.0.0.1:1"),
            ("10.1.2.3:1", "http://10.1.2.3:1"),
            ("unix:/a", "unix:/a"),
        ] {
            assert_ne!(warned(listener, endpoint), "", "{listener} {endpoint}");
        }
        for (listener, endpoint) in [
            ("127.0.0.1:1", "http://127.0.0.1:2"),
            ("0.0.0.0:1", "http://10.1.2.3:1"),
            ("127.0.0.1:0", "http://127.0.0.1:1"),
            ("unix:/a", "unix:/b"),
        ] {
            assert_eq!(warned(listener, endpoint), "", "{listener} {endpoint}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_told_once() {
        let said = said("listeners: [{address: x}, {address: z}]\n");
        assert_eq!(said.lines().count(), 2, "{said}");
    }
}
