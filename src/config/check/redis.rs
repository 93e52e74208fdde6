//! Redis, from the file as written to [`Redis`]. No message shows a URL, since it may hold a password.

use std::net::Ipv6Addr;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::values::{MASKED, is_mask, key_prefix, not_empty, secret};
use super::{Checker, SECOND};
use crate::config::Secret;
use crate::config::raw::{self, RedisMode};
use crate::config::redis::{Client, Endpoint, Mode, Redis, Tls};
use crate::config::tls::Holds;
use crate::config::yaml::{At, OneOrMany, Position, told};

const MILLISECOND: Duration = Duration::from_millis(1);

/// A URL's parts.
#[derive(Debug, PartialEq, Eq)]
struct Url {
    tls: bool,
    host: String,
    port: Option<u16>,
    database: u32,
    login: Login,
}

/// Who weir is to a server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Login {
    username: Option<String>,
    password: Option<Secret>,
}

impl Checker {
    pub(super) fn redis(&mut self, at: At<raw::Redis>) -> Option<Redis> {
        let raw = at.value?;
        let main = raw::RedisClient {
            urls: Some(raw.urls),
            mode: raw.mode,
            master_name: raw.master_name,
            username: raw.username,
            password: raw.password,
        };
        let main = self.redis_client(main, &at.place);
        let rate_limit = raw.rate_limit.and_then(|at| self.own_client(at));
        let sessions = raw.sessions.and_then(|at| self.own_client(at));
        let key_prefix = raw
            .key_prefix
            .map_or(Some("weir".to_owned()), |at| self.read(at, key_prefix));
        let timeout = self.time_within(raw.timeout, 20 * MILLISECOND, 10 * SECOND);
        let connect_timeout = self.time_within(raw.connect_timeout, 500 * MILLISECOND, 60 * SECOND);
        let uses_tls = [&main, &rate_limit, &sessions]
            .into_iter()
            .flatten()
            .any(|client| client.tls);
        let tls = raw.tls.map_or(Tls::default(), |at| {
            if !uses_tls && main.is_some() {
                let message =
                    "no URL uses TLS: write rediss:// in place of redis://, or leave this out";
                self.say(&at.place, message);
            }
            at.value.map_or(Tls::default(), |raw| self.tls(raw))
        });
        Some(Redis {
            main: main?,
            rate_limit,
            sessions,
            key_prefix: key_prefix?,
            timeout,
            connect_timeout,
            tls,
        })
    }

    /// A client beside the main one; `None` for one without URLs of its own.
    fn own_client(&mut self, at: At<raw::RedisClient>) -> Option<Client> {
        let (raw, place) = at.told()?;
        let has_urls = raw
            .urls
            .as_ref()
            .is_some_and(|at| at.value.as_ref().is_none_or(|urls| !urls.is_empty()));
        if has_urls {
            return self.redis_client(raw, &place);
        }
        let told = [
            ("mode", raw.mode.map(|at| at.place)),
            ("master_name", raw.master_name.map(|at| at.place)),
            ("username", raw.username.map(|at| at.place)),
            ("password", raw.password.map(|at| at.place)),
        ];
        for (key, at) in told {
            if let Some(at) = at {
                let path = &place.path;
                let message =
                    format!("{key} is for urls of its own: add {path}.urls, or leave it out");
                self.say(&at, message);
            }
        }
        None
    }

