//! Whether a PEM file is what the configuration names it for, told before anything is set up with it.

use std::ops::Range;
use std::time::Duration;

use jiff::Timestamp;

use super::facts::holds;
use super::{TlsError, authorities, certificates, pair, private_key};
use crate::config::tls::{Holds, PemFile};

/// An error says what is wrong with the file alone; one of a certificate is not said again of its key.
pub fn look(PemFile { file, holds, .. }: &PemFile) -> Result<(), TlsError> {
    match holds {
        Holds::Chain => certificates(file).map(drop),
        Holds::Authorities => authorities(file).map(drop),
        Holds::KeyOf(certificate) => {
            private_key(file)?;
            match certificates(certificate) {
                Ok(_) => pair(certificate, file).map(drop),
                Err(_) => Ok(()),
            }
        }
    }
}

/// What is to be said of a certificate that weir shows, if it does not hold `now`, since the epoch.
pub fn out_of_date(
    PemFile {
        file, holds: of, ..
    }: &PemFile,
    now: Duration,
) -> Option<String> {
    match of {
        Holds::Chain => not_now(&holds(certificates(file).ok()?.first()?)?, now),
        Holds::Authorities | Holds::KeyOf(_) => None,
    }
}

/// Likewise, of one that holds so.
pub(super) fn not_now(holds: &Range<Duration>, now: Duration) -> Option<String> {
    let day = |at: Duration| {
        let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
    };
    let (verb, at) = match () {
        () if now >= holds.end => ("ended at", holds.end),
        () if now < holds.start => ("begins at", holds.start),
        () => return None,
    };
    Some(format!(
        "the certificate {verb} {}: who is shown it refuses it; put one that holds in its place, or set the clock right",
        day(at)
    ))
}
