//! Whether a PEM file is what the configuration names it for, told before anything is set up with it.

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
