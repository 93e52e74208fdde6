//! The control thread of `weir run`, `weir proxy` and `weir worker`: its runtime, the admin port, the tasks that it keeps up, on itself
//! and in a companion, and what `/health` looks at. Must not know whether there are lanes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::companion::{Companion, Runs};
use super::files;
use crate::admin::health::check::Check;
use crate::admin::health::{Board, Health};
use crate::admin::{self, Admin};
use crate::background;
use crate::background::supervise::{GaveUp, Supervisor};
use crate::clock;
use crate::config::Config;
use crate::config::worker::Health as Bounds;
use crate::heartbeat::Heartbeat;
use crate::net::tls::StoreTls;
use crate::store::fleet::Fleet;
use crate::store::postgres::Postgres;
use crate::telemetry::metrics::Metrics;

/// Runs `main` on a control thread, which is this one.
pub(super) fn run<T>(main: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    run_once_read(|| Ok(main))
}

/// As [`run`], of what serves once `read` has read the file. Whoever asks that it be read again may do so before it was read once: a
/// SIGHUP does not end the process from here on.
pub(super) fn serve<T, M>(read: impl FnOnce() -> anyhow::Result<M>) -> anyhow::Result<T>
where
    M: Future<Output = anyhow::Result<T>>,
{
    run_once_read(|| {
        // Its handler stays.
        signal(SignalKind::hangup()).map(drop)?;
        read()
    })
}

/// `read` may ask the runtime for what it has.
fn run_once_read<T, M>(read: impl FnOnce() -> anyhow::Result<M>) -> anyhow::Result<T>
where
    M: Future<Output = anyhow::Result<T>>,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let main = read()?;
        files::raise();
        files::outlive_long_ones()?;
        main.await
    });
    // Not for a look-up of a name that takes its time.
    runtime.shutdown_background();
    ended
}

/// The tasks that are kept up.
pub(super) struct Tasks {
    /// Those of the control thread.
    pub control: Supervisor,
    /// Those that ingest the audit, where this process does.
    pub companion: Option<Companion>,
    metrics: Arc<Metrics>,
}

impl Tasks {
    pub(super) fn new(metrics: &Arc<Metrics>) -> Tasks {
        Tasks {
            control: Supervisor::new(Handle::current(), metrics.clone()),
            companion: None,
            metrics: metrics.clone(),
        }
    }

    /// Keeps up what the admin port reads by.
    pub(super) fn look_at_replicas(&mut self, postgres: &Arc<Postgres>) {
        // Apart from the companion's own view, which has connections of another runtime.
        background::look_at_replicas(&mut self.control, "query_replicas", postgres.clone());
    }

    /// Begins to ingest the audit, as [`Companion::begin`].
    pub(super) async fn begin_companion(
        &mut self,
        config: &Config,
        postgres: &Postgres,
        fleet: &Arc<Fleet>,
        runs: Runs,
    ) -> anyhow::Result<()> {
        let begin = Companion::begin(config, postgres, fleet, &self.metrics, runs);
        self.companion = Some(begin.await?);
        Ok(())
    }

    /// A board of `checks` and the companion's.
    pub(super) fn board(&mut self, mut checks: Vec<Check>, bounds: Bounds) -> Arc<Board> {
        let mut runtime = Handle::current();
        if let Some(companion) = &mut self.companion {
            checks.append(&mut companion.checks);
            runtime = companion.runtime().clone();
        }
        Board::new(checks, bounds.timeout, bounds.cache, runtime)
    }

    /// What health is told by, once all tasks are begun; and what has `/ready` say that the process ends, by true.
    pub(super) fn health(
        &self,
        board: Arc<Board>,
        lanes: Vec<Heartbeat>,
    ) -> (Health, watch::Sender<bool>) {
        let (unready, draining) = watch::channel(false);
        let companion = self.companion.iter();
        let supervisors = companion.map(|companion| &companion.supervisor);
        let supervisors = [&self.control].into_iter().chain(supervisors);
        let health = Health {
            started: clock::now(),
            lanes,
            tasks: supervisors.flat_map(Supervisor::watched).collect(),
            draining,
            board,
        };
        (health, unready)
    }

    /// The companion's pools.
    pub(super) fn writes(&self) -> Option<Arc<Postgres>> {
        let companion = self.companion.as_ref();
        companion.map(|companion| companion.postgres.clone())
    }

    /// Waits until a task is given up; for ever while all are kept up.
    pub(super) async fn gave_up(&mut self) -> GaveUp {
        let companion = async {
            match &mut self.companion {
                Some(companion) => companion.supervisor.gave_up().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            gave_up = self.control.gave_up() => gave_up,
            gave_up = companion => gave_up,
        }
    }
}

/// The sockets of the control thread.
pub(super) struct AdminPorts {
    pub admin: TcpListener,
    /// Beside it, where the file has one.
    pub metrics: Option<TcpListener>,
}

impl AdminPorts {
    /// Made by `bind`, of the addresses that the file has.
    pub(super) fn open(
        config: &Config,
        mut bind: impl FnMut(SocketAddr) -> anyhow::Result<TcpListener>,
    ) -> anyhow::Result<AdminPorts> {
        let admin = bind(config.admin.address).context("admin.address")?;
        let metrics = config.metrics_address.map(bind).transpose();
        let metrics = metrics.context("metrics.address")?;
        Ok(AdminPorts { admin, metrics })
    }

    /// Of the admin port, and of the other.
    pub(super) fn addresses(&self) -> io::Result<(SocketAddr, Option<SocketAddr>)> {
        let metrics = self.metrics.as_ref().map(TcpListener::local_addr);
        Ok((self.admin.local_addr()?, metrics.transpose()?))
    }

    /// Serves them until what is returned is dropped.
    pub(super) fn serve(self, admin: Admin) -> JoinSet<io::Result<()>> {
        let admin = Arc::new(admin);
        let mut serving = JoinSet::new();
        serving.spawn(admin::serve(self.admin, admin.clone()));
        if let Some(metrics) = self.metrics {
            serving.spawn(admin::serve_metrics(metrics, admin));
        }
        serving
    }
}

/// What the stores are spoken to by, where that is TLS.
pub(super) fn tls_of(fleet: Option<&Fleet>, postgres: Option<&Postgres>) -> Vec<Arc<StoreTls>> {
    let fleet = fleet.and_then(|fleet| fleet.tls.clone());
    let postgres = postgres.and_then(|postgres| postgres.tls.clone());
    fleet.into_iter().chain(postgres).collect()
}
