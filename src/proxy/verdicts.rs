//! What rules say of a request: counted, kept for the audit, and told to the client. Asks none of them.

use std::io::Write as _;
use std::time::Duration;

use smallvec::SmallVec;

use super::record::Record;
use super::reply::{Exceeded, Rejection, seconds};
use crate::config::LimitDefaults;
use crate::config::limits::{Limit, Rule, Window};
use crate::plan::{Plan, Words};
use crate::policy::limit::{Charged, Now, Verdict};
use crate::store::limits::Key;

/// What one rule said.
pub(super) struct Said<'a> {
    /// An index into the configuration's limits.
    pub limit: usize,
    pub rule: &'a Rule,
    /// Whether its refusal refuses the request.
    pub enforced: bool,
    pub verdict: Verdict,
    /// What it has taken, which comes back where the request is refused all the same.
    pub charged: u64,
    /// Its counter, where that is in memory, and when it was asked.
    pub counter: Option<(Key, Now)>,
}

/// What each rule said of a request, in the order asked.
#[derive(Default)]
pub(super) struct Verdicts<'p>(Vec<Told<'p>>);

#[derive(Clone, Copy)]
struct Told<'p> {
    limit: &'p Limit,
    /// Its index.
    index: usize,
    /// Its name as a JSON string.
    json: &'static str,
    rule: Rule,
    verdict: Verdict,
    /// Whether its refusal refuses the request; clients are told of no others.
    enforced: bool,
    charged: u64,
    /// Until it is given back. A slot comes back with the request.
    charge: Option<(Key, Charged)>,
    /// For the first rule of a limit that admits the request, until it is known that none refuses it: whether it is near its number.
    admits: Option<bool>,
}

impl<'p> Verdicts<'p> {
    /// Counts what rules said, and keeps it for the audit and the client.
    pub(super) fn note<'a>(
        &mut self,
        plan: &'p Plan,
        admitted: bool,
        said: impl Iterator<Item = Said<'a>> + Clone,
        record: &mut Record,
    ) {
        let before = self.0.len();
        if let Some(draft) = &mut record.draft {
            let words = |said: Said<'_>| said_by(&plan.limits[said.limit].words, &said);
            draft.add_limits(said.clone().map(words));
        }
        for said in said {
            let is_slot = matches!(said.rule, Rule::Slots(_));
            let is_counted = admitted && said.verdict.admitted && !is_slot;
            let charge = said.counter.filter(|_| is_counted);
            let charge = charge.map(|(key, at)| {
                let charged = Charged {
                    cost: said.charged,
                    at,
                    remaining: said.verdict.remaining,
                    reset: said.verdict.reset,
                };
                (key, charged)
            });
            self.0.push(Told {
                limit: &plan.config.limits[said.limit],
                index: said.limit,
                json: plan.limits[said.limit].words.json,
                rule: *said.rule,
                verdict: said.verdict,
                enforced: said.enforced,
                charged: said.charged,
                charge,
                admits: None,
            });
        }
        let asked = self.0.get_mut(before..).unwrap_or_default();
        asked
            .chunk_by_mut(|one, other| one.index == other.index)
            .for_each(|rules| count_decision(plan, admitted, rules));
    }

    /// Puts what was said into this order, by the limit's index.
    pub(super) fn sort_by_key<K: Ord>(&mut self, key: impl Fn(usize) -> K) {
        self.0.sort_by_key(|told| key(told.index));
    }

    /// Counts those limits that admit the request, where none is left that might refuse it.
    pub(super) fn count_admitted(&mut self, plan: &Plan) {
        for told in &mut self.0 {
            let Some(near) = told.admits.take() else {
                continue;
            };
            let metrics = &plan.limits[told.index].metrics;
            if near {
                metrics.near.inc();
            }
            metrics.admitted.inc();
        }
    }

    /// What counters in memory were charged by limits of which `which` holds, each once. Those have decided nothing.
    pub(super) fn take_charges(
        &mut self,
        which: fn(&Limit) -> bool,
    ) -> impl Iterator<Item = (Rule, (Key, Charged))> {
        let of_limits = self.0.iter_mut().filter(move |told| which(told.limit));
        of_limits.filter_map(|told| {
            told.admits = None;
            Some((told.rule, told.charge.take()?))
        })
    }

    /// What the client is told. Limits that would admit the request have back what they took, if not by now, before it is told.
    pub(super) fn refusal(&mut self, defaults: &LimitDefaults) -> Rejection {
        for told in self.0.iter_mut().filter(|told| told.verdict.admitted) {
            let left = told.verdict.remaining.saturating_add(told.charged);
            (told.verdict.remaining, told.charged) = (left, 0);
        }
        let violated = || self.enforced().filter(|told| !told.verdict.admitted);
        let mut limits: SmallVec<_> = violated().map(|told| told.json).collect();
        limits.dedup();
        // Every refusing window must have time to pass; one that never admits gives no time at all.
        let waits = violated().map(|told| told.verdict.retry_after);
        let retry_after = waits.max_by_key(|wait| wait.unwrap_or(Duration::MAX));
        let retry_after = retry_after.flatten();
        let jitter = 1.0 + fastrand::f64() * defaults.retry_jitter;
        // A wait too long to be made longer stays as it is.
        let longer = |wait: Duration| Duration::try_from_secs_f64(wait.as_secs_f64() * jitter);
        let retry_after = retry_after.map(|wait| longer(wait).unwrap_or(wait));
        let mut fields = Vec::with_capacity(128);
        self.tell(defaults, &mut fields);
        Rejection::QuotaExceeded(Box::new(Exceeded {
            limits,
            retry_after,
            fields,
        }))
    }

    /// Appends `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), and the `X-RateLimit-*` of
    /// older clients for the limit with the least left.
    pub(super) fn tell(&self, defaults: &LimitDefaults, out: &mut Vec<u8>) {
        let Some(tightest) = self.enforced().min_by_key(|told| told.verdict.remaining) else {
            return;
        };
        if defaults.standard_headers {
            out.extend_from_slice(b"RateLimit-Policy: ");
            self.put_each(out, |out, told| {
                put_parameter(out, b"q", quota(&told.rule));
                if let Some(window) = window(&told.rule) {
                    put_parameter(out, b"w", window);
                }
            });
            out.extend_from_slice(b"RateLimit: ");
            self.put_each(out, |out, told| {
                put_parameter(out, b"r", told.verdict.remaining);
                // When a slot is free again nobody knows; 0 would ask clients to come back at once.
                if window(&told.rule).is_some() {
                    put_parameter(out, b"t", seconds(told.verdict.reset));
                }
            });
        }
        if defaults.legacy_headers {
            let (limit, remaining) = (capacity(&tightest.rule), tightest.verdict.remaining);
            let reset = seconds(tightest.verdict.reset);
            let _ = write!(
                out,
                "X-RateLimit-Limit: {limit}\r\nX-RateLimit-Remaining: {remaining}\r\nX-RateLimit-Reset: {reset}\r\n"
            );
        }
    }

    /// A structured list (RFC 9651): each rule's name, then what `parameters` puts.
    fn put_each(&self, out: &mut Vec<u8>, parameters: impl Fn(&mut Vec<u8>, &Told<'_>)) {
        let mut before: Option<&str> = None;
        let mut number = 1;
        for told in self.enforced() {
            let name = told.limit.name.as_str();
            if before.is_some() {
                out.extend_from_slice(b", ");
            }
            number = if before == Some(name) { number + 1 } else { 1 };
            before = Some(name);
            out.push(b'"');
            out.extend_from_slice(told.limit.label.as_bytes());
            // Several windows of one limit need names of their own: "login", "login.2".
            if number > 1 {
                let _ = write!(out, ".{number}");
            }
            out.push(b'"');
            parameters(out, told);
        }
        out.extend_from_slice(b"\r\n");
    }

    /// What clients are told of.
    fn enforced(&self) -> impl Iterator<Item = &Told<'p>> {
        self.0.iter().filter(|told| told.enforced)
    }
}

