//! The limits that a request has in common with those at other processes: asked of leases, and of Redis where those do not
//! do; and what becomes of a request while Redis does not answer. The words for clients are `verdicts`'.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use smallvec::SmallVec;

use super::facts::{Facts, Parts, refuses};
use super::quota::Quota;
use super::record::Record;
use super::reply::Rejection;
use super::verdicts::{Said, lacks_key};
use crate::clock;
use crate::config::limits::{Cost, Mode, OnLoss, Rule, Rules, Window};
use crate::plan::{SharedAsk, SharedLimits};
use crate::policy::lease::{Batch, RuleView};
use crate::policy::limit::{self, Now, Verdict};
use crate::store::fleet::FleetConnections;
use crate::store::limits;
use crate::store::limits::leases::{Decided, Decision, Views};
use crate::store::limits::slots::Taken;
use crate::store::redis::Connections;

/// A shared limit of which Redis has to be asked.
struct Open<'a> {
    limit_index: usize,
    parts: Parts<'a>,
    rules: Rules,
    cost: u64,
}

/// The shared limits of one request, asked one after the other; and what they say.
struct Round<'a> {
    redis: &'a Arc<Connections>,
    shared: &'a SharedLimits,
    now: Now,
    admitted: bool,
    /// Which limits refuse it all the same, since Redis does not answer.
    lost: SmallVec<[usize; 1]>,
    said: SmallVec<[OfRule; 2]>,
}

struct OfRule {
    limit_index: usize,
    rule: Rule,
    enforced: bool,
    verdict: Verdict,
    charged: u64,
}

impl<'p> Quota<'p> {
    /// Asks these limits, some of which are shared; a refusal by one of them charges none. Where Redis does not answer, a limit
    /// is left to [`Quota::ask_here`], let pass, or the request is refused, as the file says.
    pub(super) async fn share(
        &mut self,
        redis: &FleetConnections,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        let Some(shared) = &self.plan.shared_limits else {
            return self.charge(limits, facts, now, record);
        };
        let mut round = Round {
            redis: &redis.rate_limit,
            shared,
            now,
            admitted: true,
            lost: SmallVec::new(),
            said: SmallVec::new(),
        };
        let decided = self.decide(limits, facts, &mut round, record);
        let open = decided.inspect_err(|_| self.put_back(now))?;
        // Once a lease has refused the request, Redis is asked of nothing for it: a flood of one key costs no calls by another. Nor is it
        // where this process refuses.
        if !self.take_down(&mut round, record) {
            self.put_back(now);
            return Err(self.refusal());
        }
        self.charge(limits, facts, now, record)?;
        if open.is_empty() {
            return Ok(());
        }
        let began = clock::mono();
        // Boxed, to keep the common future small: most requests wait for no one.
        Box::pin(self.ask_redis(&open, &mut round)).await;
        self.waited += clock::mono().saturating_sub(began);
        let admitted = match self.take_down(&mut round, record) {
            true => {
                let open = open.iter().map(|open| open.limit_index);
                let open: SmallVec<[usize; 4]> = open.collect();
                // Those of them that Redis did not answer of: the others are done.
                self.ask_here(&open, facts, now, record)
            }
            false => Ok(false),
        };
        self.put_in_order(limits);
        match admitted {
            Ok(true) => Ok(()),
            refused => {
                self.give_back(now, |_| true);
                let lost = round.admitted && !round.lost.is_empty();
                let lost = lost.then_some(Rejection::LimitUnknown);
                let why = refused.err().or(lost);
                Err(why.unwrap_or_else(|| self.refusal()))
            }
        }
    }

    /// Takes down what was decided since the last time; whether that lets the request pass.
    fn take_down(&mut self, round: &mut Round<'_>, record: &mut Record) -> bool {
        let passes = round.admitted && round.lost.is_empty();
        let said = std::mem::take(&mut round.said);
        let said = said.iter().map(|said| Said {
            limit: said.limit_index,
            rule: &said.rule,
            enforced: said.enforced,
            verdict: said.verdict,
            charged: said.charged,
            counter: None,
        });
        self.note(passes, said, record);
        if let Some(draft) = &mut record.draft {
            let words = |limit: &usize| self.plan.limits[*limit].words.redis_lost;
            draft.add_limits(round.lost.iter().map(words));
        }
        passes
    }

