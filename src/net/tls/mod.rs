//! TLS: who is believed, what is shown, and what is known of a connection once both ends agree. Files are read when a
//! configuration or one of them changes, never for a connection. Must not open connections.

mod believed;
pub mod client;
mod facts;
mod pem;
mod public;
mod resumption;
mod secured;
pub mod server;
mod stores;
mod trouble;

use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, RootCertStore};
use thiserror::Error as ThisError;

use believed::Held;
pub use facts::{ClientCertificate, ClientFacts};
pub use pem::{look, out_of_date};
pub use resumption::with_ends;
pub use secured::Secured;
pub use stores::{Latest, Spoken, StoreTls};
pub use trouble::Trouble;

/// What both ends have agreed to speak (ALPN, RFC 7301).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

/// Why TLS cannot be set up.
#[derive(Debug, ThisError)]
pub enum TlsError {
    #[error("cannot read {path}: {error}")]
    File { path: String, error: io::Error },
    #[error("its certificates cannot be used: {0}")]
    Certificates(String),
    #[error("there is no authority to believe; name one in `ca`")]
    NoAuthority,
}

impl Protocol {
    /// What the other end chose, by its name on the wire.
    pub fn of(name: &[u8]) -> Option<Protocol> {
        match name {
            b"h2" => Some(Protocol::Http2),
            b"http/1.1" | b"http/1.0" => Some(Protocol::Http1),
            _ => None,
        }
    }
}

/// What does the arithmetic, in all of weir.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

/// What a file of authorities holds.
struct Authorities {
    roots: RootCertStore,
    /// The same, as they were read.
    held: Held,
}

fn authorities(path: &Path) -> Result<Authorities, TlsError> {
    let held = certificates(path)?;
    let mut roots = RootCertStore::empty();
    for certificate in &held {
        let added = roots.add(certificate.clone());
        added.map_err(|error| in_file(path, error))?;
    }
    Ok(Authorities {
        roots,
        held: Held(held),
    })
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| in_file(path, in_words(&error)))?;
    match certificates.is_empty() {
        true => Err(in_file(path, none_of("certificate", &bytes))),
        false => Ok(certificates),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    // PKCS#8, and what OpenSSL wrote before (RFC 1421).
    let is_encrypted = [
        &b"BEGIN ENCRYPTED PRIVATE KEY"[..],
        b"Proc-Type: 4,ENCRYPTED",
    ]
    .iter()
    .any(|mark| bytes.windows(mark.len()).any(|part| part == *mark));
    if is_encrypted {
        return Err(in_file(
            path,
            "the key is encrypted, and weir asks for no passphrase: write it in clear, `openssl pkey -in FILE -out NEW`, readable by weir alone",
        ));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        PemError::NoItemsFound => in_file(path, none_of("private key", &bytes)),
        error => in_file(path, in_words(&error)),
    })
}

/// What is wrong with a PEM file; rustls shows lines of it as numbers.
fn in_words(error: &PemError) -> String {
    match error {
        PemError::MissingSectionEnd { .. } => {
            "it is cut off: a BEGIN has no END line behind it".to_owned()
        }
        PemError::IllegalSectionStart { .. } => {
            "a line that begins with ----- is none of PEM's: write it as -----BEGIN CERTIFICATE-----".to_owned()
        }
        error => error.to_string(),
    }
}

/// Says that there is no `kind` in a PEM file of these bytes.
fn none_of(kind: &str, bytes: &[u8]) -> String {
    // A SEQUENCE, with which all of them begin in DER.
    let mend = match bytes.first() {
        Some(0x30) => {
            ": it looks like DER, where PEM is needed (`openssl x509 -inform DER`, or `openssl pkey -inform DER`; of PKCS#12 `openssl pkcs12 -nodes -in FILE`)"
        }
        Some(0xef) => ": it begins with a byte order mark: save it without",
        _ => "",
    };
    format!("it holds no {kind}{mend}")
}

/// A chain and its key.
fn pair(cert: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(cert)?;
    let pair = CertifiedKey::from_der(chain, private_key(key)?, &provider());
    pair.map_err(|error| match error {
        // Which one is in words alone.
        Error::InvalidCertificate(error) if format!("{error:?}").contains("UnsupportedCertVersion") => {
            in_file(cert, "a certificate of X.509 version 1 cannot be used: issue it with extensions, as `openssl x509 -req` does with -copy_extensions or -extfile")
        }
        Error::InvalidCertificate(error) => in_file(cert, Error::InvalidCertificate(error)),
        Error::InconsistentKeys(_) => in_file(
            key,
            format!(
                "the key is not that of {}, of whose certificates the server's own stands first",
                cert.display()
            ),
        ),
        // Of an unknown kind.
        error => in_file(key, error),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| TlsError::File {
        path: path.display().to_string(),
        error,
    })
}

fn in_file(path: &Path, error: impl std::fmt::Display) -> TlsError {
    TlsError::Certificates(format!("{}: {error}", path.display()))
}

fn unusable(error: rustls::Error) -> TlsError {
    TlsError::Certificates(error.to_string())
}
