//! What a request is charged by the limits of its route, and gives back. What they look at is of `facts`, what they say of `verdicts`,
//! and those that processes have in common are asked by `shared_limits`.

use std::time::Duration;

use smallvec::SmallVec;

use super::facts::{Facts, refuses};
use super::record::Record;
use super::reply::Rejection;
use super::verdicts::{self, Said, Verdicts};
use crate::config::limits::{KeyPart, Limit, Mode, Rule, Rules};
use crate::plan::Plan;
use crate::policy::lease::Batch;
use crate::policy::limit::{Now, Verdict};
use crate::store::limits::{self, Ask, Key};

/// What a request was charged: its concurrency slots come back when this is dropped, and the client is told the rest. On the heap, what
/// there is of it: it is moved from step to step of a request, and room for all that may be would be most of what is moved.
pub(super) struct Quota<'p> {
    pub(super) plan: &'p Plan,
    held: Vec<(Key, u64)>,
    /// Likewise, of limits that processes have in common.
    slots: Vec<(Key, u64)>,
    /// What was taken of leases: of which limit, by its index, and of which key.
    taken: Vec<(usize, Key, Batch)>,
    /// Shared limits that this process keeps to alone, since Redis does not answer.
    alone: Vec<Alone>,
    /// For how long the request has waited for Redis, over all its limits.
    pub(super) waited: Duration,
    verdicts: Verdicts<'p>,
}

/// A shared limit that this process keeps to alone, for one request.
struct Alone {
    limit_index: usize,
    /// What counters go by: the part's period changes with how many processes there are, and what was counted stays.
    whole: Rules,
    /// What is asked and given back: this process's part of each rule.
    part: Rules,
}

impl Drop for Quota<'_> {
    fn drop(&mut self) {
        for (key, cost) in self.held.drain(..) {
            self.plan.counters.release(key, cost);
        }
        for (key, cost) in self.slots.drain(..) {
            if let Some(shared) = &self.plan.shared_limits {
                shared.slots.release(key, cost);
            }
        }
    }
}

