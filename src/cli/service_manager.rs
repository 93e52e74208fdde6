//! What the service manager that started weir is told, where it asks to be (sd_notify(3), systemd's `Type=notify`): that weir serves, and
//! that it begins to end. By hand, since sd-notify (0.5) knows no socket in the abstract namespace. Must not know when that is.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tracing::warn;

/// For a manager that does not read.
const WITHIN: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(super) enum State {
    /// Units that are ordered behind weir's may begin.
    Ready,
    Stopping,
}

/// A manager that cannot be told changes nothing of what weir does.
pub(super) fn tell(state: State) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let text = match state {
        State::Ready => "READY=1",
        State::Stopping => "STOPPING=1",
    };
    if let Err(error) = send(text, socket.as_bytes()) {
        warn!(%error, "the service manager cannot be told {text} (NOTIFY_SOCKET)");
    }
}

fn send(text: &str, socket: &[u8]) -> io::Result<()> {
    let address = match socket {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let datagrams = UnixDatagram::unbound()?;
    datagrams.set_write_timeout(Some(WITHIN))?;
    datagrams.send_to_addr(text.as_bytes(), &address).map(drop)
}
