//! Descriptors that connections of clients, and of requests to upstreams, leave to what must go on without them: the admin port, Redis and Postgres,
//! the files of the audit, health checks. Must not know who opens what.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// How many are left, where the process may have as many as that; of fewer a part.
const LEFT: u64 = 64;
/// Less than what an alert waits for: at nine tenths an operator is to be told.
const PART: u64 = 16;

/// Whether the process has enough others for a connection to have this one: an error as the kernel's for one too many, where it has not.
pub fn spare(connection: impl AsFd) -> io::Result<()> {
    let number = u64::try_from(connection.as_fd().as_raw_fd()).unwrap_or(0);
    // Asked for each time, since an operator may raise it meanwhile (prlimit(1)).
    match getrlimit(Resource::Nofile).current {
        Some(most) if is_left(number, most) => Err(Errno::MFILE.into()),
        Some(_) | None => Ok(()),
    }
}

/// The kernel gives the lowest number that is free (open(2)), so that below this one all are taken.
fn is_left(number: u64, most: u64) -> bool {
    number >= most - LEFT.min(most / PART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_descriptors_are_left_to_others() {
        for (number, most, expected) in [
            (959, 1_024, false),
            (960, 1_024, true),
            (1_048_511, 1_048_576, false),
            (1_048_512, 1_048_576, true),
            (59, 64, false),
            (60, 64, true),
            (2, 3, false),
            (3, 3, true),
        ] {
            assert_eq!(is_left(number, most), expected, "{number} of {most}");
        }
    }
}