impl<'p> Quota<'p> {
    /// Nothing is charged yet.
    pub(super) fn new(plan: &'p Plan) -> Quota<'p> {
        Quota {
            plan,
            held: Vec::new(),
            slots: Vec::new(),
            taken: Vec::new(),
            alone: Vec::new(),
            waited: Duration::ZERO,
            verdicts: Verdicts::default(),
        }
    }

    /// Asks these limits; a refusal by one of them charges none. Redis comes last, where it has to be asked: a request that leases or this
    /// process refuse waits for no call, and costs no quota of others. A lease that runs low may have begun to renew itself by then.
    pub(super) async fn ask(
        &mut self,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        if limits.is_empty() {
            return Ok(());
        }
        match &facts.conn.lane.redis {
            Some(redis) => self.share(redis, limits, facts, now, record).await,
            None => self.charge(limits, facts, now, record),
        }
    }

    /// Asks those of these limits that are not shared, at one moment; a refusal by one of them charges none, nor
    /// a lease that was just asked.
    pub(super) fn charge(
        &mut self,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        let refused = match self.ask_here(limits, facts, now, record) {
            Ok(true) => return Ok(()),
            Ok(false) => None,
            Err(rejection) => Some(rejection),
        };
        self.put_back(now);
        Err(refused.unwrap_or_else(|| self.refusal()))
    }

    /// Whether those of these limits that are not shared, or [left to this process](Quota::leave_alone), all admit the request, and so are
    /// charged; a refusal where it lacks a key that one of them must have.
    pub(super) fn ask_here(
        &mut self,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<bool, Rejection> {
        let plan = self.plan;
        let left_alone = |index: usize| self.alone.iter().find(|lost| lost.limit_index == index);
        // Held for as long as rules of it are asked.
        let overrides = plan.counters.overrides();
        let mut asks = SmallVec::<[Ask; 4]>::new();
        let mut limit_of = SmallVec::<[usize; 4]>::new();
        for limit_index in limits.iter().copied() {
            let limit = &plan.config.limits[limit_index];
            let mine = left_alone(limit_index);
            if limit.mode == Mode::Disabled || (mine.is_none() && plan.shares(limit)) {
                continue;
            }
            let key = facts.key(limit_index, plan);
            let key = key.inspect_err(|_| verdicts::lacks_key(plan, limit_index, record));
            let Some(parts) = key? else {
                continue;
            };
            let (whole, part) = match mine {
                Some(Alone { whole, part, .. }) => (whole, part),
                None => match limits::rules(limit, &parts, &overrides) {
                    Some(rules) => (rules, rules),
                    None => continue,
                },
            };
            let cost = facts.cost(limit);
            for (numbered, rule) in whole.numbered().zip(part.iter()) {
                let mut key = plan.limits[limit_index].keys.of_rule(numbered);
                parts.iter().for_each(|part| key.part(part));
                asks.push(Ask {
                    key: key.finish(),
                    rule,
                    cost,
                    enforced: refuses(limit, &parts),
                });
                limit_of.push(limit_index);
            }
        }
        if asks.is_empty() {
            return Ok(true);
        }
        const BLANK: Verdict = Verdict {
            admitted: false,
            remaining: 0,
            reset: Duration::ZERO,
            retry_after: None,
        };
        let mut verdicts = SmallVec::<[_; 4]>::from_elem(BLANK, asks.len());
        let admitted = plan.counters.ask(&asks, now, &mut verdicts);
        for (limit_index, verdict) in limit_of.iter().zip(&mut verdicts) {
            // What is too much for this process's part may pass once Redis answers.
            if !verdict.admitted && left_alone(*limit_index).is_some() {
                verdict.retry_after.get_or_insert(Duration::from_secs(1));
            }
        }
        let asked = asks.iter().zip(&limit_of).zip(&verdicts);
        let said = asked.clone().map(|((ask, limit), verdict)| Said {
            limit: *limit,
            rule: &ask.rule,
            enforced: ask.enforced,
            verdict: *verdict,
            charged: if admitted { ask.cost } else { 0 },
            counter: Some((ask.key, now)),
        });
        self.verdicts.note(plan, admitted, said, record);
        let slots = asked.filter(|((ask, _), _)| matches!(ask.rule, Rule::Slots(_)));
        for ((ask, _), _) in slots.filter(|(_, verdict)| admitted && verdict.admitted) {
            self.held.push((ask.key, ask.cost));
        }
        Ok(admitted)
    }

    /// Holds slots of a shared limit.
    pub(super) fn hold(&mut self, key: Key, slots: u64) {
        self.slots.push((key, slots));
    }

    /// Has taken this of a lease of a shared limit.
    pub(super) fn take(&mut self, limit_index: usize, key: Key, taken: Batch) {
        self.taken.push((limit_index, key, taken));
    }

    /// Leaves a shared limit to [`Quota::ask_here`], with its rules and this process's part of each.
    pub(super) fn leave_alone(&mut self, limit_index: usize, whole: Rules, part: Rules) {
        self.alone.push(Alone {
            limit_index,
            whole,
            part,
        });
    }

    /// Gives back what the request was charged by those limits that `which` says, and that admitted it: it is refused by what came after
    /// them.
    pub(super) fn give_back(&mut self, now: Now, which: fn(&Limit) -> bool) {
        let plan = self.plan;
        if let Some(shared) = &plan.shared_limits {
            self.taken.retain(|(index, key, batch)| {
                let gives = which(&plan.config.limits[*index]);
                if gives {
                    shared.leases.put_back(*key, *batch, now.mono);
                }
                !gives
            });
        }
        for (rule, (key, charged)) in self.verdicts.take_charges(which) {
            plan.counters.give_back(key, &rule, charged, now);
        }
    }

    /// Gives back what was taken of leases for a request that is refused.
    pub(super) fn put_back(&mut self, now: Now) {
        for (_, key, taken) in self.taken.drain(..) {
            if let Some(shared) = &self.plan.shared_limits {
                shared.leases.put_back(key, taken, now.mono);
            }
        }
    }

    /// No limit is left that might refuse the request: those that have charged it have admitted it.
    pub(super) fn count_admitted(&mut self) {
        self.verdicts.count_admitted(self.plan);
    }

    /// Brings what was said of a request's limits into their order, those first that are shared: clients are told so.
    pub(super) fn put_in_order(&mut self, limits: &[usize]) {
        let plan = self.plan;
        self.verdicts.sort_by_key(|index| {
            let place = limits.iter().position(|other| *other == index);
            (
                place.is_some(),
                !plan.shares(&plan.config.limits[index]),
                place,
            )
        });
    }

    /// Takes down what rules said.
    pub(super) fn note<'a>(
        &mut self,
        admitted: bool,
        said: impl Iterator<Item = Said<'a>> + Clone,
        record: &mut Record,
    ) {
        self.verdicts.note(self.plan, admitted, said, record);
    }

    /// What a client is told that is over its limits.
    pub(super) fn refusal(&mut self) -> Rejection {
        self.verdicts.refusal(&self.plan.config.limit_defaults)
    }

    /// Appends what every client is told of its limits.
    pub(super) fn tell(&self, out: &mut Vec<u8>) {
        self.verdicts.tell(&self.plan.config.limit_defaults, out);
    }
}

/// Whether a limit counts all clients together: who has no session may not use it up for those who have one. One that tells clients
/// apart is charged for such requests, too, as a bound on how often one client can try.
pub(super) fn is_common(limit: &Limit) -> bool {
    limit.by.iter().all(|part| match part {
        KeyPart::Path | KeyPart::Host | KeyPart::Method | KeyPart::Route | KeyPart::Upstream => {
            true
        }
        KeyPart::ClientIp
        | KeyPart::ClientCertSubject
        | KeyPart::ClientCertSan
        | KeyPart::Header(_)
        | KeyPart::Cookie(_)
        | KeyPart::Query(_)
        | KeyPart::SessionUser
        | KeyPart::SessionClaim(_) => false,
    })
}
