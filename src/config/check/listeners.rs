//! Listeners, from the file as written to [`Listener`]s.

use std::num::NonZeroU32;
use std::path::PathBuf;

use ipnet::IpNet;

use super::addresses::Listening;
use super::values::not_empty;
use super::{Checker, SECOND};
use crate::config::Listener;
use crate::config::listeners::{Address, ProxyProtocol};
use crate::config::raw;
use crate::config::tls::{Certificate, ClientAuth, Holds, ListenerTls, PemFile};
use crate::config::units::FileMode;
use crate::config::yaml::{At, Position, told};
use crate::http1::head::HeadLimits;

impl Checker {
    pub(super) fn listeners(
        &mut self,
        short: Option<At<String>>,
        long: Option<At<Vec<At<raw::Listener>>>>,
    ) -> Vec<Listener> {
        let mut listeners = Vec::new();
        if let Some(address) = short {
            let plain = raw::Listener::at(address);
            listeners.push(self.listener("inbound".to_owned(), plain));
        }
        for (index, at) in told(long).unwrap_or_default().into_iter().enumerate() {
            let Some(mut raw) = at.value else { continue };
            let (name, name_at) = raw
                .name
                .take()
                .and_then(At::told)
                .unwrap_or_else(|| (format!("listener-{index}"), at.place.child("name")));
            if listeners.iter().any(|other: &Listener| other.name == name) {
                let message =
                    format!("name \"{name}\" is taken by an earlier listener: use another");
                self.say(&name_at, message);
            }
            listeners.push(self.listener(name, raw));
        }
        if listeners.is_empty() {
            let message = "no listener: add \"listen: 0.0.0.0:8080\"";
            self.say(&Position::top("listen"), message);
        }
        listeners
    }

    fn listener(&mut self, name: String, raw: raw::Listener) -> Listener {
        let place = raw.address.place.clone();
        let address = self.listen_address(raw.address);
        let is_file = matches!(address, Address::Unix(_));
        let mode = raw.socket_mode.and_then(|at| {
            if !is_file {
                let message = "a mode is for the file of a Unix socket: leave it out";
                self.say(&at.place, message);
            }
            at.value
        });
        let transparent = told(raw.transparent).unwrap_or(false);
        if transparent && is_file {
            let message = "connections are redirected to a port, never to a socket: use IP:PORT";
            self.say(&place, message);
        }
        self.listening
            .push(Listening::listener(place, address.clone()));
        let proxy_protocol = told(raw.proxy_protocol).unwrap_or_default();
        let from = raw.proxy_protocol_from;
        let from = from.and_then(|at| self.believed(proxy_protocol, at));
        let tls = raw.tls.and_then(|at| self.listener_tls(at));
        let client_ip = told(raw.client_ip).unwrap_or_default();
        let trusted = self.networks(client_ip.trusted_proxies);
        let prefix = client_ip.ipv6_prefix.and_then(|at| match at.value? {
            bits @ 1..=128 => Some(bits),
            bits => {
                let message = format!("{bits} bits: an IPv6 address has 128, use 1 to 128");
                self.say(&at.place, message);
                None
            }
        });
        let trust_client_cert = client_ip.trust_client_cert.is_some_and(|at| {
            let asked = at.value == Some(true);
            if asked && trusted.is_empty() {
                let message = "no proxy is trusted: name those that check clients' certificates in trusted_proxies, or leave this out";
                self.say(&at.place, message);
            }
            asked
        });
        let limits = told(raw.limits).unwrap_or_default();
        let timeouts = told(raw.timeouts).unwrap_or_default();
        let defaults = HeadLimits::default();
        let max_connections =
            self.count_within(limits.max_connections, 10_000, 1..=u64::from(u32::MAX));
        let has_addresses = !is_file || proxy_protocol != ProxyProtocol::None;
        let per_client = limits.max_connections_per_client;
        let per_client =
            per_client.and_then(|at| self.per_client(at, max_connections, has_addresses));
        let bytes = self.room(limits.max_header_bytes, defaults.max_bytes as u64);
        let number =
            |at: Option<At<NonZeroU32>>, default: u32| told(at).map_or(default, NonZeroU32::get);
        Listener {
            name,
            address,
            socket_mode: mode.map_or(0o660, |FileMode(mode)| mode),
            proxy_protocol,
            proxy_protocol_from: from,
            transparent,
            protocol: told(raw.protocol).unwrap_or_default(),
            tls,
            head_limits: HeadLimits {
                max_bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
                max_fields: self.count_within(
                    limits.max_headers,
                    defaults.max_fields as u64,
                    1..=u64::from(u16::MAX),
                ),
            },
            max_connections,
            max_connections_per_client: per_client,
            max_body: self.room(limits.max_body, 10 << 20),
            max_concurrent_streams: number(limits.max_concurrent_streams, 128),
            max_handshakes: number(limits.max_handshakes, 1000) as usize,
            header_read: self.timeout(timeouts.header_read, 10 * SECOND),
            request_read: self.timeout(timeouts.request_read, 60 * SECOND),
            keep_alive: self.timeout(timeouts.keep_alive, 75 * SECOND),
            max_age: self.timeout(timeouts.max_age, 3600 * SECOND),
            stream_idle: self.timeout(timeouts.stream_idle, 300 * SECOND),
            tls_handshake: self.time_within(timeouts.tls_handshake, 10 * SECOND, 60 * SECOND),
            trusted_proxies: trusted,
            trust_client_cert,
            ipv6_prefix: prefix.unwrap_or(64),
        }
    }