    fn redis_client(&mut self, raw: raw::RedisClient, place: &Position) -> Option<Client> {
        let urls = self.urls(raw.urls?)?;
        let (first, first_at) = urls.first()?;
        let several = urls.len() > 1;
        let default = match several {
            true => RedisMode::Cluster,
            false => RedisMode::Single,
        };
        let mode = told(raw.mode).unwrap_or(default);
        if mode == RedisMode::Single && several {
            let message = "mode single has one URL: keep one, or use mode cluster or sentinel";
            self.say(first_at, message);
        }
        for (url, place) in &urls {
            if mode != RedisMode::Single && url.database != 0 {
                let message = format!("a database is for mode single: leave out /{}", url.database);
                self.say(place, message);
            }
        }
        let master_name = raw.master_name.and_then(|at| {
            if mode != RedisMode::Sentinel {
                let message = "master_name is for mode sentinel: leave it out";
                self.say(&at.place, message);
            }
            self.read(at, not_empty)
        });
        let username = raw.username.and_then(|at| self.read(at, not_empty));
        let has_password = raw.password.is_some();
        let password = raw.password.and_then(|at| {
            let spelt = self.is_spelt(&at);
            self.read(at, |text| {
                not_empty(text).and_then(|text| secret(&text, spelt))
            })
        });
        let mut logins = urls.iter().filter(|(url, _)| url.login != Login::default());
        let login = logins.next().map(|(url, _)| url.login.clone());
        let login = login.unwrap_or_default();
        if let Some((_, place)) = logins.find(|(url, _)| url.login != login) {
            let message = "the URLs have several users or passwords: write one username and password beside them";
            self.say(place, message);
        }
        let username = username.or(login.username);
        let password = password.or(login.password);
        if username.is_some() && password.is_none() && !has_password {
            let message = "a username needs a password: add one, or leave the username out";
            self.say(place, message);
        }
        let port = match mode {
            RedisMode::Sentinel => 26_379,
            RedisMode::Single | RedisMode::Cluster => 6_379,
        };
        let mut endpoints: Vec<Endpoint> = Vec::new();
        for (url, place) in &urls {
            let endpoint = Endpoint {
                host: url.host.clone(),
                port: url.port.unwrap_or(port),
            };
            if endpoints.contains(&endpoint) {
                let message = format!("{endpoint} is named twice: keep one");
                self.say(place, message);
            }
            endpoints.push(endpoint);
        }
        Some(Client {
            endpoints,
            tls: first.tls,
            mode: match mode {
                RedisMode::Single => Mode::Single {
                    database: first.database,
                },
                RedisMode::Sentinel => Mode::Sentinel {
                    master_name: master_name.unwrap_or_else(|| "mymaster".to_owned()),
                },
                RedisMode::Cluster => Mode::Cluster,
            },
            username,
            password,
        })
    }

    /// Each with its line, all of one scheme; `None` once a mistake is told.
    fn urls(&mut self, at: At<OneOrMany<String>>) -> Option<Vec<(Url, Position)>> {
        let texts = at.value?.list();
        if texts.is_empty() {
            let message = "no URL: add one, for example redis://127.0.0.1:6379";
            self.say(&at.place, message);
        }
        let count = texts.len();
        let mut urls = Vec::with_capacity(count);
        for text in texts {
            let place = text.place.named(&at.place.path);
            urls.extend(self.read(text, url).map(|url| (url, place)));
        }
        let (first, _) = urls.first()?;
        if let Some((_, place)) = urls.iter().find(|(url, _)| url.tls != first.tls) {
            let message = "some URLs use TLS and some do not: write redis:// or rediss:// in all";
            self.say(place, message);
        }
        (urls.len() == count).then_some(urls)
    }

    pub(super) fn tls(&mut self, raw: raw::Tls) -> Tls {
        let ca = raw.ca.and_then(|at| self.pem_file(at, Holds::Authorities));
        let certificate = told(raw.certificate).and_then(|raw| self.certificate(raw));
        Tls { ca, certificate }
    }
}

