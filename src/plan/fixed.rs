//! What a running process goes by from its start to its end: a reload that asks for another is refused, unless only a secret is
//! another, of which the old one stays.

use crate::config::postgres::Postgres;
use crate::config::redis::{Client, Redis};
use crate::config::{Config, Secret};
use crate::store::postgres::differ_by_password;

/// Has `new` go on with the secrets of stores and of the audit that `old` has, where it has others; their keys in the file.
pub(super) fn keep_secrets(old: &Config, new: &mut Config) -> Vec<String> {
    let mut kept = Vec::new();
    let mut keep = |key: &str, old: &Secret, new: &mut Secret| {
        if *old != *new {
            old.clone_into(new);
            kept.push(key.to_owned());
        }
    };
    if let (Some(old), Some(new)) = (&old.redis, &mut new.redis) {
        for (key, old, new) in clients(old, new) {
            if let (Some(old), Some(new)) = (&old.password, &mut new.password) {
                keep(key, old, new);
            }
        }
    }
    if let (Some(old), Some(new)) = (&old.postgres, &mut new.postgres) {
        for (key, old, new) in urls(old, new) {
            if differ_by_password(old, new) {
                keep(&key, old, new);
            }
        }
    }
    if let (Some(old), Some(new)) = (&old.audit, &mut new.audit)
        && let (Some(old), Some(new)) = (&old.key, &mut new.key)
    {
        keep("audit.integrity.key", old, new);
    }
    kept
}

/// Those that both have, with the keys of their passwords.
fn clients<'c>(
    old: &'c Redis,
    new: &'c mut Redis,
) -> Vec<(&'static str, &'c Client, &'c mut Client)> {
    let own = |key, old: &'c Option<Client>, new: &'c mut Option<Client>| {
        Some((key, old.as_ref()?, new.as_mut()?))
    };
    let of_limits = own(
        "redis.rate_limit.password",
        &old.rate_limit,
        &mut new.rate_limit,
    );
    let of_sessions = own("redis.sessions.password", &old.sessions, &mut new.sessions);
    let main = ("redis.password", &old.main, &mut new.main);
    [Some(main), of_limits, of_sessions]
        .into_iter()
        .flatten()
        .collect()
}

/// Those of both, with their keys.
fn urls<'u>(
    old: &'u Postgres,
    new: &'u mut Postgres,
) -> impl Iterator<Item = (String, &'u Secret, &'u mut Secret)> {
    let write = ("postgres.write".to_owned(), &old.write, &mut new.write);
    let read = old.read.iter().zip(&mut new.read).enumerate();
    let read = read.map(|(n, (old, new))| (format!("postgres.read[{n}]"), old, new));
    [write].into_iter().chain(read)
}

