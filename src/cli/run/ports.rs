//! Where the process listens: at sockets of its own, or at those of the process that it replaces; and what is offered to the one that
//! replaces it.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing::warn;

use super::TakesOver;
use crate::cli::control::AdminPorts;
use crate::cli::take_over::Taken;
use crate::config::Config;
use crate::config::listeners::Address;
use crate::net::listen::{self, Bound};

/// The sockets of the control thread, and where the lanes are to listen.
pub(super) struct Ports {
    pub control: AdminPorts,
    pub lanes: LanePorts,
}

/// Where the lanes are to listen.
pub(super) struct LanePorts {
    /// The address of each listener of the configuration, in its order, and the mode of its file.
    listeners: Vec<(Address, u32)>,
    /// From the process that is to be replaced.
    taken: Taken,
}

impl Ports {
    /// Asks for the sockets of the process that is to be replaced, and binds those of the control thread that it does not have.
    pub(super) async fn open(config: &Config, takes_over: TakesOver) -> anyhow::Result<Ports> {
        let mut taken = match takes_over {
            // By the address that it is offered at.
            TakesOver::Yes => Taken::from(listen::here(config.admin.address)).await?,
            TakesOver::No => Taken::default(),
        };
        if taken.is_some() && config.redis.is_none() && !config.sessions.is_empty() {
            warn!(
                "sessions are in memory, and end with the process that is replaced; with redis they would not"
            );
        }
        let control = AdminPorts::open(config, |address| take_or_bind(&mut taken, address))?;
        let listeners = config.listeners.iter().map(|listener| {
            let address = match &listener.address {
                Address::Tcp(address) => Address::Tcp(listen::here(*address)),
                Address::Unix(path) => Address::Unix(path.clone()),
            };
            (address, listener.socket_mode)
        });
        let listeners = listeners.collect();
        Ok(Ports {
            control,
            lanes: LanePorts { listeners, taken },
        })
    }

    /// All sockets that the process listens on, once more; those of its lanes are given.
    pub(super) fn copies(&self, of_lanes: &[Vec<Bound>]) -> std::io::Result<Vec<OwnedFd>> {
        let AdminPorts { admin, metrics } = &self.control;
        let of_control = [admin].into_iter().chain(metrics);
        let of_control = of_control.map(|socket| socket.as_fd().try_clone_to_owned());
        let of_lanes = of_lanes.iter().flatten();
        let of_lanes = of_lanes.map(|socket| socket.as_fd().try_clone_to_owned());
        of_control.chain(of_lanes).collect()
    }
}

impl LanePorts {
    /// The sockets of each lane, in rows of one for each listener: all that were taken over, since clients wait at each, and new ones
    /// where there are too few. Beside those that were taken over new ones do not listen yet: the old process is to get all connections until
    /// the lanes accept. All lanes share the ports that the first one was given, which matters when the file asks for port 0.
    pub(super) fn bind(&mut self, lanes: usize) -> anyhow::Result<Vec<Vec<Bound>>> {
        let LanePorts { listeners, taken } = self;
        let is_served = taken.is_some();
        for (address, _) in &*listeners {
            if !taken.has(address) {
                is_free(address)?;
            }
        }
        let mut of_lanes: Vec<_> = (0..lanes).map(|_| Vec::<Bound>::new()).collect();
        let mut row = 0;
        while row < lanes || listeners.iter().any(|(address, _)| taken.has(address)) {
            for (index, (address, mode)) in listeners.iter_mut().enumerate() {
                let made = match (taken.listener(address), of_lanes[0].get(index)) {
                    (Some(socket), _) => Ok(socket),
                    (None, Some(first)) => first.again(),
                    (None, None) => Bound::new(address, *mode),
                };
                let made = made.and_then(|socket| match is_served {
                    true => Ok(socket),
                    false => socket.listen().map(|()| socket),
                });
                let socket = made.map_err(|error| cannot_listen(address, error))?;
                *address = socket.address()?;
                of_lanes[row % lanes].push(socket);
            }
            row += 1;
        }
        Ok(of_lanes)
    }

