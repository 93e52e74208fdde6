//! Circuit breakers, from the file as written to [`CircuitBreaker`]s.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use super::Checker;
use super::unused::Kind;
use super::values::{share, time};
use crate::config::breakers::{
    CircuitBreaker, FailureOn, Fallback, HalfOpen, OnLoss, Scope, Settings, SlowCall, Window,
};
use crate::config::raw::{self, WindowKind};
use crate::config::units::TimeLength;
use crate::config::yaml::{self, At, told};
use crate::http2::grpc::GrpcStatus;

impl Checker {
    /// Reads all breakers, for upstreams to name.
    pub(super) fn breakers(&mut self, raw: BTreeMap<String, At<raw::CircuitBreaker>>) {
        for (name, at) in raw {
            if let Some(raw) = at.value {
                let breaker = self.breaker(name.clone(), raw);
                self.breakers.insert(name, breaker);
            }
        }
    }

    pub(super) fn breaker_named(&mut self, at: At<String>) -> Option<CircuitBreaker> {
        let name = at.value?;
        let found = self.breakers.get(&name).cloned();
        if found.is_none() {
            self.say_unknown(Kind::Breaker, &at.place, &name);
        }
        found
    }

    fn breaker(&mut self, name: String, raw: raw::CircuitBreaker) -> CircuitBreaker {
        let seconds = Duration::from_secs;
        let window = told(raw.window).and_then(|window| self.window(window));
        let half_open = told(raw.half_open).unwrap_or_default();
        let slow_call = told(raw.slow_call).and_then(|raw| {
            Some(SlowCall {
                duration: raw.duration.value?.0,
                rate: raw.rate.value?.0,
            })
        });
        let open_at = raw.open_for.as_ref().or(raw.max_open_for.as_ref());
        let open_at = open_at.map(|at| at.place.sibling("open_for"));
        let settings = Settings {
            window: window.unwrap_or(Window::Time(seconds(10))),
            minimum_calls: told(raw.minimum_calls).unwrap_or(20),
            failure_rate: share(raw.failure_rate, 0.5),
            consecutive_failures: told(raw.consecutive_failures).unwrap_or(0),
            slow_call,
            open_for: time(raw.open_for, seconds(10)),
            max_open_for: time(raw.max_open_for, seconds(300)),
            jitter: share(raw.jitter, 0.1),
            half_open: HalfOpen {
                probes: told(half_open.probes).unwrap_or(5),
                success_rate: share(half_open.success_rate, 0.8),
                probe_timeout: self.timeout(half_open.probe_timeout, seconds(5)),
            },
            recover_over: time(raw.recover_over, seconds(30)),
        };
        if let Some(place) = open_at.filter(|_| settings.open_for > settings.max_open_for) {
            let message = format!(
                "{} is longer than max_open_for, {}, so that the first opening lasts longest: use a shorter one, or a longer max_open_for",
                TimeLength(settings.open_for),
                TimeLength(settings.max_open_for)
            );
            self.warn(&place, message);
        }
        let failure_on = match told(raw.failure_on) {
            Some(list) => self.failure_on(list),
            None => FailureOn {
                connect_failure: true,
                timeout: true,
                reset: true,
                server_error: true,
                statuses: Vec::new(),
                grpc: Vec::new(),
            },
        };
        let fallback = told(raw.fallback).and_then(|raw| self.fallback(raw));
        let scope = match self.has_redis {
            true => told(raw.scope).unwrap_or(Scope::Shared),
            // The same file serves a laptop.
            false => Scope::Local,
        };
        CircuitBreaker {
            name,
            scope,
            quorum: self.quorum(raw.quorum),
            on_redis_loss: told(raw.on_redis_loss).unwrap_or(OnLoss::Local),
            settings,
            failure_on,
            fallback,
            mode: told(raw.mode).unwrap_or_default(),
        }
    }

    fn quorum(&mut self, at: Option<At<u32>>) -> NonZeroU32 {
        const QUORUM: NonZeroU32 = NonZeroU32::new(2).expect("two is not zero");
        let Some((told, place)) = at.and_then(At::told) else {
            return QUORUM;
        };
        NonZeroU32::new(told).unwrap_or_else(|| {
            let message = "a quorum of none would trip at once: use 1 or more, for example 2";
            self.say(&place, message);
            QUORUM
        })
    }

    fn window(&mut self, raw: raw::Window) -> Option<Window> {
        let kind = raw.kind.value?;
        self.read(raw.size, |text| match kind {
            WindowKind::Time => match text.parse()? {
                TimeLength(Duration::ZERO) => {
                    Err("a window of no time holds nothing: use, for example, 10s".to_owned())
                }
                TimeLength(size) => Ok(Window::Time(size)),
            },
            WindowKind::Count => match text.parse() {
                Ok(size @ 1..) => Ok(Window::Count(size)),
                Ok(0) | Err(_) => Err(format!(
                    "\"{text}\" is not a number of calls: use, for example, 100"
                )),
            },
        })
    }

