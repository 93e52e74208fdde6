//! Whether a PEM file is what the configuration names it for, told before anything is set up with it.

use rustls::sign::CertifiedKey;

use super::{TlsError, authorities, certificates, in_file, private_key, provider};
use crate::config::tls::{Holds, PemFile};

/// An error says what is wrong with the file alone; one of a certificate is not said again of its key.
pub fn look(PemFile { file, holds, .. }: &PemFile) -> Result<(), TlsError> {
    match holds {
        Holds::Chain => certificates(file).map(drop),
        Holds::Authorities => authorities(file).map(drop),
        Holds::KeyOf(certificate) => {
            let key = private_key(file)?;
            let Ok(chain) = certificates(certificate) else {
                return Ok(());
            };
            let pair = CertifiedKey::from_der(chain, key, &provider());
            pair.map(drop).map_err(|error| in_file(file, error))
        }
    }
}
