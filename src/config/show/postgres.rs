//! Postgres as the file spells it. An address is masked as a whole: where in it a password stands is for the client to say.

use serde::Serialize;

use super::redis::Tls;
use crate::config::postgres;
use crate::config::units::Span;

/// Still an address, so that what is printed can be read.
const ADDRESS: &str = "postgres://***";

#[derive(Serialize)]
pub(super) struct Postgres<'c> {
    write: &'static str,
    read: Vec<&'static str>,
    pool: Pool,
    migrate: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<Tls<'c>>,
}

#[derive(Serialize)]
struct Pool {
    write: usize,
    read: usize,
    timeout: Span,
}

impl<'c> Postgres<'c> {
    pub(super) fn new(postgres: &'c postgres::Postgres) -> Postgres<'c> {
        Postgres {
            write: ADDRESS,
            read: postgres.read.iter().map(|_| ADDRESS).collect(),
            pool: Pool {
                write: postgres.write_pool,
                read: postgres.read_pool,
                timeout: Span(postgres.timeout),
            },
            migrate: postgres.migrate,
            tls: Tls::new(&postgres.tls),
        }
    }
}