    /// Where the lanes listen, as people are told.
    pub(super) fn addresses(&self) -> String {
        let listeners = self.listeners.iter();
        let addresses = listeners.map(|(address, _)| address.to_string());
        addresses.collect::<Vec<_>>().join(", ")
    }

    /// Has the process that is replaced drain, once all lanes accept. Gives back the lanes where nobody had to wait for them.
    pub(super) async fn serve(
        self,
        mut accepting: Vec<oneshot::Receiver<()>>,
    ) -> anyhow::Result<Vec<oneshot::Receiver<()>>> {
        if self.taken.is_some() {
            // A lane waits for Redis before it accepts: until then the old process is to serve.
            for lane in accepting.drain(..) {
                lane.await.context("a lane cannot accept connections")?;
            }
            for (address, mode) in &self.listeners {
                let set = listen::set_mode(address, *mode);
                let _ = set.inspect_err(|error| warn!(%address, %error, "socket_mode is not set"));
            }
        }
        self.taken.say_serving().await;
        Ok(accepting)
    }
}

pub(in crate::cli) fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = listen::alone(address).and_then(TcpListener::from_std);
    bound.map_err(|error| cannot_listen(&Address::Tcp(address), error))
}

/// With the mend, where the error alone does not say it.
fn cannot_listen(address: &Address, error: io::Error) -> anyhow::Error {
    let mend = match (error.kind(), address) {
        (ErrorKind::AddrInUse, _) => {
            " (end what listens there, `ss -lnp` shows it, or use another address; a weir replaces another where both are started with --take-over and one admin.address)"
        }
        (ErrorKind::PermissionDenied, Address::Tcp(_)) => {
            " (ports below 1024 need root or the capability CAP_NET_BIND_SERVICE)"
        }
        (ErrorKind::PermissionDenied, Address::Unix(_)) => {
            " (weir's user needs to write in its folder)"
        }
        (ErrorKind::AddrNotAvailable, _) => " (no interface of this machine has that address)",
        (ErrorKind::NotFound, Address::Unix(_)) => " (its folder is not there: make it)",
        _ => "",
    };
    anyhow::Error::new(error).context(format!("cannot listen on {address}{mend}"))
}

fn take_or_bind(taken: &mut Taken, address: SocketAddr) -> anyhow::Result<TcpListener> {
    match taken.port(listen::here(address)) {
        Some(listener) => Ok(TcpListener::from_std(listener)?),
        None => bind(address),
    }
}

/// Fails when another process listens there: lanes share their port, and would share it with another weir unnoticed.
fn is_free(address: &Address) -> anyhow::Result<()> {
    match address {
        Address::Tcp(tcp) => listen::alone(*tcp)
            .map(drop)
            .map_err(|error| cannot_listen(address, error)),
        // Told when it is made: there is one for all lanes.
        Address::Unix(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_of_listening_has_its_own_mend() {
        let tcp = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 80)));
        let unix = Address::Unix("/none/weir.sock".into());
        for (address, kind, mend) in [
            (&tcp, ErrorKind::AddrInUse, Some("--take-over")),
            (&unix, ErrorKind::AddrInUse, Some("--take-over")),
            (
                &tcp,
                ErrorKind::PermissionDenied,
                Some("CAP_NET_BIND_SERVICE"),
            ),
            (&unix, ErrorKind::PermissionDenied, Some("its folder")),
            (&tcp, ErrorKind::AddrNotAvailable, Some("no interface")),
            (&unix, ErrorKind::NotFound, Some("its folder is not there")),
            (&tcp, ErrorKind::OutOfMemory, None),
        ] {
            let said = format!("{:#}", cannot_listen(address, kind.into()));
            assert!(
                said.starts_with(&format!("cannot listen on {address}")),
                "{said}"
            );
            for other in [
                "--take-over",
                "CAP_NET_BIND_SERVICE",
                "its folder",
                "no interface",
            ] {
                let is_told = mend.is_some_and(|mend| mend.starts_with(other));
                assert_eq!(said.contains(other), is_told, "{other}: {said}");
            }
        }
    }
}
