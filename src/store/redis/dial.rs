//! The way to a node: TCP, or TLS over it. TLS is set up once for a client: a lane that connects anew, as it does again and
//! again while a node is down, reads no files and parses no certificates.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{Address, OpenError};
use crate::config::redis::Tls;

/// Bytes to a node and back.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Connects; TLS where there is a connector.
pub(super) async fn dial(
    address: &Address,
    tls: Option<&TlsConnector>,
) -> io::Result<Box<dyn Stream>> {
    let stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
    // A small call is sent at once, whether or not the one before it was acknowledged.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        return Ok(Box::new(stream));
    };
    let name = ServerName::try_from(address.host.clone()).map_err(io::Error::other)?;
    Ok(Box::new(tls.connect(name, stream).await?))
}

/// Reads the files of `tls`; the public authorities of the system only where it names none.
pub(super) fn connector(tls: &Tls) -> Result<TlsConnector, OpenError> {
    let unusable = |error: rustls::Error| OpenError::Certificates(error.to_string());
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
    if roots.is_empty() {
        let none = "there is no authority to believe; name one in redis.tls.ca";
        return Err(OpenError::Certificates(none.to_owned()));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots);
    let config = match &tls.certificate {
        Some(ours) => {
            let key = PrivateKeyDer::from_pem_slice(&read(&ours.key)?)
                .map_err(|error| in_file(&ours.key, error))?;
            let chain = certificates(&ours.cert)?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(unusable)?
        }
        None => builder.with_no_client_auth(),
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    let certificates = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| in_file(path, error))?;
    match certificates.is_empty() {
        true => Err(in_file(path, "it holds no certificate")),
        false => Ok(certificates),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, OpenError> {
    std::fs::read(path).map_err(|error| OpenError::File {
        path: path.display().to_string(),
        error,
    })
}

fn in_file(path: &Path, error: impl std::fmt::Display) -> OpenError {
    OpenError::Certificates(format!("{}: {error}", path.display()))
}
