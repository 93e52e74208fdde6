//! Why an endpoint cannot be reached, and when that is news for the log. Must not know what clients are told.

use std::error::Error;
use std::fmt::{self, Display};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::caps::Full;
use crate::net::tls::Trouble;
use crate::telemetry::log::LogRateLimit;

/// Why there is no connection.
#[derive(Debug, Clone, Copy)]
pub enum Unreached {
    Failed(Cause),
    TimedOut(Stage),
    /// There is no TLS with it.
    Insecure(Trouble),
    /// As many are open as may be.
    Full,
}

/// What was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// An address of its name.
    Name,
    Connection,
}

/// What keeps a connection from coming about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Nobody listens there.
    Refused,
    /// Its name gives no address.
    NoAddress,
    /// No way leads to its address.
    NoRoute,
    /// A socket that is not there, or may not be opened; and what there is besides.
    Unavailable,
    /// It was opened, and broke off before it could carry a request.
    BrokenOff,
    /// What is spoken there is not what the file says.
    OtherProtocol,
    /// weir is short of something itself.
    Own,
}

impl Cause {
    fn of(error: &io::Error) -> Cause {
        if let Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS) = Errno::from_io_error(error) {
            return Cause::Own;
        }
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Cause::Refused,
            io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown => Cause::NoRoute,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Cause::BrokenOff,
            // No local port is left, no memory, or no TLS was set up.
            io::ErrorKind::AddrNotAvailable
            | io::ErrorKind::OutOfMemory
            | io::ErrorKind::Unsupported => Cause::Own,
            _ => Cause::Unavailable,
        }
    }
}

impl From<&io::Error> for Unreached {
    fn from(error: &io::Error) -> Unreached {
        let of_name = error.get_ref().is_some_and(|inner| inner.is::<NoAddress>());
        match (Trouble::within(error), error.kind()) {
            (Some(trouble), _) => Unreached::Insecure(trouble),
            (None, io::ErrorKind::TimedOut) if of_name => Unreached::TimedOut(Stage::Name),
            (None, io::ErrorKind::TimedOut) => Unreached::TimedOut(Stage::Connection),
            (None, _) if of_name => Unreached::Failed(Cause::NoAddress),
            (None, _) => Unreached::Failed(Cause::of(error)),
        }
    }
}

impl From<&h2::Error> for Unreached {
    fn from(error: &h2::Error) -> Unreached {
        Unreached::Failed(match error.get_io() {
            Some(error) => Cause::of(error),
            // It has ended the connection properly, before it had begun.
            None if error.reason() == Some(h2::Reason::NO_ERROR) => Cause::BrokenOff,
            None => Cause::OtherProtocol,
        })
    }
}

impl From<Full> for Unreached {
    fn from(Full: Full) -> Unreached {
        Unreached::Full
    }
}

/// What is said of a name that gives no address.
#[derive(Debug)]
struct NoAddress(String);

impl Display for NoAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for NoAddress {}

/// The error of a look-up, so that it can be told from that of a connection.
pub(super) fn no_address(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), NoAddress(error.to_string()))
}

/// The error of what was not there `within` this time.
pub(super) fn too_late(stage: Stage, within: Duration) -> io::Error {
    match stage {
        Stage::Name => {
            let said = NoAddress(format!("no address within {within:?}"));
            io::Error::new(io::ErrorKind::TimedOut, said)
        }
        Stage::Connection => {
            let said = format!("no connection within {within:?}");
            io::Error::new(io::ErrorKind::TimedOut, said)
        }
    }
}

/// Whether an endpoint is in reach, as far as it was told. Shared by all lanes.
#[derive(Debug, Default)]
pub(super) struct Reach {
    out: AtomicBool,
    /// Some come and go with each connection.
    lines: Mutex<LogRateLimit>,
}

impl Reach {
    /// It could not be reached; whether that is to be told.
    pub(super) fn note_lost(&self, now: Duration) -> bool {
        let relaxed = Ordering::Relaxed;
        // One lane tells.
        !self.out.load(relaxed)
            && self.lines.lock().next(now).is_some()
            && !self.out.swap(true, relaxed)
    }

    /// It was reached; whether that is to be told.
    pub(super) fn note_reached(&self) -> bool {
        // Nearly always so already, and then no line of memory changes hands.
        self.out.load(Ordering::Relaxed) && self.out.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_reach_are_told_and_no_more_than_one_in_ten_seconds() {
        let (reach, at) = (Reach::default(), Duration::from_secs);
        assert!(!reach.note_reached());
        assert!(reach.note_lost(at(0)) && !reach.note_lost(at(60)));
        assert!(reach.note_reached() && !reach.note_reached());
        assert!(reach.note_lost(at(61)) && reach.note_reached());
        // One that comes and goes.
        assert!(!reach.note_lost(at(62)) && !reach.note_reached() && !reach.note_lost(at(70)));
        assert!(reach.note_lost(at(71)) && reach.note_reached());
    }

    #[test]
    fn what_went_wrong_is_told_apart() {
        let check = |error: io::Error, expected: &str| {
            let unreached = format!("{:?}", Unreached::from(&error));
            assert_eq!(unreached, expected, "{error}");
        };
        let os = |errno: Errno| io::Error::from(errno);
        check(os(Errno::CONNREFUSED), "Failed(Refused)");
        check(os(Errno::NETUNREACH), "Failed(NoRoute)");
        check(os(Errno::HOSTUNREACH), "Failed(NoRoute)");
        check(os(Errno::NOENT), "Failed(Unavailable)");
        check(os(Errno::ACCESS), "Failed(Unavailable)");
        check(os(Errno::CONNRESET), "Failed(BrokenOff)");
        check(os(Errno::MFILE), "Failed(Own)");
        check(os(Errno::ADDRNOTAVAIL), "Failed(Own)");
        check(os(Errno::TIMEDOUT), "TimedOut(Connection)");
        let second = Duration::from_secs(1);
        check(too_late(Stage::Connection, second), "TimedOut(Connection)");
        check(too_late(Stage::Name, second), "TimedOut(Name)");
        let unknown = no_address(&io::Error::other("no such name"));
        check(unknown, "Failed(NoAddress)");
    }
}
