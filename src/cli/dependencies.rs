//! What a worker waits for before it begins: Redis and Postgres, asked by real calls. Owns how long, and what is said of it; must not
//! begin anything.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep, timeout};
use tracing::info;

use crate::config::Config;
use crate::config::redis::Client;
use crate::config::units::TimeLength;
use crate::policy::retry::Pauses;
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::postgres::migrate::check_version;
use crate::store::postgres::{Postgres, PostgresError};
use crate::store::redis::{Arg, Connections};

/// Between looks.
const PAUSES: Pauses = Pauses {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(2),
};
/// For a server to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// The same for the last look, which begins when the time is over.
const LAST_ANSWER: Duration = Duration::from_millis(500);
/// For connections to be made, before what is not there is told.
const CONNECT: Duration = Duration::from_millis(100);

/// Servers that hold the same, and whether they can be used.
struct Dependency {
    /// As the file has it, and where it is.
    name: String,
    /// What was found last: why it is not there.
    found: Option<Result<(), String>>,
}

impl Dependency {
    fn new(name: String) -> Dependency {
        Dependency { name, found: None }
    }

    /// Says what has changed.
    fn note(&mut self, found: Result<(), String>) {
        if self.found.as_ref() == Some(&found) {
            return;
        }
        match &found {
            Ok(()) => info!("{} is there", self.name),
            Err(why) => info!("waiting for {}: {why}", self.name),
        }
        self.found = Some(found);
    }

    fn missing(&self) -> Option<&str> {
        match &self.found {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why),
            None => Some("it was not asked yet"),
        }
    }
}

/// Waits until every client of `redis` can be used, the primary of `postgres` written to, and its schema there unless it is to be brought.
/// An error that says what is missing once `within` is over; at once if the schema is newer than this weir.
pub(super) async fn wait(
    config: &Config,
    fleet: &Fleet,
    redis: &FleetConnections,
    postgres: &Postgres,
    within: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + within;
    let clients: Vec<_> = redis.each().collect();
    let mut dependencies: Vec<_> = clients
        .iter()
        .map(|client| Dependency::new(name(config, client.client().name)))
        .collect();
    dependencies.push(Dependency::new(format!(
        "postgres.write ({})",
        postgres.primary()
    )));
    let migrates = config.postgres.as_ref().is_some_and(|it| it.migrate);
    if !migrates {
        dependencies.push(Dependency::new("the schema in postgres".to_owned()));
    }
    let key = fleet.keys.processes();
    let mut pause = PAUSES.first;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = left.clamp(LAST_ANSWER, ANSWER);
        let health = postgres.health(answer);
        let asked = clients.iter().map(|client| ask(client, &key, answer));
        let (asked, health) = tokio::join!(futures_util::future::join_all(asked), health);
        let written = health.write.answered.map(drop);
        let is_there = written.is_ok();
        let found = asked
            .into_iter()
            .chain([written.map_err(|error| error.to_string())]);
        for (dependency, found) in dependencies.iter_mut().zip(found) {
            dependency.note(found);
        }
        if let (Some(schema), false, true) = (dependencies.last_mut(), migrates, is_there) {
            let found = ask_schema(postgres, answer).await;
            if let Err(error @ PostgresError::SchemaNew { .. }) = found {
                return Err(error.into());
            }
            schema.note(found.map_err(|error| error.to_string()));
        }
        if dependencies.iter().all(|it| it.missing().is_none()) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(said(&dependencies, within));
        }
        sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
        pause = PAUSES.after(pause);
    }
}

/// By a call such as the worker makes: it also fails while a server still loads, and while its cluster is down.
async fn ask(redis: &Connections, key: &str, within: Duration) -> Result<(), String> {
    redis.ready(CONNECT).await;
    if !redis.knows_all_slots() {
        return Err("not all slots have a server yet".to_owned());
    }
    let down: Vec<_> = redis.health().into_iter().filter(|it| !it.up).collect();
    if !down.is_empty() {
        let down: Vec<_> = down.iter().map(|it| it.address.as_str()).collect();
        return Err(format!("no connection to {}", down.join(", ")));
    }
    let words = [Arg::Text("EXISTS"), Arg::Text(key)];
    match redis.command(within, key, &words).await {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

async fn ask_schema(postgres: &Postgres, within: Duration) -> Result<(), PostgresError> {
    let look = async { check_version(&postgres.write().await?).await };
    let looked = timeout(within, look).await;
    looked.unwrap_or(Err(PostgresError::Late(within)))
}

/// The client's key in the file, and its servers.
fn name(config: &Config, client: &str) -> String {
    let redis = config.redis.as_ref();
    let servers = |client: &Client| {
        let servers: Vec<_> = client.endpoints.iter().map(ToString::to_string).collect();
        servers.join(", ")
    };
    let of = match client {
        "rate_limit" => redis.map(|redis| ("redis.rate_limit", redis.for_rate_limits())),
        "sessions" => redis.map(|redis| ("redis.sessions", redis.for_sessions())),
        _ => redis.map(|redis| ("redis", &redis.main)),
    };
    match of {
        Some((key, client)) => format!("{key} ({})", servers(client)),
        None => client.to_owned(),
    }
}

fn said(dependencies: &[Dependency], within: Duration) -> String {
    let mut said = format!("after {} this is still missing:", TimeLength(within));
    for dependency in dependencies {
        if let Some(why) = dependency.missing() {
            let _ = write!(said, "\n  {}: {why}", dependency.name);
        }
    }
    said + "\nstart it, or mend its address or its password in the file, as the log says; --wait-for-deps=10m waits longer"
}
