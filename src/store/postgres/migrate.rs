//! weir's schema in Postgres, brought up to date a numbered step at a time. Owns which steps there are and which a database
//! has had.

use tokio_postgres::error::SqlState;

use super::{Client, PostgresError, close};

/// What `weir.schema_version` counts; the text of each is in `migrations/`. A step that was released is never changed.
const STEPS: &[(i32, &str)] = &[
    (1, include_str!("../../../migrations/1_audit.sql")),
    (2, include_str!("../../../migrations/2_spans.sql")),
];

/// IF NOT EXISTS asks for the right to create schemas even where it is there, made for this role.
const SCHEMA: &str = "DO $$ BEGIN
     IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'weir') THEN CREATE SCHEMA weir; END IF;
 END $$";

/// Held while steps are applied, by whoever comes first: `weir` in ASCII, and 1.
const LOCK: i64 = 0x7765_6972_0000_0001;

/// The version of the schema that this weir works with.
pub const VERSION: i32 = STEPS[STEPS.len() - 1].0;

/// What became of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// 0: there was none.
    pub from: i32,
    pub to: i32,
}

/// Brings the schema up to date. Harmless if it is, and with several at once: the others wait. The connection's role must own the
/// schema `weir`, or be allowed to create it; a step that fails leaves nothing of itself.
pub async fn migrate(mut connection: Client) -> Result<Migrated, PostgresError> {
    let migrated = locked(&mut connection).await;
    if migrated.is_err() {
        // The lock goes with it.
        close(connection);
    }
    migrated
}

/// Fails unless the schema is this weir's: for processes that do not migrate. A later weir's is refused by those that do, too, since
/// nothing says whether this weir could write to it: who rolls back behind a step keeps the workers of the later one (docs/kubernetes.md).
pub async fn check_version(connection: &Client) -> Result<(), PostgresError> {
    match version(connection).await? {
        found if found < VERSION => Err(PostgresError::SchemaOld {
            found,
            needed: VERSION,
        }),
        found => known(found),
    }
}

async fn locked(connection: &mut Client) -> Result<Migrated, PostgresError> {
    let encoding = connection.query_one("SHOW server_encoding", &[]).await?;
    let encoding: String = encoding.try_get(0)?;
    if encoding != "UTF8" {
        return Err(PostgresError::Encoding(encoding));
    }
    // Of the session, not of a transaction: each step is one of its own. All take as long as they do, whatever bound the role has.
    let lock =
        format!("SET statement_timeout = 0; SET lock_timeout = 0; SELECT pg_advisory_lock({LOCK})");
    connection.batch_execute(&lock).await?;
    let from = version(connection).await?;
    known(from)?;
    for (number, step) in STEPS.iter().filter(|(number, _)| *number > from) {
        let step = format!(
            "{SCHEMA};
             CREATE TABLE IF NOT EXISTS weir.schema_version
                 (version integer PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now());
             {step};
             INSERT INTO weir.schema_version (version) VALUES ({number});"
        );
        let transaction = connection.transaction().await?;
        transaction.batch_execute(&step).await?;
        transaction.commit().await?;
    }
    let unlock =
        format!("SELECT pg_advisory_unlock({LOCK}); RESET statement_timeout; RESET lock_timeout");
    connection.batch_execute(&unlock).await?;
    Ok(Migrated { from, to: VERSION })
}

fn known(found: i32) -> Result<(), PostgresError> {
    match found > VERSION {
        true => Err(PostgresError::SchemaNew {
            found,
            known: VERSION,
        }),
        false => Ok(()),
    }
}

/// 0 where there is no schema.
async fn version(connection: &Client) -> Result<i32, PostgresError> {
    let query = "SELECT coalesce(max(version), 0) FROM weir.schema_version";
    match connection.query_one(query, &[]).await {
        Ok(row) => Ok(row.try_get(0)?),
        Err(error) => match error.code() {
            Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => Ok(0),
            _ => Err(error.into()),
        },
    }
}