    /// Takes what leases have. Apart from the asking and without a wait, since most requests end here: nothing is kept for later
    /// but what is left open.
    fn decide<'a>(
        &mut self,
        limits: &[usize],
        facts: &Facts<'a>,
        round: &mut Round<'_>,
        record: &mut Record,
    ) -> Result<SmallVec<[Open<'a>; 1]>, Rejection>
    where
        'p: 'a,
    {
        let plan = self.plan;
        let overrides = plan.counters.overrides();
        let mut open = SmallVec::new();
        for limit_index in limits.iter().copied() {
            let limit = &plan.config.limits[limit_index];
            if limit.mode == Mode::Disabled || !plan.shares(limit) {
                continue;
            }
            let key = facts.key(limit_index, plan);
            let key = key.inspect_err(|_| lacks_key(plan, limit_index, record));
            let Some(parts) = key? else {
                continue;
            };
            let Some(rules) = limits::rules(limit, &parts, &overrides) else {
                continue;
            };
            let cost = facts.cost(limit);
            let Some(ask) = plan.shared_ask(limit_index, &parts, rules, cost) else {
                continue;
            };
            let decided = match &ask {
                SharedAsk::Tokens(ask) => {
                    let leases = &round.shared.leases;
                    leases.decide(round.redis, ask, round.now.mono)
                }
                SharedAsk::Slots(_) => None,
            };
            match decided {
                Some(decided) => self.take_in((limit_index, &parts), rules, &ask, decided, round),
                None => open.push(Open {
                    limit_index,
                    rules: rules.clone(),
                    parts,
                    cost,
                }),
            }
        }
        Ok(open)
    }

    /// Asks Redis of all limits that are open, at one time.
    async fn ask_redis(&mut self, open: &[Open<'_>], round: &mut Round<'_>) {
        let (plan, redis, shared) = (self.plan, round.redis, round.shared);
        let asks = open.iter().filter_map(|open| {
            let ask = plan.shared_ask(open.limit_index, &open.parts, &open.rules, open.cost)?;
            Some((open, ask.after(self.waited)))
        });
        let asks: SmallVec<[_; 1]> = asks.collect();
        // Slots are the request's once all have answered, and come free where it is gone before.
        let answer = async |ask: &SharedAsk<'_>| match ask {
            SharedAsk::Tokens(ask) => (shared.leases.ask(redis, ask).await, None),
            SharedAsk::Slots(ask) => {
                let taken = shared.slots.take(redis, ask).await;
                let (decision, taken) = match taken {
                    Ok(taken) => (Decision::Admitted(Batch::default()), Some(taken)),
                    Err(decision) => (decision, None),
                };
                let rules = Views::new();
                (Decided { decision, rules }, taken)
            }
        };
        let mut take_in = |(open, ask): &(&Open<'_>, _),
                           (decided, taken): (_, Option<Taken<'_>>)| {
            let of = (open.limit_index, &open.parts);
            self.take_in(of, &open.rules, ask, decided, round);
            if let Some(taken) = taken {
                taken.keep();
            }
        };
        if let [asked] = &asks[..] {
            take_in(asked, answer(&asked.1).await);
            return;
        }
        let answers = join_all(asks.iter().map(|(_, ask)| answer(ask))).await;
        for (asked, answer) in asks.iter().zip(answers) {
            take_in(asked, answer);
        }
    }

    /// What was decided of one limit.
    fn take_in(
        &mut self,
        (limit_index, parts): (usize, &Parts<'_>),
        rules: &Rules,
        ask: &SharedAsk<'_>,
        Decided {
            decision,
            rules: views,
        }: Decided,
        round: &mut Round<'_>,
    ) {
        let (plan, now) = (self.plan, round.now);
        let limit = &plan.config.limits[limit_index];
        let enforced = refuses(limit, parts);
        let sharing = &plan.limits[limit_index].sharing;
        let cost = match ask {
            SharedAsk::Tokens(ask) => ask.cost,
            SharedAsk::Slots(ask) => ask.cost,
        };
        let refused = match decision {
            Decision::Admitted(taken) => {
                sharing.answered(now.mono);
                match ask {
                    SharedAsk::Tokens(ask) => self.take(limit_index, ask.key, taken),
                    SharedAsk::Slots(ask) => self.hold(ask.key, ask.cost),
                }
                None
            }
            Decision::Refused { retry_after } => {
                sharing.answered(now.mono);
                round.admitted &= !enforced;
                Some(retry_after)
            }
            Decision::Lost => {
                sharing.lost(now.mono);
                plan.limits[limit_index].metrics.lost.inc();
                match limit.on_redis_loss {
                    OnLoss::Local => {
                        let alive = plan.fleet.as_ref().map_or(1, |fleet| fleet.alive());
                        let room_for = match &limit.cost {
                            Cost::Constant(cost) => *cost,
                            Cost::Header { default, .. } => *default,
                        };
                        let part = limit::share(rules, alive, room_for);
                        self.leave_alone(limit_index, rules.clone(), part);
                    }
                    OnLoss::Allow => {}
                    OnLoss::Deny if enforced => round.lost.push(limit_index),
                    OnLoss::Deny => {}
                }
                return;
            }
        };
        let shared = round.shared;
        let charged = if refused.is_some() { 0 } else { cost };
        let mut say = |rule, verdict| {
            round.said.push(OfRule {
                limit_index,
                rule,
                enforced,
                verdict,
                charged,
            });
        };
        match ask {
            SharedAsk::Slots(ask) => {
                let verdict = shared.slots.verdict(ask, decision);
                say(Rule::Slots(ask.slots), verdict);
            }
            SharedAsk::Tokens(ask) => {
                let all = ask.windows.iter().zip(&views);
                let said = |(window, view): (&Window, _)| {
                    say(Rule::Window(*window), verdict(view, &views, refused));
                };
                all.for_each(said);
            }
        }
    }
}

/// What a rule says among all, as far as it is known here. `refused`: that the limit refuses, and for how long.
fn verdict(view: &RuleView, views: &[RuleView], refused: Option<Option<Duration>>) -> Verdict {
    let refuses = || {
        // What refuses for want of an answer, not by a rule, is told of the tightest.
        let tightest = || views.iter().map(|view| view.remaining).min();
        let blamed = !views.iter().any(|view| view.refuses);
        view.refuses || (blamed && Some(view.remaining) == tightest())
    };
    let refused = refused.filter(|_| refuses());
    Verdict {
        admitted: refused.is_none(),
        remaining: view.remaining,
        reset: view.reset,
        retry_after: refused.flatten(),
    }
}
