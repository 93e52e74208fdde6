//! One server of Postgres, with its pool and the connection that it is looked at by. Must not choose among servers.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_postgres::{
    Client, ClientWrapper, Hook, HookError, Manager, ManagerConfig, Pool, PoolError,
    RecyclingMethod, Runtime, TimeoutType, Timeouts,
};
use tokio::time::timeout;
use tokio_postgres::NoTls;
use tokio_postgres::config::{Host, SslMode};
use tracing::{info, warn};

use super::connect::EachInTime;
use super::tls::MakeLatest;
use super::url::{name, parse, set};
use super::{CloseUnlessKept, OpenError, PostgresError};
use crate::blocking;
use crate::clock;
use crate::net::tls::StoreTls;
use crate::telemetry::metrics::process::PoolUse;

const IS_READ_ONLY: &str =
    "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'";
/// Whether a commit waits for a standby for longer than one that is there takes.
const IS_ALONE: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity
    WHERE wait_event = 'SyncRep' AND query_start < clock_timestamp() - interval '5 s')";

/// One server, as it is used for one purpose.
pub(super) struct Target {
    /// Where it is, without the password.
    pub(super) name: String,
    pool: Pool,
    /// One connection of its own to be looked at by: a pool in full use says nothing of the server.
    pub(super) probe: Pool,
    pub(super) sick: AtomicBool,
    /// Whether it is of use only while it can be written to.
    pub(super) writes: bool,
    timeout: Duration,
    /// Whether its name is looked up for each connection, on a thread of tokio's.
    by_name: bool,
}

/// How a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetHealth {
    /// `HOST:PORT/DATABASE`.
    pub name: String,
    /// How long it took to answer, or why it did not.
    pub answered: Result<Duration, PostgresError>,
}

impl Target {
    pub(super) fn used(&self) -> PoolUse {
        let status = self.pool.status();
        PoolUse {
            idle: status.available,
            in_use: status.size.saturating_sub(status.available),
            max: status.max_size,
            waiting: status.waiting,
        }
    }

    pub(super) fn new(
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
        let by_name = config.get_hostaddrs().is_empty()
            && config
                .get_hosts()
                .iter()
                .any(|host| matches!(host, Host::Tcp(name) if name.parse::<IpAddr>().is_err()));
        let within = timeout;
        let pool = |size: usize| {
            let recycling = ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            };
            let config = config.clone();
            let manager = match tls {
                Some(tls) => {
                    let connect = EachInTime(MakeLatest(tls.latest()));
                    Manager::from_connect(config, connect, recycling)
                }
                None => Manager::from_connect(config, EachInTime(NoTls), recycling),
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
            by_name,
        })
    }

    pub(super) async fn connection(&self) -> Result<Client, PostgresError> {
        self.take(&self.pool).await
    }

    /// As [`Target::connection`]; a replica that has none is noted as sick.
    pub(super) async fn connection_noted(&self) -> Result<Client, PostgresError> {
        let connection = self.connection().await;
        match &connection {
            // It is not sick for that.
            Ok(_) | Err(PostgresError::Busy { .. }) => {}
            Err(error) => self.note(Err(error)),
        }
        connection
    }

    pub(super) async fn take(&self, pool: &Pool) -> Result<Client, PostgresError> {
        let status = pool.status();
        if self.by_name && status.available == 0 && status.size < status.max_size {
            // Else tokio panics, whoever asks: a task that did so again and again would end the process.
            let thread = blocking::done(|| ()).await;
            thread.map_err(|error| PostgresError::Lost(format!("{}: {error}", self.name)))?;
        }
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

    pub(super) async fn health(&self, within: Duration) -> TargetHealth {
        TargetHealth {
            name: self.name.clone(),
            answered: self.answer_within(within).await,
        }
    }

    pub(super) async fn look(&self) {
        let answer = self.answer_within(self.timeout).await;
        self.note(answer.as_ref().map(|_| ()));
    }

    pub(super) fn note(&self, answer: Result<(), &PostgresError>) {
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

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("name", &self.name)
            .field("sick", &self.sick)
            .finish_non_exhaustive()
    }
}

/// What a query of one value says.
async fn holds(connection: &Client, query: &str) -> Result<bool, PostgresError> {
    let rows = connection.query_typed(query, &[]).await?;
    let holds = rows.first().map(|row| row.try_get(0)).transpose()?;
    Ok(holds.unwrap_or(false))
}
