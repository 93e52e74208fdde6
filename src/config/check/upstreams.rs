//! Upstreams, from the file as written to [`Upstream`]s.

use std::collections::BTreeMap;

use super::{Checker, SECOND, span};
use crate::config::breakers::CircuitBreaker;
use crate::config::raw;
use crate::config::units::Span;
use crate::config::yaml::{self, At};
use crate::config::{Protocol, Upstream};

/// The name of the upstream that the short form makes.
const SHORT_UPSTREAM: &str = "upstream";

impl Checker {
    pub(super) fn upstreams(
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
            let protocol = raw.protocol.and_then(|at| at.value).unwrap_or_default();
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
                last.protocol = protocol;
                last.trust_session_headers = trusts;
                last.idle_timeout = span(idle_timeout, 60 * SECOND);
            }
        }
        if upstreams.is_empty() && self.needs_upstream {
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

    pub(super) fn upstream_named(&mut self, path: &str, at: At<String>) -> usize {
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
        protocol: Protocol::default(),
        connect_timeout: span(connect, SECOND),
        timeout: span(timeout, 15 * SECOND),
        idle_timeout: 60 * SECOND,
        trust_session_headers: false,
    }
}
