//! Upstreams, from the file as written to [`Upstream`]s.

mod retries;
mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::unused::Kind;
use super::values::{share, time};
use super::{Checker, DAY, SECOND};
use crate::config::Protocol;
use crate::config::raw;
use crate::config::tls::UpstreamTls;
use crate::config::units::{Percent, TimeLength};
use crate::config::upstreams::{
    Asks, Balancing, Concurrency, DnsName, HealthCheck, OutlierDetection, SlowStart, Source,
    Upstream,
};
use crate::config::yaml::{self, At, OneOrMany, Position, told};
use crate::http1::head::is_host;
use tls::Security;

/// The name of the upstream that the short form makes.
pub(super) const SHORT_UPSTREAM: &str = "upstream";
/// [`Upstream::panic_threshold`], unless told; Envoy's.
const PANIC_THRESHOLD: f64 = 0.5;
const NO_ENDPOINT: &str = "no endpoint: add one, for example \"http://127.0.0.1:3000\"";

impl Checker {
    pub(super) fn upstreams(
        &mut self,
        short: Option<At<String>>,
        long: BTreeMap<String, At<raw::Upstream>>,
    ) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        if let Some(at) = short {
            let place = at.place.clone();
            let endpoint = self.read(at, tls::url);
            if let Some((source, _)) = &endpoint {
                self.note_endpoint(place, source);
            }
            let is_tls = matches!(endpoint, Some((_, Security::Tls)));
            let endpoints = endpoint.into_iter().map(|(source, _)| source).collect();
            upstreams.push(Upstream {
                tls: is_tls.then(UpstreamTls::default),
                ..plain(SHORT_UPSTREAM.to_owned(), endpoints)
            });
        }
        let has_short = !upstreams.is_empty();
        for (name, at) in long {
            if has_short && name == SHORT_UPSTREAM {
                let message = "\"upstream\" is the name of the upstream that the key upstream makes: take another name, or leave that key out";
                self.say_of_file(&at.place, message);
            }
            if let Some(raw) = at.value {
                let upstream = self.upstream(name, raw);
                upstreams.push(upstream);
            }
        }
        if upstreams.is_empty() && self.needs_upstream {
            let message = "no upstream: add \"upstream: http://127.0.0.1:3000\"";
            self.say(&Position::top("upstream"), message);
        }
        self.upstreams = upstreams
            .iter()
            .enumerate()
            .map(|(index, up)| (up.name.clone(), index))
            .collect();
        upstreams
    }

    fn upstream(&mut self, name: String, raw: raw::Upstream) -> Upstream {
        let endpoints_at = raw.endpoints.place.clone();
        let (endpoints, found) = self.endpoints(raw.endpoints);
        let plain = plain(name, endpoints);
        let tls = self.upstream_tls(raw.tls, &found, &endpoints_at);
        let protocol = raw.protocol.and_then(|at| {
            if at.value == Some(Protocol::Auto) && tls.is_none() {
                let message = "without TLS there is nothing to agree on it by: use http1 or http2, or write https:// in the endpoints";
                self.say(&at.place, message);
            }
            at.value
        });
        let per_try = raw.retries.as_ref().and_then(|at| at.value.as_ref());
        let per_try = per_try.and_then(|retries| retries.per_try_timeout.as_ref());
        let per_try_at = per_try.map(|at| at.place.clone());
        if let Some(at) = &raw.trust_session_headers
            && at.value == Some(true)
        {
            self.trusted.push((plain.name.clone(), at.place.clone()));
        }
        let upstream = Upstream {
            tls,
            protocol: protocol.unwrap_or_default(),
            load_balancing: raw
                .load_balancing
                .and_then(|at| self.balancing(at))
                .unwrap_or(Balancing::LeastRequest),
            connect_timeout: self.timeout(raw.connect_timeout, plain.connect_timeout),
            timeout: self.timeout(raw.timeout, plain.timeout),
            idle_timeout: time(raw.idle_timeout, plain.idle_timeout),
            max_age: self.timeout(raw.max_age, plain.max_age),
            concurrency: told(raw.concurrency).map(|raw| self.concurrency(raw)),
            retries: told(raw.retries).map(|raw| self.retries(raw)),
            health: raw
                .health
                .and_then(|at| self.health_check(at, protocol.unwrap_or_default())),
            outlier_detection: told(raw.outlier_detection).map(|raw| self.outlier_detection(raw)),
            slow_start: told(raw.slow_start).map(|raw| self.slow_start(raw)),
            panic_threshold: share(raw.panic_threshold, PANIC_THRESHOLD),
            circuit_breaker: raw.circuit_breaker.and_then(|at| self.breaker_named(at)),
            trust_session_headers: told(raw.trust_session_headers).unwrap_or(false),
            ..plain
        };
        let retries = upstream.retries.as_ref();
        let per_try = retries.and_then(|retries| retries.per_try_timeout);
        if let (Some(per_try), Some(place)) = (per_try, per_try_at)
            && per_try > upstream.timeout
        {
            let message = format!(
                "{} is longer than the upstream's timeout, {}, which ends all tries: use a shorter one",
                TimeLength(per_try),
                TimeLength(upstream.timeout)
            );
            self.warn(&place, message);
        }
        upstream
    }

    /// With what each says of TLS.
    fn endpoints(&mut self, at: At<OneOrMany<raw::Endpoint>>) -> (Vec<Source>, Vec<Security>) {
        let Some(list) = at.value else {
            return (Vec::new(), Vec::new());
        };
        if list.is_empty() {
            self.say(&at.place, NO_ENDPOINT);
        }
        let (mut sources, mut found) = (Vec::new(), Vec::new());
        for (raw, place) in list.list().into_iter().filter_map(At::told) {
            let source = match raw {
                raw::Endpoint::Url(text) => {
                    let place = place.clone();
                    let value = Some(text);
                    self.read(At { value, place }, tls::url)
                }
                raw::Endpoint::Dns(raw) => {
                    let source = self.dns(raw);
                    source.map(|source| (source, Security::Either))
                }
            };
            let Some((source, security)) = source else {
                continue;
            };
            found.push(security);
            if sources.contains(&source) {
                let message = "this endpoint is in the list already: keep one";
                self.say(&place, message);
            }
            self.note_endpoint(place, &source);
            sources.push(source);
        }
        (sources, found)
    }

    fn note_endpoint(&mut self, place: Position, source: &Source) {
        match source {
            Source::Fixed(at) => self.endpoints.push((place, at.clone())),
            Source::Dns(_) => {}
        }
    }

    fn dns(&mut self, raw: raw::DnsEndpoint) -> Option<Source> {
        let named = self.read(raw.dns, |text| {
            let (name, port) = match split_port(text) {
                Some((name, Some(port))) => (name, port),
                Some((_, None)) | None => return Err(bad_name(text)),
            };
            let fits = |c: char| c.is_ascii_alphanumeric() || ['.', '-', '_'].contains(&c);
            match name.chars().all(fits) {
                true => Ok((name.to_owned(), port)),
                false => Err(bad_name(text)),
            }
        });
        let refresh = self.time_within(raw.refresh, 10 * SECOND, DAY);
        let servers = self.each(told(raw.servers).unwrap_or_default(), |text| {
            let alone = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
            text.parse().or_else(|_| alone()).map_err(|_| {
                format!(
                    "\"{text}\" is not a name server: use IP or IP:PORT, for example 10.96.0.10"
                )
            })
        });
        let (name, port) = named?;
        Some(Source::Dns(DnsName {
            name,
            port,
            refresh,
            servers,
        }))
    }

    fn balancing(&mut self, at: At<raw::LoadBalancing>) -> Option<Balancing> {
        let known = ["round_robin", "least_request", "ring_hash"];
        match at.value? {
            raw::LoadBalancing::Named(name) => {
                match name.as_str() {
                    "round_robin" => Some(Balancing::RoundRobin),
                    "least_request" => Some(Balancing::LeastRequest),
                    other => {
                        let message = match other {
                        "ring_hash" => "ring_hash needs a key: use, for example, {ring_hash: {by: client.ip}}".to_owned(),
                        other => format!("\"{other}\" is not a way to balance; {}", yaml::did_you_mean(other, &known)),
                    };
                        self.say(&at.place, message);
                        None
                    }
                }
            }
            raw::LoadBalancing::Ring(ring) => {
                let by = ring.ring_hash.value?.by;
                let place = by.place.clone();
                let before = self.mistakes.len();
                let parts = self.key_parts(by);
                if parts.is_empty() && self.mistakes.len() == before {
                    let message = "a key of nothing sends every request to one endpoint: use, for example, client.ip";
                    self.say(&place, message);
                }
                Some(Balancing::RingHash(parts))
            }
        }
    }

    fn concurrency(&mut self, raw: raw::Concurrency) -> Concurrency {
        const MOST: u64 = u32::MAX as u64;
        let adaptive = raw.adaptive.is_some();
        let min_at = raw.min.as_ref().map(|at| at.place.clone());
        let least: u32 = self.count_within(raw.min, 5, 1..=MOST);
        let max = self.count_within(raw.max, 1024, 1..=MOST);
        let pending = self.count_within(raw.pending, 128, 0..=MOST);
        let max_connections = self.count_within(raw.max_connections, 1024, 1..=MOST);
        if let Some(place) = min_at {
            let mistake = match adaptive {
                false => Some(
                    "nothing is learnt without \"adaptive: gradient\": add that, or leave this out"
                        .to_owned(),
                ),
                true if least > max => {
                    Some(format!("{least} is over \"max\", which is {max}: lower it"))
                }
                true => None,
            };
            if let Some(mistake) = mistake {
                self.say(&place, mistake);
            }
        }
        Concurrency {
            max,
            adaptive_min: adaptive.then_some(least.min(max)),
            pending,
            max_connections,
        }
    }

    fn health_check(
        &mut self,
        At { value, place }: At<raw::HealthCheck>,
        protocol: Protocol,
    ) -> Option<HealthCheck> {
        let raw = value?;
        let asks = match (raw.path, raw.grpc) {
            (Some(at), None) => self.read(at, |text| {
                let fits =
                    text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
                match fits {
                    true => Ok(Asks::Get(text.to_owned())),
                    false => Err(format!(
                        "\"{text}\" is not a path: use one as in a request, for example /healthz"
                    )),
                }
            }),
            (None, Some(at)) => {
                if protocol == Protocol::Http1 {
                    let message = "gRPC is spoken by HTTP/2: add \"protocol: http2\" to the upstream, or use path";
                    self.say(&at.place, message);
                }
                at.value.map(Asks::Grpc)
            }
            (Some(_), Some(at)) => {
                let message = "endpoints are asked for a path or by gRPC: keep one";
                self.say(&at.place, message);
                None
            }
            (None, None) => {
                let message =
                    "\"path\" is missing: add it, for example /healthz, or grpc with a service";
                self.say(&place, message);
                None
            }
        };
        let host = raw.host.and_then(|at| {
            self.read(at, |text| {
                match is_host(text.as_bytes()) && !text.is_empty() {
                    true => Ok(text.to_owned()),
                    false => Err(format!(
                        "\"{text}\" is not a host: use, for example, app.internal or app.internal:8080"
                    )),
                }
            })
        });
        let timeout_at = raw.timeout.as_ref().or(raw.interval.as_ref());
        let timeout_at = timeout_at.map(|at| at.place.sibling("timeout"));
        let interval = self.time_within(raw.interval, 10 * SECOND, DAY);
        let timeout = self.time_within(raw.timeout, SECOND, DAY);
        if let Some(place) = timeout_at.filter(|_| timeout > interval) {
            let message = format!(
                "{} is longer than interval, {}: the next look waits for it; use a shorter one",
                TimeLength(timeout),
                TimeLength(interval)
            );
            self.warn(&place, message);
        }
        Some(HealthCheck {
            unhealthy_after: self.count_within(raw.unhealthy_after, 3, 1..=1000),
            healthy_after: self.count_within(raw.healthy_after, 2, 1..=1000),
            asks: asks?,
            host,
            interval,
            timeout,
        })
    }

    fn outlier_detection(&mut self, raw: raw::OutlierDetection) -> OutlierDetection {
        OutlierDetection {
            consecutive_5xx: self.count_within(raw.consecutive_5xx, 5, 1..=1_000_000),
            max_ejection_percent: self.count_within(raw.max_ejection_percent, 10, 0..=100),
            interval: self.time_within(raw.interval, 10 * SECOND, DAY),
            base_ejection_time: self.time_within(raw.base_ejection_time, 30 * SECOND, DAY),
        }
    }

    fn slow_start(&mut self, raw: raw::SlowStart) -> SlowStart {
        let min_weight = raw.min_weight.and_then(At::told);
        if let Some((Percent(share), place)) = &min_weight
            && *share <= 0.0
        {
            let message = "an endpoint with no part at all would never begin: use more than 0%, for example 10%";
            self.say(place, message);
        }
        SlowStart {
            window: self.time_within(Some(raw.window), 30 * SECOND, DAY),
            min_weight: min_weight.map_or(0.1, |(Percent(share), _)| share),
        }
    }

    pub(super) fn upstream_named(&mut self, at: At<String>) -> usize {
        let Some(name) = at.value else { return 0 };
        if let Some(index) = self.upstreams.get(&name) {
            return *index;
        }
        self.say_unknown(Kind::Upstream, &at.place, &name);
        0
    }
}

