//! What Postgres, or the way to it, says of why it did not do what it was asked, and what that says of trying again. Never shows a
//! password.

use std::time::Duration;

use thiserror::Error;

const LOCK_NOT_AVAILABLE: &str = "55P03";
/// A sequence has come to its end.
const NO_NUMBER_LEFT: &str = "2200H";
/// What a statement that takes too long ends with.
pub(super) const QUERY_CANCELED: &str = "57014";
/// Classes of SQLSTATEs: data exceptions, broken constraints, and rows beyond what the server can hold.
const OF_THE_DATA: [&str; 3] = ["22", "23", "54"];
/// Classes of SQLSTATEs: connections, transactions, prepared statements that a pooler has left with another connection, who may do what,
/// conflicts of transactions, resources, states of the server and of its tables.
const OF_THE_SERVER: [&str; 11] = [
    "08", "25", "26", "28", "3D", "40", "42", "53", "55", "57", "58",
];

/// Why Postgres did not do what it was asked. Never shows a password.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PostgresError {
    #[error(
        "no connection to postgres ({target}) was free within {within:?}; raise postgres.pool.write or postgres.pool.read"
    )]
    Busy { target: String, within: Duration },
    /// There is no connection, or it was lost: what was asked may have been done all the same.
    #[error("no connection to postgres: {0}")]
    Lost(String),
    #[error("postgres did not answer within {0:?}")]
    Late(Duration),
    #[error("postgres ({0}) cannot be written to: it is a replica, or set to read only")]
    ReadOnly(String),
    #[error(
        "postgres ({0}) commits nothing: it waits for a standby that synchronous_standby_names names and that is away"
    )]
    Alone(String),
    /// What the server said.
    #[error("postgres refused: {message} (SQLSTATE {code})")]
    Refused { code: String, message: String },
    /// What it said of something that batches need beside their rows, so that none of them is to blame.
    #[error(
        "postgres refused a boot or a day's tables, which is no batch's fault: {message} (SQLSTATE {code}); bring the sequence of weir.audit_boots behind its ids (\"Moving\" in docs/audit.md), detach DEFAULT partitions"
    )]
    Beside { code: String, message: String },
    /// What it said of rows of the audit, whatever is in them.
    #[error(
        "postgres takes no rows of the audit at all, which is no batch's fault: {message} (SQLSTATE {code}); take back what was added by hand to weir's tables (a column, a constraint, a trigger)"
    )]
    NoRows { code: String, message: String },
    /// It answered in another shape than it was asked for.
    #[error("postgres answered in another shape than weir's schema promises: {0}")]
    Nonsense(String),
    #[error(
        "weir's schema in postgres is version {found}, this weir needs {needed}; run `weir migrate`"
    )]
    SchemaOld { found: i32, needed: i32 },
    #[error(
        "weir's schema in postgres is version {found}, this weir knows up to {known}; run the weir that brought it there, or a later one"
    )]
    SchemaNew { found: i32, known: i32 },
    #[error("the database's encoding is {0}, weir needs UTF8; create it with ENCODING 'UTF8'")]
    Encoding(String),
}

impl PostgresError {
    /// Whether the server said that it is about the data, so that it will say so again.
    pub(super) fn is_about_data(&self) -> bool {
        self.class()
            .is_some_and(|class| OF_THE_DATA.contains(&class))
    }

    /// The same, met at what a batch needs beside its rows. Of that it has only values, such as its instance's name.
    pub(super) fn beside(self) -> PostgresError {
        match self {
            PostgresError::Refused { code, message }
                if code.starts_with("23") || code.starts_with("54") || code == NO_NUMBER_LEFT =>
            {
                PostgresError::Beside { code, message }
            }
            other => other,
        }
    }

    /// The same, met at a row that no batch has.
    pub(super) fn at_any_row(self) -> PostgresError {
        let is_about_data = self.is_about_data();
        match self {
            PostgresError::Refused { code, message } if is_about_data => {
                PostgresError::NoRows { code, message }
            }
            other => other,
        }
    }

