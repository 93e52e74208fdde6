//! Postgres: a pool of connections to the primary, and one to each replica, of which a sick one is left out until it answers
//! again. Owns the connections, their timeouts and TLS. The only module that names the Postgres
//! crates.
//!
//! A pool's connections live on the runtime that made them, so all calls are to come from one.

mod connect;
mod error;
pub mod migrate;
pub mod partitions;
mod read;
pub mod row;
mod target;
mod tls;
mod url;
mod verify;
pub mod write;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use deadpool_postgres::Object;
use futures_util::future::join_all;
use thiserror::Error;
use tokio::time::{sleep, timeout};

pub use self::error::PostgresError;
pub use self::read::Reader;
use self::target::Target;
pub use self::target::TargetHealth;
pub use self::url::differ_by_password;
pub use deadpool_postgres::{Client, Transaction};

use crate::config::{Secret, postgres};
use crate::net::tls::{StoreTls, TlsError};
use crate::telemetry::metrics::process::PoolUse;

/// Between looks at replicas.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why the pools cannot be made.
#[derive(Debug, Error)]
pub enum OpenError {
    /// `place` is `postgres.write` or `postgres.read[N]`. What is wrong is not told in the text's own words: it has a
    /// password.
    #[error("{place}: {what}")]
    Url { place: String, what: &'static str },
    #[error("postgres.tls: {0}")]
    Tls(#[from] TlsError),
}

/// The pools, as the process shares them.
#[derive(Debug)]
pub struct Postgres {
    /// For a connection from a pool, and for each statement of a read connection.
    pub timeout: Duration,
    write: Target,
    /// The primary again, by connections that only read: asked while no replica is well.
    read_primary: Target,
    replicas: Vec<Target>,
    /// Whose turn it is.
    next: AtomicUsize,
    /// Of all servers, where one of them is spoken to by TLS.
    pub tls: Option<Arc<StoreTls>>,
}

/// How the servers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub write: TargetHealth,
    /// Each replica; the primary where there is none.
    pub read: Vec<TargetHealth>,
}

impl Postgres {
    /// Connects to nothing yet; reads the files of `tls` where a URL allows TLS.
    pub fn new(config: &postgres::Postgres) -> Result<Arc<Postgres>, OpenError> {
        let read = config.read.iter().enumerate();
        let read = read.map(|(n, url)| (format!("postgres.read[{n}]"), url));
        let urls = [("postgres.write".to_owned(), &config.write)]
            .into_iter()
            .chain(read);
        let mode = |(place, url): (String, &Secret)| {
            url::parse(&place, &url.0, config.timeout).map(|config| config.get_ssl_mode())
        };
        let modes = urls.map(mode).collect::<Result<Vec<_>, _>>()?;
        Postgres::with_tls(config, tls::read(&config.tls, modes.into_iter())?)
    }

    /// Pools of their own, of the same `config`, for another runtime. The files of `tls` are not read again: what holds here holds there.
    pub fn for_other_runtime(
        &self,
        config: &postgres::Postgres,
    ) -> Result<Arc<Postgres>, OpenError> {
        Postgres::with_tls(config, self.tls.clone())
    }

    fn with_tls(
        config: &postgres::Postgres,
        tls: Option<Arc<StoreTls>>,
    ) -> Result<Arc<Postgres>, OpenError> {
        let timeout = config.timeout;
        // The proxy and the command line only look; no query of theirs is to run on when they have given up.
        let bounded = [
            ("statement_timeout", timeout.as_millis().max(1).to_string()),
            ("default_transaction_read_only", "on".to_owned()),
        ];
        let target = |place: &str, url: &str, size: usize, settings: &[(&str, String)]| {
            Target::new(place, url, size, settings, tls.as_deref(), timeout)
        };
        let each = (config.read_pool / config.read.len().max(1)).max(1);
        let replicas = config.read.iter().enumerate().map(|(n, url)| {
            let place = format!("postgres.read[{n}]");
            target(&place, &url.0, each, &bounded)
        });
        // Keepalives do not run while rows that were sent, or an answer, are not acknowledged. A reader may pause for longer.
        let unacknowledged = url::UNACKNOWLEDGED.as_millis().to_string();
        let given_up = [("tcp_user_timeout", unacknowledged)];
        let (url, size) = (&config.write.0, config.write_pool);
        let mut write = target("postgres.write", url, size, &given_up)?;
        write.writes = true;
        Ok(Arc::new(Postgres {
            timeout,
            write,
            read_primary: target(
                "postgres.write",
                &config.write.0,
                config.read_pool,
                &bounded,
            )?,
            replicas: replicas.collect::<Result<_, _>>()?,
            next: AtomicUsize::new(0),
            tls,
        }))
    }

    /// The primary, as `HOST:PORT/DATABASE`.
    pub fn primary(&self) -> &str {
        &self.write.name
    }

    /// A connection to the primary, without a bound on its statements.
    pub async fn write(&self) -> Result<Client, PostgresError> {
        self.write.connection().await
    }

    /// A connection to read by: to the next replica that is well, or to the primary. A statement ends after
    /// [`Postgres::timeout`] unless a transaction sets another bound.
    pub async fn read(&self) -> Result<Client, PostgresError> {
        for replica in self.replicas_in_turn() {
            // Others may have a connection left.
            if let Ok(connection) = replica.connection_noted().await {
                return Ok(connection);
            }
        }
        self.read_primary().await
    }

    /// The replicas that are well, each once; the first is another each time.
    fn replicas_in_turn(&self) -> impl Iterator<Item = &Target> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.replicas.len();
        let in_turn = (0..count).map(move |n| &self.replicas[(turn.wrapping_add(n)) % count]);
        in_turn.filter(|replica| !replica.sick.load(Ordering::Relaxed))
    }

