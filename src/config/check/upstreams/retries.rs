//! `retries` of an upstream.

use std::time::Duration;

use crate::config::check::{Checker, DAY};
use crate::config::raw;
use crate::config::units::ByteSize;
use crate::config::upstreams::{Backoff, Budget, Retries, RetryOn};
use crate::config::yaml::{self, At, told};

/// Methods that do the same however often they are done (RFC 9110 section 9.2.2), but for TRACE, which goes to no upstream.
const IDEMPOTENT: [&str; 5] = ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"];
/// What a request keeps for another try, at most.
const MAX_BUFFER: u64 = 16 << 20;

impl Checker {
    pub(super) fn retries(&mut self, raw: raw::Retries) -> Retries {
        let attempts = self.count_within(raw.attempts, 1, 0..=10);
        let retry_on = match told(raw.retry_on) {
            Some(list) => self.retry_on(list),
            None => RetryOn {
                connect_failure: true,
                reset_before_request: true,
                statuses: vec![503],
                ..RetryOn::default()
            },
        };
        let methods = match told(raw.methods) {
            Some(list) => self.each(list, idempotent),
            None => ["GET", "HEAD", "OPTIONS"].map(str::to_owned).to_vec(),
        };
        let per_try = raw.per_try_timeout.and_then(|at| {
            let span = self.time_within(Some(at), Duration::from_secs(5), DAY);
            (!span.is_zero()).then_some(span)
        });
        Retries {
            attempts,
            retry_on,
            methods,
            per_try_timeout: per_try,
            backoff: self.backoff(told(raw.backoff).unwrap_or_default()),
            budget: self.budget(told(raw.budget).unwrap_or_default()),
            buffer: self.buffer(raw.buffer),
        }
    }

    fn retry_on(&mut self, list: Vec<At<String>>) -> RetryOn {
        let mut on = RetryOn::default();
        let statuses = self.each(list, |text| {
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
        on.statuses = statuses.into_iter().flatten().collect();
        on
    }

    fn backoff(&mut self, raw: raw::Backoff) -> Backoff {
        let millis = Duration::from_millis;
        Backoff {
            base: self.time_within(raw.base, millis(25), DAY),
            max: self.time_within(raw.max, millis(250), DAY),
        }
    }

    fn budget(&mut self, raw: raw::Budget) -> Budget {
        Budget {
            percent: self.count_within(raw.percent, 20, 0..=100),
            min_concurrent: self.count_within(raw.min_concurrent, 3, 0..=1_000_000),
        }
    }

    fn buffer(&mut self, at: Option<At<ByteSize>>) -> usize {
        let Some((size, place)) = at.and_then(At::told) else {
            return 0;
        };
        if size.0 > MAX_BUFFER {
            let message = format!(
                "{size} for each request is too much: use up to {}, for example 64KiB",
                ByteSize(MAX_BUFFER)
            );
            self.say(&place, message);
        }
        usize::try_from(size.0).unwrap_or(usize::MAX)
    }
}

fn idempotent(text: &str) -> Result<String, String> {
    match IDEMPOTENT.contains(&text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "\"{text}\" is not idempotent, and an upstream that has seen it may have done it already; use some of {}",
            IDEMPOTENT.join(", ")
        )),
    }
}