    /// Whether it is about the server, or the way to it, so that no batch is to blame.
    pub fn is_of_the_server(&self) -> bool {
        match self {
            PostgresError::Refused { .. } => {
                !self.is_held()
                    && self
                        .class()
                        .is_some_and(|class| OF_THE_SERVER.contains(&class))
            }
            PostgresError::Nonsense(_) => false,
            PostgresError::Beside { .. }
            | PostgresError::NoRows { .. }
            | PostgresError::Busy { .. }
            | PostgresError::Lost(_)
            | PostgresError::Late(_)
            | PostgresError::ReadOnly(_)
            | PostgresError::Alone(_)
            | PostgresError::SchemaOld { .. }
            | PostgresError::SchemaNew { .. }
            | PostgresError::Encoding(_) => true,
        }
    }

    /// Whether the server refuses what a batch needs beside its rows, so that others may be stored.
    pub fn is_beside(&self) -> bool {
        matches!(self, PostgresError::Beside { .. })
    }

    /// Whether another's transaction holds just this batch.
    pub fn is_held(&self) -> bool {
        self.has_code(LOCK_NOT_AVAILABLE)
    }

    /// Whether less at a time may do.
    pub fn is_slow(&self) -> bool {
        matches!(self, PostgresError::Late(_)) || self.has_code(QUERY_CANCELED)
    }

    /// What a human is to do where neither the server nor this error says so.
    pub fn mend(&self) -> Option<&'static str> {
        if let PostgresError::Lost(said) = self {
            let without = said.contains("does not support TLS");
            let mend = "switch TLS on there, or write sslmode=disable into postgres.write";
            return without.then_some(mend);
        }
        match self.code()? {
            "28000" | "28P01" => {
                Some("mend the user or the password in postgres.write, or pg_hba.conf")
            }
            "3D000" => Some("create the database, or mend its name in postgres.write"),
            "42501" => Some(
                "let the user of postgres.write create schemas there, or give it one: CREATE SCHEMA weir AUTHORIZATION that user; it must own weir's tables",
            ),
            "26000" => Some(
                "have the pooler in front of postgres.write keep a connection for one client (PgBouncer: pool_mode = session)",
            ),
            _ => None,
        }
    }

    /// The class of the SQLSTATE.
    fn class(&self) -> Option<&str> {
        self.code()?.get(..2)
    }

    pub(super) fn has_code(&self, code: &str) -> bool {
        self.code() == Some(code)
    }

    /// The SQLSTATE.
    fn code(&self) -> Option<&str> {
        match self {
            PostgresError::Refused { code, .. } => Some(code),
            PostgresError::Beside { .. }
            | PostgresError::NoRows { .. }
            | PostgresError::Busy { .. }
            | PostgresError::Lost(_)
            | PostgresError::Late(_)
            | PostgresError::ReadOnly(_)
            | PostgresError::Alone(_)
            | PostgresError::Nonsense(_)
            | PostgresError::SchemaOld { .. }
            | PostgresError::SchemaNew { .. }
            | PostgresError::Encoding(_) => None,
        }
    }
}

impl From<tokio_postgres::Error> for PostgresError {
    fn from(error: tokio_postgres::Error) -> PostgresError {
        if let Some(said) = error.as_db_error() {
            return PostgresError::Refused {
                code: said.code().code().to_owned(),
                message: said.message().to_owned(),
            };
        }
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        PostgresError::Lost(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::parse;

    #[test]
    fn a_pooler_s_lost_statement_is_no_batch_s_fault() {
        let refused = |code: &str| PostgresError::Refused {
            code: code.to_owned(),
            message: String::new(),
        };
        assert!(refused("26000").is_of_the_server());
        assert!(!refused("55P03").is_of_the_server());
        assert!(!refused("22021").is_of_the_server());
    }

    #[test]
    fn what_is_to_be_raised_are_keys_of_the_file() {
        let busy = PostgresError::Busy {
            target: "h:5432/weir".to_owned(),
            within: Duration::from_secs(2),
        };
        let said = busy.to_string();
        let keys = said.split("postgres.pool.").skip(1);
        let keys: Vec<_> = keys.filter_map(|rest| rest.split(' ').next()).collect();
        let [write, read] = keys[..] else {
            panic!("{said}");
        };
        let text = format!(
            "listen: 127.0.0.1:1\nupstream: http://x\nredis: {{urls: redis://h}}\naudit: {{}}\n\
             postgres: {{write: 'postgres://h/weir', pool: {{{write}: 5, {read}: 6}}}}\n"
        );
        let config = parse(&text, &|_| None).unwrap_or_else(|said| panic!("{said:?}"));
        let pools = config.postgres.map(|it| (it.write_pool, it.read_pool));
        assert_eq!(pools, Some((5, 6)));
    }
}