/// `redis://USER:PASSWORD@HOST:PORT/DATABASE`, of which the host alone is needed.
fn url(text: &str) -> Result<Url, String> {
    let bad = || {
        "not a URL of Redis: use redis://HOST:PORT, or rediss://HOST:PORT for TLS, for example redis://127.0.0.1:6379"
            .to_owned()
    };
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let tls = match scheme {
        "redis" => false,
        "rediss" => true,
        "" if !text.starts_with('/') && !text.starts_with("unix:") => return Err(bad()),
        "" | "unix" | "redis+unix" | "redis+socket" => {
            return Err("unix sockets are not supported: use redis://HOST:PORT".to_owned());
        }
        _ => return Err(bad()),
    };
    // A password may hold an @ or a slash that should have been escaped; what stands behind it cannot.
    let (login, rest) = match rest.rsplit_once('@') {
        Some((login, rest)) => (self::login(login)?, rest),
        None => (Login::default(), rest),
    };
    if rest.contains(['?', '#']) {
        return Err("a URL of Redis has no options: write them as keys of the file".to_owned());
    }
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let database = match database {
        "" => 0,
        number => number.parse().map_err(|_| {
            "what stands behind the port is a database, which is a number: use, for example, /0"
                .to_owned()
        })?,
    };
    let (host, port) = match authority.strip_prefix('[') {
        Some(literal) => {
            let (host, port) = literal.split_once(']').ok_or_else(bad)?;
            host.parse::<Ipv6Addr>().map_err(|_| bad())?;
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':').ok_or_else(bad)?),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._:".contains(&b);
    if host.is_empty() || !host.bytes().all(is_name) {
        return Err(bad());
    }
    let number = |port: &str| match port.parse() {
        Ok(port @ 1..) => Ok(port),
        Ok(0) | Err(_) => Err(bad()),
    };
    Ok(Url {
        tls,
        host: host.to_owned(),
        port: port.map(number).transpose()?,
        database,
        login,
    })
}