/// With every default.
fn plain(name: String, endpoints: Vec<Source>) -> Upstream {
    Upstream {
        name,
        endpoints,
        protocol: Protocol::default(),
        tls: None,
        load_balancing: Balancing::LeastRequest,
        connect_timeout: SECOND,
        timeout: 15 * SECOND,
        idle_timeout: 50 * SECOND,
        max_age: 3600 * SECOND,
        concurrency: None,
        retries: None,
        health: None,
        outlier_detection: None,
        slow_start: None,
        panic_threshold: PANIC_THRESHOLD,
        circuit_breaker: None,
        trust_session_headers: false,
    }
}

/// Host and port of `HOST`, `HOST:PORT`, `[::1]:PORT`; `None` for a port that is none, or no host.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let behind_literal = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    let (host, port) = match authority[behind_literal..].find(':') {
        None => (authority, None),
        Some(colon) => {
            let (host, port) = authority.split_at(behind_literal + colon);
            let port = port[1..].parse::<u16>().ok().filter(|port| *port > 0)?;
            (host, Some(port))
        }
    };
    (!authority.is_empty()).then_some((host, port))
}

fn bad_name(text: &str) -> String {
    format!("\"{text}\" is not a name with a port: use NAME:PORT, for example app.svc:443")
}

#[cfg(test)]
mod tests;
