//! `retries` of an upstream.

use std::time::Duration;

use crate::config::check::{Checker, DAY};
use crate::config::raw;
use crate::config::units::{ByteSize, Span};
use crate::config::upstreams::{Backoff, Budget, Retries, RetryOn};
use crate::config::yaml::{self, At, told};

/// Methods that do the same however often they are done (RFC 9110 section 9.2.2), but for TRACE, which goes to no upstream.
const IDEMPOTENT: [&str; 5] = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"];
/// What a request keeps for another try, at most.
const MAX_BUFFER: u64 = 16 << 20;

impl Checker {
    pub(super) fn retries(&mut self, path: &str, raw: raw::Retries) -> Retries {
        let attempts = self.count_within(&format!("{path}.attempts"), raw.attempts, 1, 0..=10);
        let retry_on = match told(raw.retry_on) {
            Some(list) => self.retry_on(path, list),
            None => RetryOn {
                connect_failure: true,
                reset_before_request: true,
                statuses: vec![503],
                ..RetryOn::default()
            },
        };
        let methods = match told(raw.methods) {
            Some(list) => self.idempotent(path, list),
            None => ["GET", "HEAD", "OPTIONS"].map(str::to_owned).to_vec(),
        };
        let per_try = raw.per_try_timeout.and_then(|at| {
            let path = format!("{path}.per_try_timeout");
            let span = self.span_within(&path, Some(at), Span(Duration::from_secs(5)), DAY);
            (!span.is_zero()).then_some(span)
        });
        let backoff = told(raw.backoff).unwrap_or_default();
        let budget = told(raw.budget).unwrap_or_default();
        Retries {
            attempts,
            retry_on,
            methods,
            per_try_timeout: per_try,
            backoff: self.backoff(path, backoff),
            budget: self.budget(path, budget),
            buffer: self.buffer(path, raw.buffer),
        }
    }

    fn retry_on(&mut self, path: &str, list: Vec<At<String>>) -> RetryOn {
        let mut on = RetryOn::default();
        for (index, at) in list.into_iter().enumerate() {
            let status = self.read(&format!("{path}.retry_on[{index}]"), at, |text| {
                match text {
                    "connect_failure" => on.connect_failure = true,
                    "reset_before_request" => on.reset_before_request = true,
                    "reset" => on.reset = true,
                    "timeout" => on.timeout = true,
                    "5xx" => on.server_error = true,
                    _ => match text.parse::<u16>() {
                        Ok(status @ 400..=599) => return Ok(Some(status)),
                        Ok(_) | Err(_) => {
                            let known = [
                                "connect_failure",
                                "reset_before_request",
                                "reset",
                                "timeout",
                                "5xx",
                                "a status from 400 on such as \"503\"",
                            ];
                            let mend = yaml::did_you_mean(text, &known);
                            return Err(format!("\"{text}\" is no reason to try again; {mend}"));
                        }
                    },
                }
                Ok(None)
            });
            on.statuses.extend(status.flatten());
        }
        on
    }

    fn idempotent(&mut self, path: &str, list: Vec<At<String>>) -> Vec<String> {
        let method = |text: &str| match IDEMPOTENT.contains(&text) {
            true => Ok(text.to_owned()),
            false => Err(format!(
                "\"{text}\" is not idempotent, and an upstream that has seen it may have done it already; use some of {}",
                IDEMPOTENT.join(", ")
            )),
        };
        list.into_iter()
            .enumerate()
            .filter_map(|(index, at)| self.read(&format!("{path}.methods[{index}]"), at, method))
            .collect()
    }

    fn backoff(&mut self, path: &str, raw: raw::Backoff) -> Backoff {
        let mut time = |key: &str, at: Option<At<Span>>, millis| {
            let default = Span(Duration::from_millis(millis));
            self.span_within(&format!("{path}.backoff.{key}"), at, default, DAY)
        };
        Backoff {
            base: time("base", raw.base, 25),
            max: time("max", raw.max, 250),
        }
    }

    fn budget(&mut self, path: &str, raw: raw::Budget) -> Budget {
        let percent =
            self.count_within(&format!("{path}.budget.percent"), raw.percent, 20, 0..=100);
        let path = format!("{path}.budget.min_concurrent");
        let min_concurrent = self.count_within(&path, raw.min_concurrent, 3, 0..=1_000_000);
        Budget {
            percent,
            min_concurrent,
        }
    }

    fn buffer(&mut self, path: &str, at: Option<At<ByteSize>>) -> usize {
        let told = at.and_then(|at| Some((at.value?, at.line, at.column)));
        let Some((size, line, column)) = told else {
            return 0;
        };
        if size.0 > MAX_BUFFER {
            let message = format!(
                "{size} for each request is too much: use up to {}, for example 64KiB",
                ByteSize(MAX_BUFFER)
            );
            self.say(&format!("{path}.buffer"), line, column, message);
        }
        usize::try_from(size.0).unwrap_or(usize::MAX)
    }
}