/// `USER:PASSWORD`, `:PASSWORD` or `USER`, with what needs it escaped.
fn login(text: &str) -> Result<Login, String> {
    let (username, password) = text.split_once(':').unwrap_or((text, ""));
    let part = |part: &str| match percent_decode_str(part).decode_utf8() {
        Ok(part) => Ok(Some(part.into_owned()).filter(|part| !part.is_empty())),
        Err(_) => Err(
            "the user or password in the URL is not UTF-8: write username and password beside urls"
                .to_owned(),
        ),
    };
    if is_mask(username) || is_mask(password) {
        return Err(MASKED.to_owned());
    }
    Ok(Login {
        username: part(username)?,
        password: part(password)?.map(Secret),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;

    fn read(redis: &str) -> Result<Option<Redis>, String> {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x:1\n{redis}\n");
        fixture::read(&text)
            .map(|config| config.redis)
            .map_err(|said| said.join("\n"))
    }

    fn main(redis: &str) -> Client {
        read(&format!("redis: {redis}")).unwrap().unwrap().main
    }

    fn login(username: &str, password: &str) -> (Option<String>, Option<Secret>) {
        let told = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        (told(username), told(password).map(Secret))
    }

    #[test]
    fn state_is_not_shared_unless_the_file_says_redis() {
        assert_eq!(read("").unwrap(), None);
    }

    #[test]
    fn one_url_is_enough() {
        let redis = read("redis: {urls: ['redis://localhost']}")
            .unwrap()
            .unwrap();
        assert_eq!(
            redis,
            Redis {
                main: Client {
                    endpoints: vec![Endpoint {
                        host: "localhost".to_owned(),
                        port: 6_379
                    }],
                    tls: false,
                    mode: Mode::Single { database: 0 },
                    username: None,
                    password: None,
                },
                rate_limit: None,
                sessions: None,
                key_prefix: "weir".to_owned(),
                timeout: 20 * MILLISECOND,
                connect_timeout: 500 * MILLISECOND,
                tls: Tls::default(),
            }
        );
    }

    #[test]
    fn urls_are_read_as_people_write_them() {
        let check = |url: &str, endpoint: &str, database, (username, password)| {
            let client = main(&format!("{{urls: ['{url}']}}"));
            assert_eq!(client.endpoints[0].to_string(), endpoint, "{url}");
            assert_eq!(client.mode, Mode::Single { database }, "{url}");
            assert_eq!((client.username, client.password), (username, password));
        };
        check("redis://h", "h:6379", 0, login("", ""));
        check("rediss://h.svc:1/", "h.svc:1", 0, login("", ""));
        check("redis://10.0.0.1:7/3", "10.0.0.1:7", 3, login("", ""));
        check("redis://[::1]", "[::1]:6379", 0, login("", ""));
        check("redis://[::1]:7/3", "[::1]:7", 3, login("", ""));
        check("redis://:pw@h", "h:6379", 0, login("", "pw"));
        check("redis://ann:p%40:w@h", "h:6379", 0, login("ann", "p@:w"));
        check("redis://ann:p/@?w@h", "h:6379", 0, login("ann", "p/@?w"));
    }

    #[test]
    fn the_mode_follows_the_number_of_urls_unless_told() {
        let check = |redis: &str, mode: Mode| assert_eq!(main(redis).mode, mode, "{redis}");
        let sentinel = |name: &str| Mode::Sentinel {
            master_name: name.to_owned(),
        };
        check("{urls: redis://a}", Mode::Single { database: 0 });
        check("{urls: ['redis://a', 'redis://b']}", Mode::Cluster);
        check("{urls: redis://a, mode: cluster}", Mode::Cluster);
        check("{urls: redis://a, mode: sentinel}", sentinel("mymaster"));
        check(
            "{urls: redis://a, mode: sentinel, master_name: m}",
            sentinel("m"),
        );
        let sentinels = main("{urls: ['redis://a', 'redis://b:1'], mode: sentinel}").endpoints;
        let ports = sentinels.iter().map(|endpoint| endpoint.port);
        assert_eq!(ports.collect::<Vec<_>>(), [26_379, 1]);
    }

    #[test]
    fn a_user_beside_the_urls_goes_before_theirs() {
        let check = |redis: &str, expected| {
            let client = main(redis);
            assert_eq!((client.username, client.password), expected, "{redis}");
        };
        check(
            "{urls: ['redis://ann:a@h'], username: bob, password: b}",
            login("bob", "b"),
        );
        check("{urls: ['redis://ann@h'], password: b}", login("ann", "b"));
        check(
            "{urls: ['redis://h', 'redis://ann:a@i']}",
            login("ann", "a"),
        );
    }

    #[test]
    fn limits_and_sessions_can_be_kept_elsewhere() {
        let redis = read(
            "redis: {urls: ['redis://ann:a@h'], rate_limit: {urls: ['redis://l:1', 'redis://m']}, sessions: {urls: []}}",
        )
        .unwrap()
        .unwrap();
        let limits = redis.for_rate_limits();
        assert_eq!((&limits.mode, limits.endpoints.len()), (&Mode::Cluster, 2));
        assert_eq!((&limits.username, &limits.password), (&None, &None));
        assert_eq!(redis.for_sessions(), &redis.main);
    }

    #[test]
    fn a_wrong_redis_says_the_mend() {
        let check = |redis: &str, part: &str| {
            let said = read(&format!("redis: {redis}")).unwrap_err();
            assert!(said.contains(part), "{redis}: {said}");
        };
        check("{}", "\"urls\" is missing: add it");
        check(
            "{urls: []}",
            "line 3, column 15: redis.urls: no URL: add one",
        );
        check(
            "{urls: [h:1]}",
            "line 3, column 16: redis.urls[0]: not a URL of Redis: use redis://HOST:PORT",
        );
        check("{urls: http://h}", "not a URL of Redis");
        check("{urls: 'redis://'}", "not a URL of Redis");
        check("{urls: 'redis://h:0'}", "not a URL of Redis");
        check("{urls: 'redis://h:70000'}", "not a URL of Redis");
        check("{urls: 'redis://h i'}", "not a URL of Redis");
        check("{urls: 'redis://[::1'}", "not a URL of Redis");
        check("{urls: 'redis://[::z]'}", "not a URL of Redis");
        check("{urls: 'redis://[::1]7'}", "not a URL of Redis");
        check("{urls: /run/redis.sock}", "unix sockets are not supported");
        check("{urls: 'unix:///a'}", "unix sockets are not supported");
        check("{urls: 'redis+unix:///a'}", "unix sockets are not");
        check("{urls: 'redis://h?db=3'}", "has no options");
        check("{urls: redis://h/a}", "is a database, which is a number");
        check("{urls: 'redis://%ff@h'}", "is not UTF-8");
        check(
            "{urls: ['redis://a', 'rediss://b']}",
            "column 29: redis.urls: some URLs use TLS and some do not",
        );
        check(
            "{urls: ['redis://a', 'redis://a:6379']}",
            "a:6379 is named twice",
        );
        check(
            "{urls: ['redis://a', 'redis://b'], mode: single}",
            "mode single has one URL",
        );
        check(
            "{urls: ['redis://a', 'redis://b/3']}",
            "a database is for mode single: leave out /3",
        );
        check("{urls: redis://a, mode: many}", "unknown name \"many\"");
        check(
            "{urls: redis://a, master_name: m}",
            "redis.master_name: master_name is for mode sentinel",
        );
        check(
            "{urls: redis://a, mode: sentinel, master_name: ''}",
            "an empty one says nothing",
        );
        check(
            "{urls: ['redis://ann:a@h', 'redis://bob:b@i']}",
            "several users or passwords",
        );
        check(
            "{urls: redis://a, username: ann}",
            "a username needs a password",
        );
        check(
            "{urls: redis://a, password: ''}",
            "redis.password: an empty",
        );
        check("{urls: redis://a, key_prefix: ''}", "an empty prefix");
        for prefix in ["a{b", "a}", "a b", "a\\tb", "\\x7f"] {
            check(
                &format!("{{urls: redis://a, key_prefix: \"{prefix}\"}}"),
                "redis.key_prefix: a prefix has no braces",
            );
        }
        check(
            "{urls: redis://a, timeout: 0s}",
            "redis.timeout: 0s is out of bounds: use 1ms to 10s, for example 20ms",
        );
        check("{urls: redis://a, timeout: 11s}", "use 1ms to 10s");
        check("{urls: redis://a, connect_timeout: 0s}", "use 1ms to 1m");
        check("{urls: redis://a, tls: {ca: /a}}", "no URL uses TLS");
        check(
            "{urls: rediss://a, tls: {ca: ''}}",
            "redis.tls.ca: an empty",
        );
        check(
            "{urls: rediss://a, tls: {certificate: {cert: /a}}}",
            "\"key\" is missing",
        );
        check(
            "{urls: redis://a, sessions: {urls: ['redis://b', 'rediss://c']}}",
            "redis.sessions.urls: some URLs use TLS",
        );
        check(
            "{urls: redis://a, rate_limit: {password: b}}",
            "redis.rate_limit.password: password is for urls of its own: add redis.rate_limit.urls",
        );
        check("{urls: redis://a, prefix: b}", "unknown key \"prefix\"");
    }

    #[test]
    fn no_mistake_shows_a_password() {
        for redis in [
            "{urls: ['redi://ann:hunter2@h']}",
            "{urls: 'redis://ann:hunter2@h:0'}",
            "{urls: 'redis://:hunter2@h/x'}",
            "{urls: ['redis://:hunter2@h', 'redis://:hunter2@h', 'rediss://:hunter3@i?']}",
            "{urls: redis://a, username: '', password: hunter2}",
        ] {
            let said = read(&format!("redis: {redis}")).unwrap_err();
            assert!(!said.contains("hunter"), "{said}");
        }
    }
}
