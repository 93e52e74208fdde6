//! From the file as written to a [`Config`]: names resolved, defaults filled in, every mistake told at once.

mod audit;
mod breakers;
pub mod limits;
mod sessions;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use crate::config::audit::Level;
use crate::config::breakers::CircuitBreaker;
use crate::config::limits::Mode;
use crate::config::matches::{HostMatch, Match, PathMatch};
use crate::config::raw::{self, Lanes};
use crate::config::units::{ByteSize, Span};
use crate::config::yaml::{self, At, Lookup, Mistake};
use crate::config::{Admin, Config, LimitDefaults, Listener, Log, Route, Secret, Upstream};
use crate::http1::head::HeadLimits;
use crate::http1::path;

const SECOND: Duration = Duration::from_secs(1);
/// The name of the upstream that the short form makes.
const SHORT_UPSTREAM: &str = "upstream";

/// Reads the text of a file; `lookup` gives environment variables.
pub fn parse(text: &str, lookup: Lookup<'_>) -> Result<Config, Vec<Mistake>> {
    let file: raw::File = yaml::parse(text, lookup)?;
    let mut checker = Checker::default();
    let config = checker.file(file);
    if checker.mistakes.is_empty() {
        return Ok(config);
    }
    checker
        .mistakes
        .sort_by_key(|mistake| (mistake.line, mistake.column));
    Err(checker.mistakes)
}

#[derive(Default)]
struct Checker {
    mistakes: Vec<Mistake>,
    /// The index of each upstream in the configuration.
    upstreams: BTreeMap<String, usize>,
    /// The index of each limit.
    limits: BTreeMap<String, usize>,
    /// How many windows of each limit one request can meet; many routes ask.
    most_rules: Vec<usize>,
    /// The names of the limits that count by the session, by index.
    of_session: BTreeMap<usize, String>,
    breakers: BTreeMap<String, CircuitBreaker>,
    /// Of routes that do not say; `None` where the file has no audit.
    audit_level: Option<Level>,
    /// The index of each entry of `sessions`.
    sessions: BTreeMap<String, usize>,
}

impl Checker {
    fn file(&mut self, file: raw::File) -> Config {
        if let Some(At {
            value: Some(version),
            line,
            column,
        }) = file.version
            && version != 1
        {
            self.say(
                "version",
                line,
                column,
                format!("version {version} is not known: use 1"),
            );
        }
        self.breakers(file.circuit_breakers);
        let upstreams = self.upstreams(file.upstream, file.upstreams);
        let listeners = self.listeners(file.listen, file.listeners);
        let (limits, on_every_route) = self.limits(file.rate_limit, file.rate_limits);
        let sessions = self.sessions(file.sessions);
        let audit = file
            .audit
            .and_then(|at| at.value)
            .map(|raw| self.audit(raw));
        self.audit_level = audit.as_ref().map(|audit| audit.level);
        let routes = self.routes(file.routes, upstreams.len(), &on_every_route);
        let limit_defaults = limit_defaults(file.rate_limit_defaults.and_then(|at| at.value));
        let lanes = file
            .runtime
            .and_then(|at| at.value?.lanes)
            .and_then(|at| match at.value? {
                Lanes::Count(count) => Some(count),
                Lanes::Auto(raw::Auto::Auto) => None,
            });
        let (propagation_delay, drain) = file
            .shutdown
            .and_then(|at| at.value)
            .map_or((None, None), |raw| (raw.propagation_delay, raw.drain));
        let (propagation_delay, drain) = (
            span(propagation_delay, Duration::ZERO),
            span(drain, 25 * SECOND),
        );
        let admin = self.admin(file.admin.and_then(|at| at.value));
        let (metrics_address, max_series) = match file.metrics.and_then(|at| at.value) {
            Some(raw) => (
                raw.address.map(|at| self.address("metrics.address", at)),
                raw.max_series
                    .and_then(|at| at.value)
                    .map_or(2_000, |series| series as usize),
            ),
            None => (None, 2_000),
        };
        Config {
            log: log(file.telemetry),
            admin,
            metrics_address,
            max_series,
            listeners,
            upstreams,
            routes,
            limits,
            limit_defaults,
            sessions,
            audit,
            lanes,
            propagation_delay,
            drain,
        }
    }

