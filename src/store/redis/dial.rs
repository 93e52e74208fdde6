//! The way to a node: TCP, or TLS over it.

use std::io;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::Address;
use crate::net::names;
use crate::net::tls::Latest;

/// Bytes to a node and back.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Connects; by `tls` where there is one.
pub(super) async fn dial(address: &Address, tls: Option<&Latest>) -> io::Result<Box<dyn Stream>> {
    let stream = names::connect(&address.host, address.port).await?;
    // A small call is sent at once, whether or not the one before it was acknowledged.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        return Ok(Box::new(stream));
    };
    let name = ServerName::try_from(address.host.clone()).map_err(io::Error::other)?;
    let tls = TlsConnector::from(tls.get());
    Ok(Box::new(tls.connect(name, stream).await?))
}