    /// As [`Postgres::read`], but from one server for as long as it serves: what two servers show of one listing does not join where
    /// one is behind the other. When it fails, the primary takes its place for good: none is behind that one. `kept` says which it
    /// is; none of the replicas that failed on the way to it is tried again.
    pub(super) async fn read_kept(&self, kept: &OnceLock<usize>) -> Result<Client, PostgresError> {
        let well = |replica: &&Target| !replica.sick.load(Ordering::Relaxed);
        let count = self.replicas.len();
        let places = kept.get().map_or(0..count, |kept| *kept..kept + 1);
        for place in places {
            let Some(replica) = self.replicas.get(place).filter(well) else {
                continue;
            };
            if let Ok(connection) = replica.connection_noted().await {
                kept.get_or_init(|| place);
                return Ok(connection);
            }
        }
        kept.get_or_init(|| count);
        self.read_primary().await
    }

    /// A connection to the primary to read by.
    pub(super) async fn read_primary(&self) -> Result<Client, PostgresError> {
        self.read_primary.connection().await
    }

    /// Asks all servers at once, each for `within` at most.
    pub async fn health(&self, within: Duration) -> Health {
        let read = match self.replicas.is_empty() {
            true => std::slice::from_ref(&self.read_primary),
            false => &self.replicas[..],
        };
        let read = join_all(read.iter().map(|target| target.health(within)));
        let (write, read) = tokio::join!(self.write.health(within), read);
        Health { write, read }
    }

    /// How full the pool is that is written by.
    pub fn write_use(&self) -> PoolUse {
        self.write.used()
    }

    /// How full the pools are that read from the primary.
    pub fn read_primary_use(&self) -> PoolUse {
        self.read_primary.used()
    }

    /// How full the pools of the replicas are together.
    pub fn replicas_use(&self) -> PoolUse {
        let each = self.replicas.iter().map(Target::used);
        each.fold(PoolUse::default(), |all, one| PoolUse {
            idle: all.idle + one.idle,
            in_use: all.in_use + one.in_use,
            max: all.max + one.max,
            waiting: all.waiting + one.waiting,
        })
    }

    /// Whether the replica of this place in the configuration is asked now.
    pub fn is_in_turn(&self, replica: usize) -> bool {
        let replica = self.replicas.get(replica);
        replica.is_some_and(|replica| !replica.sick.load(Ordering::Relaxed))
    }

    /// Whether the server is at a statement of the connection that has this process there.
    pub async fn is_at_work(&self, backend: i32) -> Result<bool, PostgresError> {
        let ask = async {
            let mut connection = CloseUnlessKept(Some(self.write.take(&self.write.probe).await?));
            // A server that does not tell states may be at one. Of several hosts another may answer than the connection is to: there the
            // number is another's, such as that of a process that sends to a standby, which is always at work.
            let query = format!(
                "SELECT coalesce(state NOT LIKE 'idle%', true) FROM pg_stat_activity
                 WHERE pid = {backend} AND usename = session_user AND datname = current_database()"
            );
            let rows = connection.get().query_typed(&query, &[]).await?;
            let is_at_work = rows.first().map(|row| row.try_get(0)).transpose()?;
            connection.keep();
            Ok(is_at_work.unwrap_or(false))
        };
        let answer = timeout(self.timeout, ask).await;
        answer.unwrap_or(Err(PostgresError::Late(self.timeout)))
    }

    /// Whether a pooler was seen to give one connection's statements to several of the server's; it may do so unseen.
    pub async fn shares_connections(&self) -> Result<bool, PostgresError> {
        let look = async {
            let one = self.write().await?;
            let mut other = CloseUnlessKept(Some(self.write.take(&self.write.probe).await?));
            let before = backend(&one).await?;
            // Takes what the first one was lent, if that was given back.
            other.get().batch_execute("BEGIN").await?;
            let beside = backend(other.get()).await?;
            let after = backend(&one).await?;
            Ok(before == beside || before != after)
        };
        let seen = timeout(self.timeout, look).await;
        seen.unwrap_or(Err(PostgresError::Late(self.timeout)))
    }

    /// Looks at the replicas for ever, so that a sick one is left out and taken back when it answers again. Whatever the servers
    /// do, `beat` is called again within `timeout` and a second.
    pub async fn watch_replicas(self: Arc<Self>, beat: impl Fn()) -> std::convert::Infallible {
        loop {
            beat();
            join_all(self.replicas.iter().map(Target::look)).await;
            sleep(LOOK_EVERY).await;
        }
    }
}

/// The server's process of a connection.
async fn backend(connection: &Client) -> Result<i32, PostgresError> {
    let query = "SELECT pg_backend_pid()";
    let row = connection.query_typed(query, &[]).await?.pop();
    let row = row.ok_or_else(|| PostgresError::Nonsense("no row for its process".to_owned()))?;
    Ok(row.try_get(0)?)
}

/// Closes a connection that is in the middle of something, whatever ends that.
pub(super) struct CloseUnlessKept(pub(super) Option<Client>);

impl CloseUnlessKept {
    pub(super) fn get(&mut self) -> &mut Client {
        self.0.as_mut().expect("it is there until it is kept")
    }

    /// Gives it back to its pool.
    pub(super) fn keep(mut self) {
        drop(self.0.take());
    }
}

impl Drop for CloseUnlessKept {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            close(connection);
        }
    }
}

/// Closes a connection instead of giving it back: whatever runs on it ends.
pub(super) fn close(connection: Client) {
    drop(Object::take(connection));
}
