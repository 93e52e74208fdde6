//! TLS to the servers that keep state: whom weir believes, and what it shows. Set up once for a client, which then reads no
//! files and parses no certificates however often it connects.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;

use crate::config::redis::Tls;

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

/// Reads the files of `tls`; the public authorities of the system only where it names none.
pub(super) fn client_config(tls: &Tls) -> Result<ClientConfig, TlsError> {
    let roots = roots(tls)?;
    if roots.is_empty() {
        return Err(TlsError::NoAuthority);
    }
    with_roots(tls, roots)
}

/// As [`client_config`], for a server that may do without TLS: without an authority to believe there is no error until one
/// shows a certificate.
pub(super) fn client_config_if_needed(tls: &Tls) -> Result<ClientConfig, TlsError> {
    with_roots(tls, roots(tls)?)
}

fn roots(tls: &Tls) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(unusable)?;
            }
        }
        // Those that cannot be read are left out: the system has more than anyone needs.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    Ok(roots)
}

fn with_roots(tls: &Tls, roots: RootCertStore) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots);
    match &tls.certificate {
        Some(ours) => {
            let key = PrivateKeyDer::from_pem_slice(&read(&ours.key)?)
                .map_err(|error| in_file(&ours.key, error))?;
            let chain = certificates(&ours.cert)?;
            builder.with_client_auth_cert(chain, key).map_err(unusable)
        }
        None => Ok(builder.with_no_client_auth()),
    }
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