/// Counts what a limit has decided, by its `rules` together; that it admits once no other can refuse the request.
fn count_decision(plan: &Plan, admitted: bool, rules: &mut [Told<'_>]) {
    let Some(Told {
        index,
        limit,
        enforced,
        ..
    }) = rules.first().copied()
    else {
        return;
    };
    let is_near = |told: &Told<'_>| {
        let capacity = capacity(&told.rule);
        let used = capacity.saturating_sub(told.verdict.remaining);
        used as f64 >= capacity as f64 * limit.near_limit
    };
    let passes = rules.iter().all(|told| told.verdict.admitted);
    let metrics = &plan.limits[index].metrics;
    match (passes, enforced) {
        (true, _) if admitted => rules[0].admits = Some(rules.iter().any(is_near)),
        // Another limit refuses the request, so this one is not charged and has decided nothing.
        (true, _) => {}
        (false, true) => {
            metrics.refused.inc();
        }
        (false, false) => {
            metrics.shadow_refused.inc();
        }
    }
}

/// Takes down that a limit refuses the request for want of its key.
pub(super) fn lacks_key(plan: &Plan, limit_index: usize, record: &mut Record) {
    if let Some(draft) = &mut record.draft {
        let words = &plan.limits[limit_index].words;
        draft.add_limits([words.missing_key].into_iter());
    }
}

/// What one rule says, for the audit.
fn said_by(words: &Words, said: &Said<'_>) -> &'static str {
    match (said.verdict.admitted, said.enforced) {
        (true, _) => words.admitted,
        (false, true) => words.refused,
        (false, false) => words.shadow_refused,
    }
}

fn quota(rule: &Rule) -> u64 {
    match rule {
        Rule::Window(Window::Bucket { count, .. }) => *count,
        Rule::Window(Window::Sliding { limit, .. })
        | Rule::Window(Window::Fixed { limit, .. })
        | Rule::Slots(limit) => *limit,
    }
}

/// What is left of a rule that nothing was taken of.
fn capacity(rule: &Rule) -> u64 {
    match rule {
        Rule::Window(window) => window.capacity(),
        Rule::Slots(limit) => *limit,
    }
}

/// In whole seconds.
fn window(rule: &Rule) -> Option<u64> {
    match rule {
        Rule::Window(Window::Bucket { per, .. }) => Some(seconds(*per)),
        Rule::Window(Window::Sliding { window, .. }) => Some(seconds(*window)),
        Rule::Window(Window::Fixed { period, .. }) => Some(seconds(period.at_most())),
        Rule::Slots(_) => None,
    }
}

/// A larger number is no integer of a structured field (RFC 9651 section 3.3.1).
const MOST: u64 = 999_999_999_999_999;

fn put_parameter(out: &mut Vec<u8>, name: &[u8], value: u64) {
    out.push(b';');
    out.extend_from_slice(name);
    out.push(b'=');
    out.extend_from_slice(itoa::Buffer::new().format(value.min(MOST)).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_such_as_structured_fields_have() {
        let check = |value, expected: &str| {
            let mut out = Vec::new();
            put_parameter(&mut out, b"r", value);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        };
        check(7, ";r=7");
        check(999_999_999_999_999, ";r=999999999999999");
        check(1_000_000_000_000_000, ";r=999999999999999");
        check(u64::MAX, ";r=999999999999999");
    }
}
