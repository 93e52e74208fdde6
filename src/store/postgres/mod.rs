//! Postgres: a pool of connections to the primary, and one to each replica, of which a sick one is left out until it answers
//! again. Owns the connections, their timeouts and TLS. The only module that names the Postgres
//! crates.
//!
//! `sslmode` of a URL says whether TLS is used: `disable`, `prefer` (the default: if the server can) or `require`. Where it
//! is, the server's certificate must be of an authority that is believed and bear its name, as libpq has it for
//! `verify-full`, which is taken for `require`.
//!
//! A pool's connections live on the runtime that made them, so all calls are to come from one.

mod error;
pub mod migrate;
pub mod partitions;
mod read;
pub mod row;
mod tls;
mod verify;
pub mod write;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use deadpool_postgres::{
    ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError,
    RecyclingMethod, Runtime, TimeoutType, Timeouts,
};
use futures_util::future::join_all;
use thiserror::Error;
use tokio::time::{sleep, timeout};
use tokio_postgres::config::{Host, SslMode};
use tracing::{info, warn};

pub use self::error::PostgresError;
pub use self::read::Reader;
use self::tls::MakeLatest;
pub use deadpool_postgres::{Client, Transaction};

use crate::clock;
use crate::config::{Secret, postgres};
use crate::net::tls::{StoreTls, TlsError};
use crate::telemetry::metrics::process::PoolUse;

const IS_READ_ONLY: &str =
    "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'";
/// Whether a commit waits for a standby for longer than one that is there takes.
const IS_ALONE: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity
    WHERE wait_event = 'SyncRep' AND query_start < clock_timestamp() - interval '5 s')";
/// Between looks at replicas.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What a connection that is quiet, or whose bytes are not acknowledged, lives: a peer that vanished is noticed by it, here and
/// at the server.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

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

/// One server, as it is used for one purpose.
struct Target {
    /// Where it is, without the password.
    name: String,
    pool: Pool,
    /// One connection of its own to be looked at by: a pool in full use says nothing of the server.
    probe: Pool,
    sick: AtomicBool,
    /// Whether it is of use only while it can be written to.
    writes: bool,
    timeout: Duration,
}