    fn listeners(
        &mut self,
        short: Option<At<String>>,
        long: Option<At<Vec<At<raw::Listener>>>>,
    ) -> Vec<Listener> {
        let mut listeners = Vec::new();
        if let Some(at) = short {
            let address = self.address("listen", at);
            listeners.push(listener(
                "inbound".to_owned(),
                address,
                Vec::new(),
                None,
                None,
            ));
        }
        for (index, at) in long
            .and_then(|at| at.value)
            .unwrap_or_default()
            .into_iter()
            .enumerate()
        {
            let Some(raw) = at.value else { continue };
            let address = self.address(&format!("listeners[{index}].address"), raw.address);
            let name = raw
                .name
                .and_then(|at| at.value)
                .unwrap_or_else(|| format!("listener-{index}"));
            if listeners.iter().any(|other: &Listener| other.name == name) {
                let message =
                    format!("name \"{name}\" is taken by an earlier listener: use another");
                self.say(
                    &format!("listeners[{index}].name"),
                    at.line,
                    at.column,
                    message,
                );
            }
            let (limits, timeouts) = (
                raw.limits.and_then(|at| at.value),
                raw.timeouts.and_then(|at| at.value),
            );
            let path = format!("listeners[{index}].client_ip.trusted_proxies");
            let trusted = raw
                .client_ip
                .and_then(|at| at.value)
                .map(|raw| self.networks(&path, raw.trusted_proxies));
            listeners.push(listener(
                name,
                address,
                trusted.unwrap_or_default(),
                limits,
                timeouts,
            ));
        }
        if listeners.is_empty() {
            self.say(
                "listen",
                1,
                1,
                "no listener: add \"listen: 0.0.0.0:8080\"".to_owned(),
            );
        }
        listeners
    }

    fn admin(&mut self, raw: Option<raw::Admin>) -> Admin {
        let (address, token) = raw.map_or((None, None), |raw| (raw.address, raw.token));
        let token = token.and_then(|at| {
            self.read("admin.token", at, |text| match text {
                "" => {
                    Err("an empty token guards nothing: set one, or leave the key out".to_owned())
                }
                token => Ok(Secret(token.to_owned())),
            })
        });
        let Some(at) = address else {
            return Admin {
                address: SocketAddr::from(([127, 0, 0, 1], 9901)),
                token,
            };
        };
        let (line, column) = (at.line, at.column);
        let address = self.address("admin.address", at);
        if !address.ip().is_loopback() && token.is_none() {
            let message =
                "an address that others reach needs admin.token: set one, or use 127.0.0.1"
                    .to_owned();
            self.say("admin.address", line, column, message);
        }
        Admin { address, token }
    }

    fn networks(&mut self, path: &str, list: Vec<At<String>>) -> Vec<IpNet> {
        let network = |text: &str| {
            let alone = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse::<IpNet>()
                .or_else(|_| alone())
                .map_err(|_| format!("\"{text}\" is not a network: use an address or a prefix, for example 10.0.0.0/8"))
        };
        list.into_iter()
            .enumerate()
            .filter_map(|(index, at)| self.read(&format!("{path}[{index}]"), at, network))
            .collect()
    }

    fn address(&mut self, path: &str, at: At<String>) -> SocketAddr {
        let unusable = SocketAddr::from(([0, 0, 0, 0], 0));
        let Some(text) = at.value else {
            return unusable;
        };
        text.parse().unwrap_or_else(|_| {
            let message =
                format!("\"{text}\" is not an address: use IP:PORT, for example 0.0.0.0:8080");
            self.say(path, at.line, at.column, message);
            unusable
        })
    }

