//! The limits that a request has in common with those at other processes: asked of leases, and of Redis where those do not
//! do; and what becomes of a request while Redis does not answer. The words for clients are `quota`'s.

use std::time::Duration;

use futures_util::future::join_all;
use smallvec::SmallVec;

use super::quota::{Facts, Parts, Quota, Said, cost, rules_for};
use super::record::Record;
use super::reply::Rejection;
use crate::clock;
use crate::config::limits::{Limit, Mode, OnLoss, Rule};
use crate::plan::{Plan, SharedAsk};
use crate::policy::lease::RuleView;
use crate::policy::limit::{self, Now, Verdict};
use crate::store::fleet::FleetConnections;
use crate::store::leases::{self, Decision, Leases};

/// A shared limit that a request meets.
struct Met<'a> {
    limit_index: usize,
    limit: &'a Limit,
    parts: Parts<'a>,
    /// All of one kind; a concurrency limit has one.
    rules: SmallVec<[Rule; 1]>,
}

impl Quota<'_> {
    /// Asks those of these limits that are shared; a refusal by one of them charges none. Where Redis does not answer, a limit
    /// is left to [`Quota::charge`], let pass, or the request is refused, as the file says.
    pub(super) async fn share(
        &mut self,
        redis: &FleetConnections,
        limits: &[usize],
        facts: &Facts<'_>,
        now: Now,
        record: &mut Record,
    ) -> Result<(), Rejection> {
        let plan = self.plan;
        let (Some(fleet), Some(shared)) = (&plan.fleet, &plan.shared_limits) else {
            return Ok(());
        };
        let met = meet(self, limits, facts)?;
        if met.is_empty() {
            return Ok(());
        }
        let redis = &redis.rate_limit;
        let asks = met.iter().filter_map(|met| {
            let cost = cost(met.limit, facts);
            let ask = plan.shared_ask(met.limit_index, &met.parts, &met.rules, cost);
            ask.map(|ask| ask.after(self.waited))
        });
        let asks: SmallVec<[SharedAsk<'_>; 2]> = asks.collect();
        let decide = |ask: &SharedAsk<'_>| match ask {
            SharedAsk::Tokens(ask) => shared.leases.decide(redis, ask, now.mono),
            SharedAsk::Slots(_) => None,
        };
        let mut decisions: SmallVec<[Option<Decision>; 2]> = asks.iter().map(decide).collect();
        // Of what is known once all have answered.
        let mut told_at = now.mono;
        if decisions.contains(&None) {
            let began = clock::mono();
            let open = decisions.iter_mut().zip(&asks);
            let open = open.filter(|(decision, _)| decision.is_none());
            let answered = open.map(|(decision, ask)| async {
                *decision = Some(match ask {
                    SharedAsk::Tokens(ask) => shared.leases.ask(redis, ask).await,
                    SharedAsk::Slots(ask) => shared.slots.take(redis, ask).await,
                });
            });
            join_all(answered).await;
            told_at = clock::mono();
            self.waited += told_at.saturating_sub(began);
        }
        let mut admitted = true;
        let mut said = SmallVec::<[Said<'_>; 4]>::new();
        let mut lost = None;
        for ((met, ask), decision) in met.iter().zip(&asks).zip(decisions) {
            let enforced = met.limit.mode == Mode::Enforce;
            let sharing = &plan.sharing[met.limit_index];
            let decision = decision.unwrap_or(Decision::Lost);
            match decision {
                Decision::Admitted(taken) => {
                    sharing.answered(now.mono);
                    match ask {
                        SharedAsk::Tokens(ask) => self.taken.push((ask.key, taken)),
                        SharedAsk::Slots(ask) => self.slots.push((ask.key, ask.cost)),
                    }
                }
                Decision::Refused { .. } => {
                    sharing.answered(now.mono);
                    admitted &= !enforced;
                }
                Decision::Lost => {
                    sharing.lost(now.mono);
                    plan.limit_metrics[met.limit_index].lost.inc();
                    match met.limit.on_redis_loss {
                        OnLoss::Local => {
                            let part = |rule| limit::share(rule, fleet.alive());
                            let rules = met.rules.iter().map(part).collect();
                            self.alone.push((met.limit_index, rules));
                        }
                        OnLoss::Allow => {}
                        OnLoss::Deny if enforced => lost = Some(Rejection::LimitUnknown),
                        OnLoss::Deny => {}
                    }
                    continue;
                }
            }
            let verdicts = match ask {
                SharedAsk::Tokens(ask) => verdicts(&shared.leases, ask, decision, told_at),
                SharedAsk::Slots(ask) => {
                    [shared.slots.verdict(ask, decision)].into_iter().collect()
                }
            };
            let of_rules = met.rules.iter().zip(verdicts);
            said.extend(of_rules.map(|(rule, verdict)| Said {
                limit: met.limit_index,
                rule,
                enforced,
                verdict,
            }));
        }
        let passes = admitted && lost.is_none();
        let said = said.iter().map(|said| Said { ..*said });
        self.note(passes, said, record);
        if passes {
            return Ok(());
        }
        self.put_back(now);
        Err(lost.filter(|_| admitted).unwrap_or_else(|| self.refusal()))
    }
}

/// Which of the limits are shared, and meet the request.
fn meet<'a, 'p: 'a>(
    quota: &Quota<'p>,
    limits: &[usize],
    facts: &Facts<'a>,
) -> Result<SmallVec<[Met<'a>; 2]>, Rejection> {
    let plan: &'p Plan = quota.plan;
    let overrides = plan.limits.overrides();
    let mut met = SmallVec::new();
    for limit_index in limits.iter().copied() {
        let limit = &plan.config.limits[limit_index];
        if limit.mode == Mode::Disabled || !plan.shares(limit) {
            continue;
        }
        let Some(parts) = quota.key(limit_index, facts)? else {
            continue;
        };
        if let Some(rules) = rules_for(limit, &parts, &overrides) {
            met.push(Met {
                limit_index,
                limit,
                rules: rules.into(),
                parts,
            });
        }
    }
    Ok(met)
}

/// What each rule says, as far as it is known here.
fn verdicts(
    leases: &Leases,
    ask: &leases::Ask<'_>,
    decision: Decision,
    now: Duration,
) -> SmallVec<[Verdict; 1]> {
    let refused = match decision {
        Decision::Refused { retry_after } => Some(retry_after),
        Decision::Admitted(_) | Decision::Lost => None,
    };
    let views = leases.rules(ask.key, now);
    // What refuses for want of an answer, not by a rule, is told of the tightest.
    let blamed = refused.is_some() && !views.iter().any(|view| view.refuses);
    let tightest = views.iter().map(|view| view.remaining).min();
    let verdict = |view: &RuleView| {
        let refuses = view.refuses || (blamed && Some(view.remaining) == tightest);
        let refuses = refused.filter(|_| refuses);
        Verdict {
            admitted: refuses.is_none(),
            remaining: view.remaining,
            reset: view.reset,
            retry_after: refuses.flatten(),
        }
    };
    views.iter().map(verdict).collect()
}