/// How a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetHealth {
    /// `HOST:PORT/DATABASE`.
    pub name: String,
    /// How long it took to answer, or why it did not.
    pub answered: Result<Duration, PostgresError>,
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
            parse(&place, &url.0, config.timeout).map(|config| config.get_ssl_mode())
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
        let unacknowledged = UNACKNOWLEDGED.as_millis().to_string();
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
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.replicas.len();
        let in_turn = (0..count).map(|n| &self.replicas[(turn.wrapping_add(n)) % count]);
        for replica in in_turn.filter(|replica| !replica.sick.load(Ordering::Relaxed)) {
            match replica.connection().await {
                Ok(connection) => return Ok(connection),
                // Others may have some left; it is not sick for that.
                Err(PostgresError::Busy { .. }) => {}
                Err(error) => replica.note(Err(&error)),
            }
        }
        self.read_primary().await
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
            match replica.connection().await {
                Ok(connection) => {
                    kept.get_or_init(|| place);
                    return Ok(connection);
                }
                Err(error) => replica.note(Err(&error)),
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
            // A server that does not tell states may be at one.
            let query = format!(
                "SELECT coalesce(state NOT LIKE 'idle%', true) FROM pg_stat_activity WHERE pid = {backend}"
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

impl Target {
    fn used(&self) -> PoolUse {
        let status = self.pool.status();
        PoolUse {
            idle: status.available,
            in_use: status.size.saturating_sub(status.available),
            max: status.max_size,
            waiting: status.waiting,
        }
    }

    fn new(
        place: &str,
        url: &str,
        size: usize,
        settings: &[(&str, String)],
        tls: Option<&StoreTls>,
        timeout: Duration,
    ) -> Result<Target, OpenError> {
        let config = parse(place, url, timeout)?;
        let set = set(&config, settings);
        let tls = tls.filter(|_| config.get_ssl_mode() != SslMode::Disable);
        let within = timeout;
        let pool = |size: usize| {
            let recycling = ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            };
            let config = config.clone();
            let manager = match tls {
                Some(tls) => Manager::from_config(config, MakeLatest(tls.latest()), recycling),
                None => Manager::from_config(config, tokio_postgres::NoTls, recycling),
            };
            let timeouts = Timeouts {
                wait: Some(timeout),
                create: Some(timeout),
                recycle: Some(timeout),
            };
            let set: Arc<str> = set.as_str().into();
            let prepare = Hook::async_fn(move |client: &mut ClientWrapper, _| {
                let set = set.clone();
                Box::pin(async move {
                    let done = tokio::time::timeout(within, client.batch_execute(&set)).await;
                    let late = || HookError::message("its settings were not taken in time");
                    done.map_err(|_| late())?.map_err(HookError::Backend)
                })
            });
            Pool::builder(manager)
                .post_create(prepare)
                .max_size(size.max(1))
                .timeouts(timeouts)
                .runtime(Runtime::Tokio1)
                .build()
                .expect("a pool with a runtime takes timeouts")
        };
        Ok(Target {
            name: name(&config),
            pool: pool(size),
            probe: pool(1),
            sick: AtomicBool::new(false),
            writes: false,
            timeout,
        })
    }

    async fn connection(&self) -> Result<Client, PostgresError> {
        self.take(&self.pool).await
    }

    async fn take(&self, pool: &Pool) -> Result<Client, PostgresError> {
        pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                match PostgresError::from(error) {
                    PostgresError::Lost(why) => {
                        PostgresError::Lost(format!("{}: {why}", self.name))
                    }
                    other => other,
                }
            }
            PoolError::Timeout(TimeoutType::Wait) => PostgresError::Busy {
                target: self.name.clone(),
                within: self.timeout,
            },
            PoolError::Timeout(_) => {
                let why = format!("{}: none was made within {:?}", self.name, self.timeout);
                PostgresError::Lost(why)
            }
            other => PostgresError::Lost(format!("{}: {other}", self.name)),
        })
    }

    /// How long it takes to answer, a connection included if there is none.
    async fn answer_within(&self, within: Duration) -> Result<Duration, PostgresError> {
        let began = clock::now();
        let ask = async {
            let connection = self.take(&self.probe).await?;
            // What is not answered in time is closed, not kept for the next one to wait behind.
            let mut connection = CloseUnlessKept(Some(connection));
            let is_read_only = holds(connection.get(), IS_READ_ONLY).await?;
            let is_alone = self.writes && holds(connection.get(), IS_ALONE).await?;
            connection.keep();
            match self.writes && is_read_only {
                true => Err(PostgresError::ReadOnly(self.name.clone())),
                false if is_alone => Err(PostgresError::Alone(self.name.clone())),
                false => Ok(()),
            }
        };
        let answer = timeout(within, ask).await;
        answer.unwrap_or(Err(PostgresError::Late(within)))?;
        Ok(began.elapsed())
    }

    async fn health(&self, within: Duration) -> TargetHealth {
        TargetHealth {
            name: self.name.clone(),
            answered: self.answer_within(within).await,
        }
    }

    async fn look(&self) {
        let answer = self.answer_within(self.timeout).await;
        self.note(answer.as_ref().map(|_| ()));
    }

    fn note(&self, answer: Result<(), &PostgresError>) {
        let was_sick = self.sick.swap(answer.is_err(), Ordering::Relaxed);
        match answer {
            Ok(()) if was_sick => info!(replica = self.name, "postgres replica is asked again"),
            Err(error) if !was_sick => {
                warn!(replica = self.name, %error, "postgres replica is left out");
            }
            Ok(()) | Err(_) => {}
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

/// What a query of one value says.
async fn holds(connection: &Client, query: &str) -> Result<bool, PostgresError> {
    let rows = connection.query_typed(query, &[]).await?;
    let holds = rows.first().map(|row| row.try_get(0)).transpose()?;
    Ok(holds.unwrap_or(false))
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

/// Whether two URLs say the same, but for the password.
pub fn differ_by_password(Secret(one): &Secret, Secret(other): &Secret) -> bool {
    let without = |url: &str| {
        let mut config = parse("", url, Duration::ZERO).ok()?;
        Some(config.password("").clone())
    };
    without(one).is_some_and(|one| Some(one) == without(other))
}

/// What the connections are made by.
fn parse(place: &str, url: &str, timeout: Duration) -> Result<tokio_postgres::Config, OpenError> {
    let wrong = |what| OpenError::Url {
        place: place.to_owned(),
        what,
    };
    // TLS is never less than this.
    let url = url
        .replace("sslmode=verify-full", "sslmode=require")
        .replace("sslmode=verify-ca", "sslmode=require");
    let mut config: tokio_postgres::Config = url.parse().map_err(|_| {
        wrong("not a URL as postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=require, nor `key=value` words of those keys")
    })?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(wrong("names no host"));
    }
    if config.get_user().is_none() {
        return Err(wrong("names no user"));
    }
    if config.get_application_name().is_none() {
        config.application_name("weir");
    }
    if config.get_connect_timeout().is_none() {
        // It is for each host: one that is silent must leave time for the next.
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len());
        config.connect_timeout(timeout / u32::try_from(hosts.max(1)).unwrap_or(u32::MAX));
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(UNACKNOWLEDGED);
    }
    config.keepalives_idle(KEEPALIVE_IDLE);
    config.keepalives_interval(KEEPALIVE_INTERVAL);
    config.keepalives_retries(KEEPALIVE_RETRIES);
    Ok(config)
}

/// The statements by which a connection that was made gets its settings, but for those that the URL's `options` have. Not among the
/// options themselves: poolers refuse or ignore those, and who asks for a server that can be written to
/// (`target_session_attrs=read-write`) would find none where transactions are read-only.
fn set(config: &tokio_postgres::Config, settings: &[(&str, String)]) -> String {
    // The server's side of keepalives: the locks of a worker whose machine vanished are free in good time.
    let keepalives = [
        ("tcp_keepalives_idle", KEEPALIVE_IDLE.as_secs().to_string()),
        (
            "tcp_keepalives_interval",
            KEEPALIVE_INTERVAL.as_secs().to_string(),
        ),
        ("tcp_keepalives_count", KEEPALIVE_RETRIES.to_string()),
    ];
    let given = config.get_options().unwrap_or_default();
    let all = keepalives.iter().chain(settings);
    all.filter(|(name, _)| !given.contains(name))
        .map(|(name, value)| format!("SET {name} = {value};"))
        .collect()
}

fn name(config: &tokio_postgres::Config) -> String {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => config
            .get_hostaddrs()
            .first()
            .map(ToString::to_string)
            .unwrap_or_default(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user());
    format!("{host}:{port}/{}", database.unwrap_or_default())
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("name", &self.name)
            .field("sick", &self.sick)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<tokio_postgres::Config, OpenError> {
        parse("postgres.write", url, Duration::from_secs(3))
    }

    #[test]
    fn urls_are_taken_as_libpq_takes_them() {
        let check = |url: &str, expected: &str| {
            assert_eq!(name(&parsed(url).unwrap()), expected, "{url}");
        };
        check("postgres://u:p@db:5433/weir", "db:5433/weir");
        check(
            "postgres://u@[::1]/weir?sslmode=verify-full",
            "::1:5432/weir",
        );
        check("host=/run/postgresql user=u", "/run/postgresql:5432/u");
        let config = parsed("postgres://u:p@db/weir?sslmode=verify-ca&options=-c%20c%3Dd").unwrap();
        assert_eq!(config.get_ssl_mode(), SslMode::Require);
        assert_eq!(config.get_options(), Some("-c c=d"));
    }

    #[test]
    fn what_a_url_sets_is_left_alone() {
        let config = parsed("postgres://u@a,b/weir?options=-c%20statement_timeout%3D9").unwrap();
        assert_eq!(
            config.get_connect_timeout(),
            Some(&Duration::from_millis(1_500))
        );
        let settings = ["statement_timeout", "default_transaction_read_only"];
        let said = set(&config, &settings.map(|name| (name, "on".to_owned())));
        assert!(!said.contains("statement_timeout"), "{said}");
        assert!(
            said.ends_with("SET default_transaction_read_only = on;"),
            "{said}"
        );
    }

    #[test]
    fn no_message_shows_a_password() {
        for url in [
            "postgres://u:s3cret@db:x/weir",
            "user=u password=s3 cret host=db",
            "postgres://u:s3cret@/weir",
            "host=db password=s3cret",
        ] {
            let said = parsed(url).unwrap_err().to_string();
            assert!(said.starts_with("postgres.write: "), "{said}");
            assert!(!said.contains("s3") && !said.contains("cret"), "{said}");
        }
    }
}