    fn upstreams(
        &mut self,
        short: Option<At<String>>,
        long: BTreeMap<String, At<raw::Upstream>>,
    ) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        if let Some(at) = short {
            let endpoint = self.endpoint("upstream", at);
            upstreams.push(upstream(
                SHORT_UPSTREAM.to_owned(),
                endpoint,
                None,
                None,
                None,
            ));
        }
        for (name, at) in long {
            let Some(raw) = at.value else { continue };
            let path = format!("upstreams.{name}.endpoints");
            let (line, column) = (raw.endpoints.line, raw.endpoints.column);
            let mut endpoints = raw.endpoints.value.unwrap_or_default();
            let endpoint = match endpoints.len() {
                1 => self.endpoint(&format!("{path}[0]"), endpoints.remove(0)),
                0 => {
                    self.say(
                        &path,
                        line,
                        column,
                        "no endpoint: add one, for example \"http://127.0.0.1:3000\"".into(),
                    );
                    String::new()
                }
                _ => {
                    self.say(
                        &path,
                        line,
                        column,
                        "several endpoints are not supported yet: keep one".into(),
                    );
                    String::new()
                }
            };
            let idle_timeout = raw.idle_timeout;
            let trusts = raw
                .trust_session_headers
                .and_then(|at| at.value)
                .unwrap_or(false);
            let path = format!("upstreams.{name}.circuit_breaker");
            let breaker = raw
                .circuit_breaker
                .and_then(|at| self.breaker_named(&path, at));
            upstreams.push(upstream(
                name,
                endpoint,
                raw.connect_timeout,
                raw.timeout,
                breaker,
            ));
            if let Some(last) = upstreams.last_mut() {
                last.trust_session_headers = trusts;
                last.idle_timeout = span(idle_timeout, 60 * SECOND);
            }
        }
        if upstreams.is_empty() {
            self.say(
                "upstream",
                1,
                1,
                "no upstream: add \"upstream: http://127.0.0.1:3000\"".to_owned(),
            );
        }
        self.upstreams = upstreams
            .iter()
            .enumerate()
            .map(|(index, up)| (up.name.clone(), index))
            .collect();
        upstreams
    }

    /// `http://HOST:PORT`, the port 80 when there is none, as `HOST:PORT`.
    fn endpoint(&mut self, path: &str, at: At<String>) -> String {
        let Some(text) = at.value else {
            return String::new();
        };
        let authority = text
            .strip_prefix("http://")
            .map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        match authority {
            Some(authority)
                if !authority.is_empty() && !authority.contains(['/', '?', '#', '@', ' ']) =>
            {
                let behind_literal = authority.rfind(']').map_or(0, |bracket| bracket + 1);
                match authority[behind_literal..].split_once(':') {
                    None => return format!("{authority}:80"),
                    Some((_, port)) if port.parse::<u16>().is_ok_and(|port| port > 0) => {
                        return authority.to_owned();
                    }
                    Some(_) => {}
                }
            }
            Some(_) | None => {}
        }
        let message = format!(
            "\"{text}\" is not an endpoint: use http://HOST:PORT, for example http://127.0.0.1:3000"
        );
        self.say(path, at.line, at.column, message);
        String::new()
    }

    fn routes(
        &mut self,
        routes: Option<Vec<At<raw::Route>>>,
        upstreams: usize,
        on_every_route: &[usize],
    ) -> Vec<Route> {
        let Some(routes) = routes else {
            if upstreams > 1 {
                self.say(
                    "routes",
                    1,
                    1,
                    "several upstreams need \"routes\" to say which serves what".to_owned(),
                );
            }
            let on_it = on_every_route.to_vec();
            let (limits, session_limits) = self.part_limits("rate_limit", (1, 1), on_it, false);
            return vec![Route {
                matches: Match::default(),
                upstream: 0,
                limits,
                session_limits,
                session: None,
                audit: self.audit_level.unwrap_or(Level::None),
                timeout: None,
            }];
        };
        let mut checked = Vec::with_capacity(routes.len());
        for (index, at) in routes.into_iter().enumerate() {
            let Some(raw) = at.value else { continue };
            let path = format!("routes[{index}]");
            let upstream = self.upstream_named(&format!("{path}.upstream"), raw.upstream);
            let matches = raw
                .matches
                .and_then(|at| at.value)
                .map(|raw| self.matches(&format!("{path}.match"), raw));
            let timeout = raw.timeout.and_then(|at| at.value).map(|span| span.0);
            let session = raw
                .session
                .and_then(|at| self.route_session(&format!("{path}.session"), at));
            let mut limits = on_every_route.to_vec();
            let limits_path = format!("{path}.rate_limits");
            limits.extend(self.limits_named(&limits_path, raw.rate_limits));
            let (limits, session_limits) = self.part_limits(
                &limits_path,
                (at.line, at.column),
                limits,
                session.is_some(),
            );
            let audit = self.route_level(&path, raw.audit);
            checked.push(Route {
                audit,
                limits,
                session_limits,
                session,
                matches: matches.unwrap_or_default(),
                upstream,
                timeout,
            });
        }
        checked
    }

    fn upstream_named(&mut self, path: &str, at: At<String>) -> usize {
        let Some(name) = at.value else { return 0 };
        if let Some(index) = self.upstreams.get(&name) {
            return *index;
        }
        let known = self
            .upstreams
            .keys()
            .map(String::as_str)
            .collect::<Vec<_>>();
        let mend = yaml::did_you_mean(&name, &known);
        self.say(
            path,
            at.line,
            at.column,
            format!("unknown upstream \"{name}\"; {mend}"),
        );
        0
    }

    fn matches(&mut self, path: &str, raw: raw::Match) -> Match {
        let host = raw
            .host
            .and_then(|at| self.read(&format!("{path}.host"), at, HostMatch::parse));
        let pattern = raw
            .path
            .and_then(|at| self.read(&format!("{path}.path"), at, path_pattern));
        let methods = raw
            .methods
            .into_iter()
            .enumerate()
            .filter_map(|(index, at)| {
                self.read(&format!("{path}.methods[{index}]"), at, |text| {
                    match text.bytes().all(|b| b.is_ascii_uppercase()) {
                        true if !text.is_empty() => Ok(text.to_owned()),
                        _ => Err(format!(
                            "\"{text}\" is not a method: use capital letters, for example GET"
                        )),
                    }
                })
            });
        let methods = methods.collect();
        let headers = raw
            .headers
            .into_iter()
            .filter_map(|(name, at)| Some((name.to_ascii_lowercase(), at.value?)));
        Match {
            host,
            path: pattern,
            methods,
            headers: headers.collect(),
        }
    }

    fn read<T>(
        &mut self,
        path: &str,
        at: At<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = at.value?;
        read(&text)
            .map_err(|message| self.say(path, at.line, at.column, message))
            .ok()
    }

    fn say(&mut self, path: &str, line: u64, column: u64, message: String) {
        self.mistakes.push(Mistake {
            path: path.to_owned(),
            line,
            column,
            message,
        });
    }
}

