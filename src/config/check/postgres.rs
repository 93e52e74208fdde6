//! Postgres, from the file as written to [`Postgres`]. No message shows a URL, since it may hold a password. What a URL says in
//! full only the client knows; here it is told from what cannot be one.

use std::time::Duration;

use super::values::{MASKED, is_mask};
use super::{Checker, SECOND};
use crate::config::Secret;
use crate::config::postgres::Postgres;
use crate::config::raw;
use crate::config::yaml::{At, OneOrMany, told};

/// Of each pool: more than a server has.
const MOST_CONNECTIONS: u64 = 10_000;
const TIMEOUT: Duration = Duration::from_secs(2);

impl Checker {
    /// `has_audit`: whether the file has one, right or wrong.
    pub(super) fn postgres(&mut self, at: At<raw::Postgres>, has_audit: bool) -> Option<Postgres> {
        let needs = [
            (
                "redis",
                self.has_redis,
                "redis: {urls: redis://127.0.0.1:6379}",
            ),
            ("audit", has_audit, "audit: {}"),
        ];
        for (key, is_there, mend) in needs {
            if !is_there {
                let message = format!(
                    "the audit comes here through redis, and the file has no \"{key}\": add \"{mend}\", or leave \"postgres\" out"
                );
                self.say_of_file(&at.place, message);
            }
        }
        let raw = at.value?;
        let write = self.read(raw.write, address);
        let read = told(raw.read).map(OneOrMany::list).unwrap_or_default();
        let pool = told(raw.pool).unwrap_or_default();
        let read = self.each(read, address);
        Some(Postgres {
            write: write?,
            read,
            write_pool: self.count_within(pool.write, 40, 1..=MOST_CONNECTIONS),
            read_pool: self.count_within(pool.read, 60, 1..=MOST_CONNECTIONS),
            timeout: self.time_within(pool.timeout, TIMEOUT, 60 * SECOND),
            migrate: told(raw.migrate).unwrap_or(true),
            tls: self.tls(told(raw.tls).unwrap_or_default()),
        })
    }
}

/// `postgres://…`, `postgresql://…`, or `key=value` words.
fn address(text: &str) -> Result<Secret, String> {
    let behind = ["postgres://", "postgresql://"]
        .into_iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    let is_one = match behind {
        Some(rest) => !rest.is_empty() && !rest.contains(char::is_whitespace),
        None => has_words(text),
    };
    // As the whole behind the scheme, or as the user, the password or a word's value.
    let mut parts = text.split(|c: char| c.is_whitespace() || "/:@=?&'".contains(c));
    match is_one {
        true if parts.any(is_mask) => Err(MASKED.to_owned()),
        true => Ok(Secret(text.to_owned())),
        false => Err(
            "not an address of Postgres: use postgres://USER:PASSWORD@HOST:PORT/DATABASE or \"host=HOST dbname=DATABASE\""
                .to_owned(),
        ),
    }
}

