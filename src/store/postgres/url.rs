//! What a URL of Postgres says, as libpq has it, and what weir sets beside it. Must not show a password.
//!
//! `sslmode` of a URL says whether TLS is used: `disable`, `prefer` (the default: if the server can) or `require`. Where it
//! is, the server's certificate must be of an authority that is believed and bear its name, as libpq has it for
//! `verify-full`, which is taken for `require`.

use std::time::Duration;

use tokio_postgres::config::Host;

use super::OpenError;
use crate::config::Secret;

/// What a connection that is quiet, or whose bytes are not acknowledged, lives: a peer that vanished is noticed by it, here and
/// at the server.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
pub(super) const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// What is bounded is so by statement: a check of all the audit, an index of a day and the steps of the schema take as long as they do. Postgres
/// has that setting since 17, which is to be asked for without a snapshot of a kind that a standby does not know.
const UNBOUND: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
     SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) <> '0';";

/// Whether two URLs say the same, but for the password.
pub fn differ_by_password(Secret(one): &Secret, Secret(other): &Secret) -> bool {
    let without = |url: &str| {
        let mut config = parse("", url, Duration::ZERO).ok()?;
        Some(config.password("").clone())
    };
    without(one).is_some_and(|one| Some(one) == without(other))
}

/// What the connections are made by.
pub(super) fn parse(
    place: &str,
    url: &str,
    timeout: Duration,
) -> Result<tokio_postgres::Config, OpenError> {
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
pub(super) fn set(config: &tokio_postgres::Config, settings: &[(&str, String)]) -> String {
    // The server's side of keepalives: the locks of a worker whose machine vanished are free in good time. And each statement sees what
    // is committed by then: one behind a lock is to see what its holder did, and a standby knows no serializable transactions.
    let always = [
        (
            "default_transaction_isolation",
            "'read committed'".to_owned(),
        ),
        ("tcp_keepalives_idle", KEEPALIVE_IDLE.as_secs().to_string()),
        (
            "tcp_keepalives_interval",
            KEEPALIVE_INTERVAL.as_secs().to_string(),
        ),
        ("tcp_keepalives_count", KEEPALIVE_RETRIES.to_string()),
    ];
    let given = config.get_options().unwrap_or_default();
    let all = always.iter().chain(settings);
    let sets = all
        .filter(|(name, _)| !given.contains(name))
        .map(|(name, value)| format!("SET {name} = {value};"));
    let unbound = Some(UNBOUND).filter(|_| !given.contains("transaction_timeout"));
    sets.chain(unbound.map(str::to_owned)).collect()
}

pub(super) fn name(config: &tokio_postgres::Config) -> String {
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

#[cfg(test)]
mod tests {
    use tokio_postgres::config::SslMode;

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
            said.contains("SET default_transaction_read_only = on;"),
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