/// A pattern that is not in normal form would never match, since requests are matched in theirs.
fn path_pattern(text: &str) -> Result<PathMatch, String> {
    let pattern = PathMatch::parse(text)?;
    let plain = text.strip_suffix('*').unwrap_or(text);
    match path::normalise(plain.as_bytes()) {
        Ok(normal) if *normal == *plain.as_bytes() => Ok(pattern),
        Ok(normal) => Err(format!(
            "path would never match: use its normal form, \"{}\"",
            String::from_utf8_lossy(&normal)
        )),
        Err(error) => Err(format!("{error}: such a request is refused")),
    }
}

fn listener(
    name: String,
    address: SocketAddr,
    trusted_proxies: Vec<IpNet>,
    limits: Option<raw::Limits>,
    timeouts: Option<raw::Timeouts>,
) -> Listener {
    let (max_connections, max_header_bytes, max_headers, max_body) =
        limits.map_or((None, None, None, None), |raw| {
            (
                raw.max_connections,
                raw.max_header_bytes,
                raw.max_headers,
                raw.max_body,
            )
        });
    let (header_read, request_read, keep_alive, stream_idle) =
        timeouts.map_or((None, None, None, None), |raw| {
            (
                raw.header_read,
                raw.request_read,
                raw.keep_alive,
                raw.stream_idle,
            )
        });
    let size = |at: Option<At<ByteSize>>, default: u64| {
        at.and_then(|at| at.value).map_or(default, |size| size.0)
    };
    let defaults = HeadLimits::default();
    Listener {
        name,
        address,
        head_limits: HeadLimits {
            max_bytes: usize::try_from(size(max_header_bytes, defaults.max_bytes as u64))
                .unwrap_or(usize::MAX),
            max_fields: max_headers
                .and_then(|at| at.value)
                .map_or(defaults.max_fields, usize::from),
        },
        max_connections: max_connections
            .and_then(|at| at.value)
            .map_or(10_000, |max| max as usize),
        max_body: size(max_body, 10 << 20),
        header_read: span(header_read, 10 * SECOND),
        request_read: span(request_read, 60 * SECOND),
        keep_alive: span(keep_alive, 60 * SECOND),
        stream_idle: span(stream_idle, 300 * SECOND),
        trusted_proxies,
    }
}

