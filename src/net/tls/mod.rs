//! TLS: who is believed, what is shown, and what is known of a connection once both ends agree. Files are read when a
//! configuration or one of them changes, never for a connection.

pub mod client;
mod facts;
mod pem;
mod resumption;
mod secured;
pub mod server;
mod stores;
mod trouble;

use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

pub use facts::{ClientCertificate, ClientFacts};
pub use pem::look;
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
#[derive(Debug, Error)]
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

/// Those of a file.
fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| in_file(path, error))?;
    }
    Ok(roots)
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| in_file(path, error))?;
    match certificates.is_empty() {
        true => Err(in_file(path, "it holds no certificate")),
        false => Ok(certificates),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| in_file(path, error))
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