/// Whether a process that runs by `old` can go on with `new`; the error says what cannot change, and the mend.
pub(super) fn is_kept(old: &Config, new: &Config) -> Result<(), String> {
    /// Whether both have the same of this.
    fn same<T: PartialEq>(old: &Config, new: &Config, of: impl Fn(&Config) -> T) -> bool {
        of(old) == of(new)
    }
    let addresses = |config: &Config| {
        let listeners = config.listeners.iter();
        let addresses = listeners.map(|it| (it.address.clone(), it.socket_mode));
        addresses.collect::<Vec<_>>()
    };
    let audit = |config: &Config| {
        let audit = config.audit.clone()?;
        let way = (audit.delivery, audit.stream, audit.spool);
        Some((way, audit.sqlite, audit.retention, audit.key))
    };
    let checks = [
        (
            same(old, new, addresses),
            "listeners' addresses or socket_mode changed: restart weir to listen otherwise",
        ),
        (
            same(old, new, |it| (it.admin.address, it.metrics_address)),
            "the address of admin or metrics changed: restart weir to listen elsewhere",
        ),
        (
            old.lanes == new.lanes,
            "runtime.lanes changed: restart weir to run more or fewer",
        ),
        (
            old.log.format == new.log.format,
            "telemetry.log.format changed: restart weir to log otherwise",
        ),
        (
            same(old, new, |it| it.limit_defaults.max_keys),
            "rate_limit_defaults.max_keys changed: restart weir to hold more or fewer",
        ),
        (
            old.redis == new.redis,
            "redis changed: restart weir to share state elsewhere",
        ),
        (
            old.postgres == new.postgres,
            "postgres changed: restart weir to store elsewhere",
        ),
        (
            old.worker == new.worker,
            "worker changed: restart weir to work otherwise",
        ),
        (
            same(old, new, audit),
            "audit began, ended, or changed its delivery, stream, spool, file, retention or key: restart weir",
        ),
    ];
    match checks.into_iter().find(|(is_kept, _)| !is_kept) {
        Some((_, why_not)) => Err(why_not.to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    /// What is said when `new` is to come in place of `old`.
    fn said(old: &str, new: &str) -> Option<String> {
        let [old, new] = [old, new].map(|more| {
            let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{more}\n");
            check::parse(&text, &|_| None).unwrap()
        });
        is_kept(&old, &new).err()
    }

    #[test]
    fn a_running_process_does_not_change_its_redis() {
        let check = |old: &str, new: &str, refused: bool| {
            let expected = "redis changed: restart weir to share state elsewhere";
            let said = said(old, new);
            assert_eq!(said.as_deref(), refused.then_some(expected), "{old} {new}");
        };
        let one = "redis: {urls: redis://a}";
        check("", one, true);
        check(one, "", true);
        check(one, "redis: {urls: redis://b}", true);
        check(one, "redis: {urls: redis://a, password: b}", true);
        check(
            one,
            "redis: {urls: ['redis://a:6379'], timeout: 20ms}",
            false,
        );
    }

    #[test]
    fn secrets_alone_are_kept_and_told() {
        let check = |old: &str, new: &str, expected: &[&str]| {
            let [old, new] = [old, new].map(|more| {
                let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{more}\n");
                check::parse(&text, &|_| None).unwrap()
            });
            let mut kept = new.clone();
            assert_eq!(keep_secrets(&old, &mut kept), expected, "{new:?}");
            let is_taken = is_kept(&old, &kept).is_ok();
            assert_eq!(is_taken, !expected.is_empty(), "{new:?}");
        };
        let redis = |more: &str| format!("redis: {{urls: redis://h, {more}}}");
        check(
            &redis("password: a"),
            &redis("password: b"),
            &["redis.password"],
        );
        check(
            "redis: {urls: 'redis://:a@h'}",
            &redis("password: b"),
            &["redis.password"],
        );
        let own = |password: &str| {
            redis(&format!(
                "sessions: {{urls: redis://i, password: {password}}}"
            ))
        };
        check(&own("a"), &own("b"), &["redis.sessions.password"]);
        check(&redis("password: a"), "redis: {urls: redis://h}", &[]);
        let other_user = redis("username: ann, password: a");
        check(&redis("password: a"), &other_user, &[]);
        let key = |key: &str| format!("audit: {{integrity: {{key: {key}}}}}");
        check(
            &key("a-key-of-the-audit-that-is-long-enough"),
            &key("another-of-the-audit-that-is-long-enough"),
            &["audit.integrity.key"],
        );
        let postgres = |write: &str, read: &str| {
            format!(
                "redis: {{urls: redis://h}}\naudit: {{}}\npostgres: {{write: '{write}', read: '{read}'}}"
            )
        };
        check(
            &postgres(
                "postgres://u:a@h/d?sslmode=verify-full",
                "host=h user=u password=a",
            ),
            &postgres(
                "postgres://u:b@h/d?sslmode=verify-full",
                "host=h user=u password=b",
            ),
            &["postgres.write", "postgres.read[0]"],
        );
        check(
            &postgres("postgres://u:a@h/d", "host=h"),
            &postgres("postgres://u:b@i/d", "host=h"),
            &[],
        );
    }

    #[test]
    fn a_running_process_does_not_change_how_it_audits() {
        let beside = "redis: {urls: redis://a}\naudit: {}\n";
        let postgres = |url: &str| format!("{beside}postgres: {{write: '{url}'}}");
        for (old, new, expected) in [
            (beside, &*postgres("host=a"), "postgres changed"),
            (
                &*postgres("host=a"),
                &*postgres("host=b"),
                "postgres changed",
            ),
            ("", "worker: {group: a}", "worker changed"),
            ("audit: {}", "", "audit began, ended"),
            ("audit: {}", "audit: {delivery: guaranteed}", "its delivery"),
            ("audit: {}", "audit: {stream: {shards: 2}}", "stream"),
            ("audit: {}", "audit: {spool: {max: 1GiB}}", "spool"),
        ] {
            let said = said(old, new).unwrap();
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(said("audit: {}", "audit: {level: none}"), None);
        assert_eq!(said(&postgres("host=a"), &postgres("host=a")), None);
    }
}
