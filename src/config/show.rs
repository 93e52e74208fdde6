//! A checked [`Config`] as a file again: every default filled in, secrets masked, and readable by `weir check`. Owns how
//! values look when they are shown; must not decide any of them. The one text that does not survive being read again is a
//! `${` in a key, such as one of `overrides`, where it stands for itself.
//!
//! Keys stand in the order in which people read them. Tests hold that each key of [`super::raw`] is among them, and is read again.

mod audit;
mod breakers;
mod limits;
mod listeners;
mod redis;
mod routes;
mod sessions;
mod shown;
mod upstreams;

use std::collections::BTreeMap;

use super::postgres::Postgres;
use super::raw::{Always, Partition};
use super::runtime::MemoryBound;
use super::telemetry::{AccessLog, Traces};
use super::units::{ByteSize, Percent};
use super::worker::Worker;
use super::{Admin, Config};
use shown::{Keys, Shown};

/// The configuration as YAML.
pub fn yaml(config: &Config) -> String {
    let text = serde_saphyr::to_string(&file(config))
        .expect("texts, numbers, lists and maps of them are YAML");
    text.replace("${", "$${")
}

/// The configuration as JSON, with the keys of the YAML.
pub fn json(config: &Config) -> serde_json::Value {
    serde_json::to_value(file(config)).expect("the keys of all maps are texts")
}

fn file(config: &Config) -> Shown {
    let breakers = config.upstreams.iter();
    let breakers = breakers.filter_map(|upstream| upstream.circuit_breaker.as_ref());
    let audit = config.audit.as_ref();
    Keys::new()
        .key("version", 1_u32)
        .key("listeners", each(&config.listeners, listeners::listener))
        .key(
            "upstreams",
            named(&config.upstreams, |it| &it.name, upstreams::upstream),
        )
        .key(
            "routes",
            each(&config.routes, |route| routes::route(route, config)),
        )
        .key(
            "rate_limits",
            named(&config.limits, |it| &it.name, limits::limit),
        )
        .key(
            "rate_limit_defaults",
            limits::defaults(&config.limit_defaults),
        )
        // Those that an upstream names.
        .key(
            "circuit_breakers",
            named(breakers, |it| &it.name, breakers::breaker),
        )
        .key(
            "sessions",
            named(&config.sessions, |it| &it.name, sessions::sessions),
        )
        .key("redis", config.redis.as_ref().map(redis::redis))
        .key(
            "audit",
            audit.map(|audit| audit::audit(audit, config.postgres.is_some())),
        )
        .key("postgres", config.postgres.as_ref().map(postgres))
        .key("worker", worker(&config.worker))
        .key("admin", admin(&config.admin))
        .key(
            "metrics",
            Keys::new()
                .key("address", config.metrics_address)
                .key("max_series", config.max_series),
        )
        .key("telemetry", telemetry(config))
        .key("runtime", runtime(config))
        .key(
            "shutdown",
            Keys::new()
                .key("propagation_delay", config.propagation_delay)
                .key("drain", config.drain),
        )
        .into()
}

fn each<'c, T>(items: &'c [T], shown: impl Fn(&'c T) -> Keys) -> Vec<Keys> {
    items.iter().map(shown).collect()
}

/// By name, each once.
fn named<'c, T: 'c>(
    items: impl IntoIterator<Item = &'c T>,
    name: impl Fn(&'c T) -> &'c str,
    shown: impl Fn(&'c T) -> Keys,
) -> BTreeMap<&'c str, Keys> {
    let items = items.into_iter();
    items.map(|item| (name(item), shown(item))).collect()
}

fn admin(admin: &Admin) -> Keys {
    Keys::new()
        .key("address", admin.address)
        .key("token", admin.token.as_ref())
}

/// An address is masked as a whole: where in it a password stands is for the client to say.
fn postgres(postgres: &Postgres) -> Keys {
    /// Still an address, so that what is printed can be read.
    const ADDRESS: &str = "postgres://***";
    Keys::new()
        .key("write", ADDRESS)
        .key("read", vec![ADDRESS; postgres.read.len()])
        .key(
            "pool",
            Keys::new()
                .key("write", postgres.write_pool)
                .key("read", postgres.read_pool)
                .key("timeout", postgres.timeout),
        )
        .key("migrate", postgres.migrate)
        .key("tls", redis::tls(&postgres.tls))
}

fn worker(worker: &Worker) -> Keys {
    let health = &worker.health;
    let lag = Keys::new()
        .key("degraded", health.lag_degraded)
        .key("critical", health.lag_critical);
    Keys::new()
        .key("group", &worker.group)
        .key(
            "batch",
            Keys::new()
                .key("max", worker.batch_max)
                .key("wait", worker.batch_wait),
        )
        .key("claim_after", worker.claim_after)
        .key("max_deliveries", worker.max_deliveries)
        .key("partition", Partition::Day)
        .key("retention", worker.retention)
        .key("session_sweep", worker.session_sweep)
        .key(
            "health",
            Keys::new()
                .key("interval", health.interval)
                .key("timeout", health.timeout)
                .key("cache", health.cache)
                .key("checks", Keys::new().key("audit_lag", lag)),
        )
}

fn telemetry(config: &Config) -> Keys {
    let access_log = |log: &AccessLog| {
        let errors = log.errors.then_some(Always::Errors);
        let rejected = log.rejected.then_some(Always::Rejected);
        Keys::new()
            .key("format", log.format)
            .key("sample", Percent(log.sample))
            .key(
                "always",
                errors.into_iter().chain(rejected).collect::<Vec<_>>(),
            )
    };
    let traces = |traces: &Traces| {
        Keys::new()
            .key("otlp", traces.otlp.as_ref())
            .key("sample", Percent(traces.sample))
    };
    Keys::new()
        .key(
            "log",
            Keys::new()
                .key("format", config.log.format)
                .key("level", config.log.level),
        )
        .key("access_log", config.access_log.as_ref().map(access_log))
        .key("traces", config.traces.as_ref().map(traces))
}

fn runtime(config: &Config) -> Keys {
    let memory = config.shed.memory.map(|bound| match bound {
        MemoryBound::Share(share) => Percent(share).to_string(),
        MemoryBound::Bytes(bytes) => ByteSize(bytes).to_string(),
    });
    let shed = Keys::new()
        .key("loop_delay", config.shed.loop_delay)
        .key("memory", memory);
    let lanes = config.lanes;
    Keys::new()
        .key(
            "lanes",
            lanes.map_or(Shown::from("auto"), |lanes| lanes.get().into()),
        )
        .key("shed", shed.any())
}

#[cfg(test)]
mod tests;
