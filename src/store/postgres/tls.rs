//! TLS to Postgres: whether a configuration needs it, and connections by what its files said last.

use std::convert::Infallible;
use std::sync::Arc;

use deadpool_postgres::tokio_postgres::Socket;
use deadpool_postgres::tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::OpenError;
use crate::config::redis::Tls;
use crate::net::tls::{Latest, Spoken, StoreTls};

/// What servers of these modes need together; `None` where none of them is spoken to by TLS.
pub(super) fn read(
    settings: &Tls,
    modes: impl Iterator<Item = SslMode>,
) -> Result<Option<Arc<StoreTls>>, OpenError> {
    let needs = modes.filter_map(|mode| match mode {
        SslMode::Disable => None,
        SslMode::Require => Some(Spoken::Always),
        _ => Some(Spoken::IfOffered),
    });
    let needs = needs.reduce(|one, other| if one == other { one } else { Spoken::Always });
    let read = |spoken| StoreTls::read("postgres.tls", settings, spoken);
    Ok(needs.map(read).transpose()?)
}

/// Each connection by what is the latest then.
#[derive(Clone)]
pub(super) struct MakeLatest(pub(super) Latest);

impl MakeTlsConnect<Socket> for MakeLatest {
    type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;
    type Error = Infallible;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, Infallible> {
        let mut latest = MakeRustlsConnect::new((*self.0.get()).clone());
        MakeTlsConnect::<Socket>::make_tls_connect(&mut latest, host)
    }
}