fn upstream(
    name: String,
    endpoint: String,
    connect: Option<At<Span>>,
    timeout: Option<At<Span>>,
    circuit_breaker: Option<CircuitBreaker>,
) -> Upstream {
    Upstream {
        circuit_breaker,
        name,
        endpoint,
        connect_timeout: span(connect, SECOND),
        timeout: span(timeout, 15 * SECOND),
        idle_timeout: 60 * SECOND,
        trust_session_headers: false,
    }
}

fn mode(at: Option<At<raw::Mode>>) -> Mode {
    match at.and_then(|at| at.value).unwrap_or(raw::Mode::Enforce) {
        raw::Mode::Enforce => Mode::Enforce,
        raw::Mode::Shadow => Mode::Shadow,
        raw::Mode::Disabled => Mode::Disabled,
    }
}

fn log(raw: Option<At<raw::Telemetry>>) -> Log {
    let raw = raw
        .and_then(|at| at.value?.log)
        .and_then(|at| at.value)
        .map_or((None, None), |raw| (raw.format, raw.level));
    Log {
        format: raw.0.and_then(|at| at.value).unwrap_or_default(),
        level: raw.1.and_then(|at| at.value).unwrap_or_default(),
    }
}

fn limit_defaults(raw: Option<raw::RateLimitDefaults>) -> LimitDefaults {
    let (max_keys, retry_after, headers) = raw.map_or((None, None, None), |raw| {
        (raw.max_keys, raw.retry_after, raw.headers)
    });
    let jitter = retry_after.and_then(|at| at.value?.jitter);
    let headers = headers
        .and_then(|at| at.value)
        .map(|list| list.into_iter().filter_map(|at| at.value).collect());
    let headers: Vec<_> = headers.unwrap_or_else(|| vec![raw::LimitHeaders::Standard]);
    LimitDefaults {
        max_keys: max_keys
            .and_then(|at| at.value)
            .map_or(1_000_000, |keys| keys as usize),
        retry_jitter: jitter
            .and_then(|at| at.value)
            .map_or(0.1, |percent| percent.0),
        standard_headers: headers.contains(&raw::LimitHeaders::Standard),
        legacy_headers: headers.contains(&raw::LimitHeaders::Legacy),
    }
}

