//! What a running process goes by from its start to its end: a reload that asks for another is refused.

use crate::config::Config;

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
            old.log == new.log,
            "telemetry.log changed: restart weir to log otherwise",
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