    /// How many connections one client may have open, of as many as there may be.
    fn per_client(&mut self, at: At<u32>, of: usize, has_addresses: bool) -> Option<usize> {
        let (count, place) = at.told()?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count == 0 {
            let message = "0 would let nobody in: use 1 or more, for example 100, or leave this out for no such bound";
            self.say(&place, message);
        } else if !has_addresses {
            let message = "clients of a Unix socket have no addresses: leave this out, or have a load balancer tell theirs (proxy_protocol)";
            self.say(&place, message);
        } else if count > of {
            let message = format!(
                "{count} is over max_connections, {of}, so that it bounds nothing: use a smaller one"
            );
            self.warn(&place, message);
        }
        Some(count)
    }

    /// The networks whose PROXY headers are believed.
    fn believed(&mut self, mode: ProxyProtocol, at: At<Vec<At<String>>>) -> Option<Vec<IpNet>> {
        let networks = at.value?;
        let mistake = match mode {
            ProxyProtocol::None => Some(
                "no header is read without \"proxy_protocol: accept\" or \"require\": add one, or leave this out",
            ),
            ProxyProtocol::Accept | ProxyProtocol::Require if networks.is_empty() => Some(
                "no network: name those of the load balancers, for example 10.0.0.0/8, or leave this out to believe everyone",
            ),
            ProxyProtocol::Accept | ProxyProtocol::Require => None,
        };
        if let Some(mistake) = mistake {
            self.say(&at.place, mistake);
        }
        Some(self.networks(networks))
    }

    fn listen_address(&mut self, at: At<String>) -> Address {
        let file = at
            .value
            .as_deref()
            .and_then(|text| text.strip_prefix("unix:"));
        let Some(file) = file.map(PathBuf::from) else {
            return Address::Tcp(self.address(at));
        };
        if !file.is_absolute() {
            let message = "a socket has an absolute path: use, for example, unix:/run/weir/in.sock";
            self.say(&at.place, message);
        }
        Address::Unix(file)
    }

    fn listener_tls(&mut self, at: At<raw::ListenerTls>) -> Option<ListenerTls> {
        let raw = at.value?;
        let (pairs, pairs_at) = raw.certificates.told()?;
        if pairs.is_empty() {
            let message =
                "no certificate: add one, for example {cert: /tls/tls.crt, key: /tls/tls.key}";
            self.say(&pairs_at, message);
        }
        let mut certificates = Vec::with_capacity(pairs.len());
        for at in pairs {
            certificates.extend(at.value.and_then(|raw| self.certificate(raw)));
        }
        let asked = raw.client_auth.and_then(At::told);
        let ca = raw.client_ca;
        let ca = ca.and_then(|at| self.pem_file(at, Holds::Authorities));
        let client_auth = match (asked, ca) {
            (None, None) => ClientAuth::None,
            (None | Some((raw::ClientAuth::Required, ..)), Some(ca)) => ClientAuth::Required(ca),
            (Some((raw::ClientAuth::Optional, ..)), Some(ca)) => ClientAuth::Optional(ca),
            (Some((raw::ClientAuth::None, ..)), None) => ClientAuth::None,
            (Some((raw::ClientAuth::None, place)), Some(_)) => {
                let message = "no certificate would be asked for, and client_ca says whose are believed: use required or optional, or leave client_ca out";
                self.say(&place, message);
                ClientAuth::None
            }
            (Some((raw::ClientAuth::Required | raw::ClientAuth::Optional, place)), None) => {
                let message = "no authority to believe clients' certificates from: add client_ca, or use none";
                self.say(&place, message);
                ClientAuth::None
            }
        };
        Some(ListenerTls {
            certificates,
            client_auth,
            min_version: told(raw.min_version).unwrap_or_default(),
        })
    }