fn span(at: Option<At<Span>>, default: Duration) -> Duration {
    at.and_then(|at| at.value).map_or(default, |span| span.0)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn read(text: &str) -> Result<Config, Vec<String>> {
        parse(text, &|_| None).map_err(|mistakes| mistakes.iter().map(Mistake::to_string).collect())
    }

    #[test]
    fn the_short_form_makes_one_of_each() {
        let config = read("listen: 127.0.0.1:8080\nupstream: http://app\n").unwrap();
        assert_eq!(
            config.listeners[0].address,
            "127.0.0.1:8080".parse().unwrap()
        );
        assert_eq!(config.listeners[0].max_body, 10 << 20);
        assert_eq!(config.upstreams[0].endpoint, "app:80");
        assert_eq!(
            config.routes,
            [Route {
                matches: Match::default(),
                upstream: 0,
                limits: Vec::new(),
                session_limits: Vec::new(),
                session: None,
                audit: Level::None,
                timeout: None
            }]
        );
        assert_eq!((config.lanes, config.drain), (None, 25 * SECOND));
    }

    #[test]
    fn the_long_form_is_read_whole() {
        let config = read(
            "version: 1\nlisteners:\n  - {name: in, address: '[::1]:80', limits: {max_headers: 5}, timeouts: {keep_alive: 1m}}\n\
             upstreams:\n  a: {endpoints: ['http://[::1]:3000/'], timeout: 3s}\n  b: {endpoints: ['http://h:1']}\n\
             routes:\n  - match: {host: '*.x.org', path: /p/*, methods: [POST], headers: {X-A: '1'}}\n    upstream: b\n    timeout: 2s\n\
             runtime: {lanes: 2}\nshutdown: {drain: 3s}\n",
        )
        .unwrap();
        assert_eq!(config.listeners[0].head_limits.max_fields, 5);
        assert_eq!(config.listeners[0].keep_alive, 60 * SECOND);
        assert_eq!(config.upstreams[0].endpoint, "[::1]:3000");
        assert_eq!(
            (config.routes[0].upstream, config.routes[0].timeout),
            (1, Some(2 * SECOND))
        );
        assert_eq!(
            config.routes[0].matches.headers,
            [("x-a".to_owned(), "1".to_owned())]
        );
        assert_eq!(config.lanes.map(usize::from), Some(2));
    }

    #[test]
    fn every_mistake_of_meaning_is_told_in_one_run() {
        let said = read(
            "version: 2\nlisten: nowhere\nupstreams:\n  app: {endpoints: ['https://x']}\n  two: {endpoints: []}\n\
             routes:\n  - {upstream: apq}\n  - {match: {path: /a//b, host: '*', methods: [get]}, upstream: app}\n",
        )
        .unwrap_err();
        for (line, part) in [
            ("line 1, column 10: version: ", "use 1"),
            ("line 2, column 9: listen: ", "use IP:PORT"),
            ("line 4, ", "use http://HOST:PORT"),
            ("line 5, ", "no endpoint"),
            (
                "line 7, column 16: routes[0].upstream: ",
                "unknown upstream \"apq\"; did you mean \"app\"?",
            ),
            ("line 8, ", "use its normal form, \"/a/b\""),
            ("line 8, ", "routes[1].match.host: host must be"),
            ("line 8, ", "\"get\" is not a method"),
        ] {
            assert!(
                said.iter()
                    .any(|mistake| mistake.starts_with(line) && mistake.contains(part)),
                "{part}: {said:#?}"
            );
        }
        assert_eq!(said.len(), 8, "{said:#?}");
    }

    #[test]
    fn an_empty_file_says_what_it_needs() {
        assert_eq!(read("version: 1\n").unwrap_err().len(), 2);
    }

    #[test]
    fn ten_thousand_routes_are_checked_in_seconds_even_unoptimised() {
        let mut text =
            "listen: 0.0.0.0:1\nupstreams: {app: {endpoints: ['http://x:1']}}\nroutes:\n"
                .to_owned();
        for index in 0..10_000 {
            text.push_str(&format!(
                "  - {{match: {{path: /r{index}/*}}, upstream: app}}\n"
            ));
        }
        #[expect(clippy::disallowed_methods, reason = "a bound on time")]
        let start = Instant::now();
        assert_eq!(read(&text).unwrap().routes.len(), 10_000);
        assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
    }
}