    fn failure_on(&mut self, list: Vec<At<String>>) -> FailureOn {
        let mut on = FailureOn::default();
        let statuses = self.each(list, |text| {
            match text {
                    "connect_failure" => on.connect_failure = true,
                    "timeout" => on.timeout = true,
                    "reset" => on.reset = true,
                    "5xx" => on.server_error = true,
                    _ if text.starts_with("grpc:") => {
                        let name = &text["grpc:".len()..];
                        let status = GrpcStatus::named(name).filter(|status| status.0 > 0);
                        let status = status.ok_or_else(|| {
                            let names = &GrpcStatus::names()[1..];
                            let mend = yaml::did_you_mean(name, names);
                            format!("\"{name}\" is not an error of gRPC; {mend}")
                        })?;
                        on.grpc.push(status);
                    }
                    _ => match text.parse::<u16>() {
                        Ok(status @ 100..=599) => return Ok(Some(status)),
                        Ok(_) | Err(_) => {
                            let known =
                                "connect_failure, timeout, reset, 5xx, a status such as \"503\" or one such as \"grpc:UNAVAILABLE\"";
                            return Err(format!(
                                "\"{text}\" is not a kind of failure: use {known}"
                            ));
                        }
                    },
                }
            Ok(None)
        });
        on.statuses = statuses.into_iter().flatten().collect();
        on
    }

    fn fallback(&mut self, raw: raw::Fallback) -> Option<Fallback> {
        let body = raw.body.value;
        let status = raw.status.map_or(Some(503), |at| {
            let status = at.value?;
            self.final_status(&at.place, status, body.as_deref().unwrap_or_default());
            Some(status)
        });
        let content_type =
            raw.content_type
                .map_or(Some("application/json".to_owned()), |at| {
                    self.read(at, |text| {
                        match text.bytes().any(|b| b.is_ascii_control()) {
                            true => Err("a content type has no control characters: take them out"
                                .to_owned()),
                            false => Ok(text.to_owned()),
                        }
                    })
                });
        Some(Fallback {
            status: status?,
            body: body?,
            content_type: content_type?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;
    use crate::config::limits::Mode;

    fn read(breaker: &str) -> Result<CircuitBreaker, String> {
        let text = format!(
            "listen: 127.0.0.1:1\nupstreams: {{a: {{endpoints: ['http://x:1'], circuit_breaker: b}}}}\ncircuit_breakers: {{b: {breaker}}}\n"
        );
        fixture::read(&text)
            .map(|config| config.upstreams[0].circuit_breaker.clone().unwrap())
            .map_err(|said| said.join("\n"))
    }

    #[test]
    fn an_empty_breaker_has_every_default() {
        let breaker = read("{}").unwrap();
        assert_eq!(
            breaker.settings.window,
            Window::Time(Duration::from_secs(10))
        );
        assert_eq!(
            (
                breaker.settings.minimum_calls,
                breaker.settings.half_open.probes
            ),
            (20, 5)
        );
        assert!(
            breaker.failure_on.server_error
                && breaker.failure_on.timeout
                && breaker.mode == Mode::Enforce
        );
    }

    #[test]
    fn every_key_of_a_breaker_is_read() {
        let breaker = read(
            "{window: {type: count, size: 7}, failure_rate: 25%, consecutive_failures: 3, slow_call: {duration: 2s, rate: 80%}, \
             failure_on: ['503', timeout], open_for: 1s, half_open: {probes: 2}, fallback: {status: 200, body: '{}'}, mode: shadow}",
        )
        .unwrap();
        assert_eq!(breaker.settings.window, Window::Count(7));
        assert_eq!(
            breaker.settings.slow_call,
            Some(SlowCall {
                duration: Duration::from_secs(2),
                rate: 0.8
            })
        );
        assert_eq!(
            (breaker.failure_on.statuses, breaker.failure_on.reset),
            (vec![503], false)
        );
        assert_eq!(breaker.fallback.unwrap().status, 200);
        assert_eq!(breaker.mode, Mode::Shadow);
    }

    #[test]
    fn breakers_are_shared_where_there_is_a_redis() {
        let check = |breaker: &str, shared: Scope| {
            assert_eq!(read(breaker).unwrap().scope, Scope::Local, "{breaker}");
            let text = format!("{breaker}}}\nredis: {{urls: redis://h");
            assert_eq!(read(&text).unwrap().scope, shared, "{breaker}");
        };
        check("{}", Scope::Shared);
        check("{scope: shared}", Scope::Shared);
        check("{scope: local}", Scope::Local);
        let shared = |breaker: &str| {
            let breaker = read(breaker).unwrap();
            (breaker.quorum.get(), breaker.on_redis_loss)
        };
        assert_eq!(shared("{}"), (2, OnLoss::Local));
        assert_eq!(
            shared("{quorum: 1, on_redis_loss: freeze}"),
            (1, OnLoss::Freeze)
        );
    }

    #[test]
    fn a_wrong_breaker_says_the_mend() {
        for (breaker, part) in [
            (
                "{window: {type: count, size: 10s}}",
                "circuit_breakers.b.window.size: \"10s\" is not a number of calls",
            ),
            ("{failure_rate: 50}", "is not a percentage"),
            (
                "{failure_on: [5xz]}",
                "circuit_breakers.b.failure_on[0]: \"5xz\" is not a kind of failure",
            ),
            ("{fallback: {status: 99, body: x}}", "use 200 to 599"),
            (
                "{fallback: {status: 204, body: x}}",
                "circuit_breakers.b.fallback.status: 204 has no body",
            ),
            (
                "{half_open: {probe_timeout: 0s}}",
                "circuit_breakers.b.half_open.probe_timeout: 0s is over at once",
            ),
            (
                "{quorum: 0}",
                "line 3, column 32: circuit_breakers.b.quorum: a quorum of none would trip at once: use 1 or more",
            ),
            ("{scope: global}", "unknown name \"global\""),
            ("{on_redis_loss: deny}", "unknown name \"deny\""),
            ("{openfor: 1s}", "did you mean \"open_for\"?"),
        ] {
            let said = read(breaker).unwrap_err();
            assert!(said.contains(part), "{said}");
        }
    }
}