    pub(super) fn certificate(&mut self, raw: raw::Certificate) -> Option<Certificate> {
        let cert = self.pem_file(raw.cert, Holds::Chain);
        let holds = Holds::KeyOf(cert.clone().unwrap_or_default());
        let key = self.pem_file(raw.key, holds);
        Some(Certificate {
            cert: cert?,
            key: key?,
        })
    }

    pub(super) fn pem_file(&mut self, at: At<String>, holds: Holds) -> Option<PathBuf> {
        let place = at.place.clone();
        let file = self.read(at, |text| not_empty(text).map(PathBuf::from))?;
        self.pem_files.push(PemFile {
            file: file.clone(),
            holds,
            place,
        });
        Some(file)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;

    fn read(listener: &str) -> Result<Listener, String> {
        let text = format!("upstream: http://x:1\nlisteners:\n  - {{{listener}}}\n");
        let config = fixture::read(&text).map_err(|said| said.join("\n"))?;
        Ok(config.listeners[0].clone())
    }

    #[test]
    fn ipv6_clients_are_told_apart_by_1_to_128_bits() {
        let read = |client_ip: &str| {
            let listener = read(&format!("address: 0.0.0.0:1, client_ip: {{{client_ip}}}"));
            listener.map(|listener| listener.ipv6_prefix)
        };
        assert_eq!(read(""), Ok(64));
        assert_eq!(read("ipv6_prefix: 1"), Ok(1));
        assert_eq!(read("ipv6_prefix: 128"), Ok(128));
        for bits in [0, 129] {
            let said = read(&format!("ipv6_prefix: {bits}")).unwrap_err();
            let mend = format!(
                "listeners[0].client_ip.ipv6_prefix: {bits} bits: an IPv6 address has 128, use 1 to 128"
            );
            assert!(said.contains(&mend), "{said}");
        }
    }

    #[test]
    fn clients_show_certificates_as_the_file_says() {
        let pair = "certificates: [{cert: /c, key: /k}]";
        let auth = |rest: &str| {
            let listener = read(&format!("address: 0.0.0.0:1, tls: {{{pair}{rest}}}"));
            listener.map(|listener| listener.tls.unwrap().client_auth)
        };
        let ca = || PathBuf::from("/ca");
        assert_eq!(auth(""), Ok(ClientAuth::None));
        assert_eq!(auth(", client_ca: /ca"), Ok(ClientAuth::Required(ca())));
        let optional = auth(", client_ca: /ca, client_auth: optional");
        assert_eq!(optional, Ok(ClientAuth::Optional(ca())));
        assert_eq!(auth(", client_auth: none"), Ok(ClientAuth::None));
        let off = auth(", client_ca: /ca, client_auth: none").unwrap_err();
        assert!(
            off.contains("listeners[0].tls.client_auth: no certificate would be asked for"),
            "{off}"
        );
        for rest in [", client_auth: required", ", client_auth: optional"] {
            let said = auth(rest).unwrap_err();
            assert!(
                said.contains("listeners[0].tls.client_auth: no authority"),
                "{said}"
            );
        }
    }

    #[test]
    fn a_wrong_listener_says_the_mend() {
        for (listener, part) in [
            (
                "address: 0.0.0.0:1, tls: {certificates: []}",
                "listeners[0].tls.certificates: no certificate: add one",
            ),
            (
                "address: 0.0.0.0:1, tls: {}",
                "\"certificates\" is missing: add it",
            ),
            (
                "address: 0.0.0.0:1, tls: {certificates: [{cert: /c, key: ''}]}",
                "listeners[0].tls.certificates[0].key: an empty one",
            ),
            (
                "address: 0.0.0.0:1, tls: {certificates: [{cert: /c, key: /k}], min_version: '1.1'}",
                "unknown name \"1.1\"",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {tls_handshake: 0s}",
                "listeners[0].timeouts.tls_handshake: 0s is out of bounds",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {header_read: 0s}",
                "listeners[0].timeouts.header_read: 0s is over at once, and stands for no \"never\": use 1ms or more, for example 10s, or 1d where",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {request_read: 0s}",
                "listeners[0].timeouts.request_read: 0s is over",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {keep_alive: 0ms}",
                "listeners[0].timeouts.keep_alive: 0s is over",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {max_age: 0s}",
                "listeners[0].timeouts.max_age: 0s is over at once, and stands for no \"never\": use 1ms or more, for example 1h, or 1d where",
            ),
            (
                "address: 0.0.0.0:1, timeouts: {stream_idle: 0s}",
                "listeners[0].timeouts.stream_idle: 0s is over",
            ),
            (
                "address: 'unix:in.sock'",
                "listeners[0].address: a socket has an absolute path",
            ),
            (
                "address: 'unix:/a', socket_mode: rw",
                "listeners[0].socket_mode: \"rw\" is not a mode of a file",
            ),
            (
                "address: 'unix:/a', socket_mode: 0600",
                "socket_mode: a number stands where a mode in quotes, for example \"660\" is needed",
            ),
            (
                "address: 'unix:/a', socket_mode: 0o660",
                "socket_mode: a number stands where a mode in quotes, for example \"660\" is needed",
            ),
            (
                "address: 'unix:/a', socket_mode: '1777'",
                "is not a mode of a file",
            ),
            (
                "address: 0.0.0.0:1, socket_mode: '600'",
                "listeners[0].socket_mode: a mode is for the file of a Unix socket",
            ),
            (
                "address: 'unix:/a', limits: {max_connections_per_client: 5}",
                "listeners[0].limits.max_connections_per_client: clients of a Unix socket have no addresses",
            ),
            (
                "address: 0.0.0.0:1, limits: {max_connections_per_client: 0}",
                "listeners[0].limits.max_connections_per_client: 0 would let nobody in: use 1 or more, for example 100, or leave",
            ),
            (
                "address: 'unix:/a', transparent: true",
                "listeners[0].address: connections are redirected to a port",
            ),
            (
                "address: 0.0.0.0:1, proxy_protocol_from: [10.0.0.0/8]",
                "listeners[0].proxy_protocol_from: no header is read without",
            ),
            (
                "address: 0.0.0.0:1, proxy_protocol: accept, proxy_protocol_from: []",
                "listeners[0].proxy_protocol_from: no network",
            ),
            (
                "address: 0.0.0.0:1, proxy_protocol: require, proxy_protocol_from: [lb]",
                "listeners[0].proxy_protocol_from[0]: \"lb\"",
            ),
            (
                "address: 0.0.0.0:1, proxy_protocol: always",
                "unknown name \"always\"",
            ),
            (
                "address: 0.0.0.0:1, client_ip: {trust_client_cert: true}",
                "listeners[0].client_ip.trust_client_cert: no proxy is trusted",
            ),
            (
                "address: nowhere",
                "listeners[0].address: \"nowhere\" is not an address",
            ),
        ] {
            let said = read(listener).unwrap_err();
            assert!(said.contains(part), "{listener}: {said}");
        }
    }

    #[test]
    fn clients_have_a_bound_of_their_own_where_the_file_says_so() {
        let read = |keys: &str| read(keys).map(|listener| listener.max_connections_per_client);
        assert_eq!(read("address: 0.0.0.0:1"), Ok(None));
        let bound = "limits: {max_connections_per_client: 5}";
        assert_eq!(read(&format!("address: 0.0.0.0:1, {bound}")), Ok(Some(5)));
        let told = format!("address: 'unix:/a', proxy_protocol: require, {bound}");
        assert_eq!(read(&told), Ok(Some(5)));
        let over = "upstream: http://x:1\nlisteners: [{address: '0.0.0.0:1', limits: {max_connections: 4, max_connections_per_client: 5}}]\n";
        let warned = fixture::warned(over).join("\n");
        assert!(
            warned.contains("listeners[0].limits.max_connections_per_client: 5 is over max_connections, 4, so that"),
            "{warned}"
        );
    }

    #[test]
    fn a_socket_is_for_its_owner_and_group_unless_told() {
        let listener = read("address: 'unix:/a'").unwrap();
        assert_eq!(listener.address, Address::Unix("/a".into()));
        assert_eq!(listener.socket_mode, 0o660);
        assert_eq!(
            read("address: 'unix:/a', socket_mode: '0600'")
                .unwrap()
                .socket_mode,
            0o600
        );
    }
}