/// Whether `text` is `key=value` words, one at least; a value with white space stands in single quotes, and a backslash is
/// before what stands for itself.
fn has_words(text: &str) -> bool {
    let mut rest = text.trim_start();
    let mut any = false;
    while !rest.is_empty() {
        let Some((key, value)) = rest.split_once('=') else {
            return false;
        };
        let key = key.trim_end();
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
            return false;
        }
        let value = value.trim_start();
        let (value, is_quoted) = match value.strip_prefix('\'') {
            Some(quoted) => (quoted, true),
            None => (value, false),
        };
        let mut is_escaped = false;
        let end = value.find(|c: char| {
            let is_end = !is_escaped
                && if is_quoted {
                    c == '\''
                } else {
                    c.is_whitespace()
                };
            is_escaped = !is_escaped && c == '\\';
            is_end
        });
        rest = match end {
            Some(end) if is_quoted => &value[end + 1..],
            Some(end) => &value[end..],
            None if is_quoted => return false,
            None => "",
        };
        rest = rest.trim_start();
        any = true;
    }
    any
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;
    use crate::config::redis::Tls;

    const BESIDE: &str = "listen: 127.0.0.1:1\nupstream: http://x:1\n";
    const NEEDED: &str = "redis: {urls: redis://a}\naudit: {}\n";

    fn read(text: &str) -> Result<Option<Postgres>, String> {
        fixture::read(&format!("{BESIDE}{text}\n"))
            .map(|config| config.postgres)
            .map_err(|said| said.join("\n"))
    }

    fn postgres(postgres: &str) -> Result<Option<Postgres>, String> {
        read(&format!("{NEEDED}postgres: {postgres}"))
    }

    #[test]
    fn a_url_in_the_place_of_keys_is_not_shown() {
        for file in [
            "postgres: 'postgres://ann:SECRET@h/weir'",
            "redis: 'redis://:SECRET@h'",
            "redis: {urls: redis://h, sessions: 'redis://:SECRET@h'}",
            "redis: {urls: redis://h, tls: SECRET}",
            "audit: {integrity: SECRET}",
            "sessions: SECRET",
        ] {
            let said = read(file).unwrap_err();
            assert!(said.contains("a text stands where "), "{said}");
            assert!(!said.contains("SECRET"), "{said}");
        }
    }

    #[test]
    fn one_url_is_enough() {
        assert_eq!(read(NEEDED).unwrap(), None);
        let read = postgres("{write: 'postgres://ann:b@h/weir'}").unwrap();
        assert_eq!(
            read.unwrap(),
            Postgres {
                write: Secret("postgres://ann:b@h/weir".to_owned()),
                read: Vec::new(),
                write_pool: 40,
                read_pool: 60,
                timeout: 2 * SECOND,
                migrate: true,
                tls: Tls::default(),
            }
        );
    }

    #[test]
    fn an_address_is_a_url_or_words() {
        for good in [
            "postgresql://h",
            "postgres:///weir?host=/run/postgresql",
            "postgres://u:p@a:1,b:2/weir?sslmode=require",
            "host=h",
            "host = h  dbname=weir password='a b=c'",
            "host=h password='it\\'s' user=ann",
            "host=h password=a\\ b",
            "password='' host=h",
        ] {
            assert_eq!(address(good), Ok(Secret(good.to_owned())), "{good}");
        }
        for bad in [
            "",
            " ",
            "postgres://",
            "postgres://h/a b",
            "mysql://h",
            "h:5432",
            "weir",
            "host",
            "host=h dbname",
            "=h",
            "Host=h",
            "host=h password='a",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn replicas_are_a_text_or_a_list() {
        let read = |read: &str| {
            let read = postgres(&format!("{{write: 'host=a', read: {read}}}")).unwrap();
            read.unwrap()
                .read
                .into_iter()
                .map(|url| url.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(read("[]"), Vec::<String>::new());
        assert_eq!(read("'host=b'"), ["host=b"]);
        assert_eq!(read("['host=b', 'host=c']"), ["host=b", "host=c"]);
    }

    #[test]
    fn mistakes_name_their_mend_and_never_the_address() {
        let check = |text: &str, part: &str| {
            let said = postgres(text).unwrap_err();
            assert!(said.contains(part), "{said}");
            assert!(!said.contains("hunter"), "{said}");
        };
        check("{}", "\"write\" is missing");
        check(
            "{write: 'postgre://ann:hunter2@h'}",
            "postgres.write: not an address of Postgres: use postgres://",
        );
        check(
            "{write: 'host=a', read: ['host=b', 'h hunter2']}",
            "postgres.read[1]: not an address",
        );
        check(
            "{write: 'host=a', pool: {write: 0}}",
            "postgres.pool.write: 0 is out of bounds: use 1 to 10000, for example 40",
        );
        check("{write: 'host=a', pool: {read: 10001}}", "for example 60");
        check(
            "{write: 'host=a', pool: {timeout: 0s}}",
            "postgres.pool.timeout: 0s is out of bounds: use 1ms to 1m, for example 2s",
        );
        check(
            "{write: 'host=a', tls: {ca: ''}}",
            "postgres.tls.ca: an empty",
        );
        check(
            "{write: 'host=a', tls: {certificate: {cert: /a}}}",
            "\"key\" is missing",
        );
    }

    #[test]
    fn the_audit_comes_through_redis() {
        let said = read("postgres: {write: 'host=a'}").unwrap_err();
        assert!(
            said.contains("no \"redis\": add \"redis: {urls: "),
            "{said}"
        );
        assert!(said.contains("no \"audit\": add \"audit: {}\""), "{said}");
        let said = read("postgres: {write: 'host=a'}\nredis: {urls: redis://a}").unwrap_err();
        assert!(!said.contains("no \"redis\""), "{said}");
    }
}
