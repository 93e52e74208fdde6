//! The limits that a request has in common with those at other processes: asked of leases, and of Redis where those do not
//! do; and what becomes of a request while Redis does not answer. The words for clients are `quota`'s.

use std::time::Duration;

use futures_util::future::join_all;
use smallvec::SmallVec;

use super::quota::{Facts, Parts, Quota, Said, cost, rules_for};
use super::record::Record;
use super::reply::Rejection;
use crate::clock;
use crate::config;
use crate::config::limits::{Accuracy, Limit, Mode, OnLoss, Rule};
use crate::plan::Plan;
use crate::policy::lease::{RuleView, Terms};
use crate::policy::limit::{self, Now, Verdict};
use crate::store::fleet::{Fleet, FleetConnections};
use crate::store::leases::{Ask, Decision, Leases};
use crate::store::limits::Key;

/// A shared limit that a request meets.
struct Met<'a> {
    limit_index: usize,
    limit: &'a Limit,
    parts: Parts<'a>,
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
        let (Some(fleet), Some(leases)) = (&plan.fleet, &plan.leases) else {
            return Ok(());
        };
        let met = meet(self, limits, facts)?;
        if met.is_empty() {
            return Ok(());
        }
        let asks: SmallVec<[Ask<'_>; 2]> = met
            .iter()
            .map(|met| Ask {
                key: key(plan, met),
                limit: &met.limit.name,
                parts: &met.parts,
                rules: &met.rules,
                cost: cost(met.limit, facts),
                terms: terms(fleet, plan.config.limit_defaults.lease, met.limit),
            })
            .collect();
        let mut decisions: SmallVec<[Option<Decision>; 2]> = asks
            .iter()
            .map(|ask| leases.decide(&redis.rate_limit, ask, now.mono))
            .collect();
        // Of what is known once all have answered.
        let mut told_at = now.mono;
        if decisions.contains(&None) {
            let open = decisions.iter_mut().zip(&asks);
            let open = open.filter(|(decision, _)| decision.is_none());
            let answered = open.map(|(decision, ask)| async {
                *decision = Some(leases.ask(&redis.rate_limit, ask).await);
            });
            join_all(answered).await;
            told_at = clock::mono();
        }
        let mut admitted = true;
        let mut said = SmallVec::<[Said<'_>; 4]>::new();
        let mut lost = None;
        for ((met, ask), decision) in met.iter().zip(&asks).zip(decisions) {
            let enforced = met.limit.mode == Mode::Enforce;
            let sharing = &plan.sharing[met.limit_index];
            let decision = decision.unwrap_or(Decision::Lost);
            match decision {
                Decision::Admitted => {
                    sharing.answered(now.mono);
                    self.taken.push((ask.key, ask.cost));
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
            let verdicts = verdicts(leases, ask, decision, told_at);
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

/// Of the limit's leases, all rules of which lie together.
fn key(plan: &Plan, met: &Met<'_>) -> Key {
    let mut key = plan.limit_keys[met.limit_index].of_rule(0, &met.rules[0]);
    met.parts.iter().for_each(|part| key.part(part));
    key.finish()
}

/// How the limit is asked about.
pub(super) fn terms(fleet: &Fleet, lease: config::limits::Lease, limit: &Limit) -> Terms {
    Terms {
        ttl: lease.ttl,
        // One process alone may as well have all there is.
        share: lease.max_share.max(1.0 / fleet.alive().max(1) as f64),
        strict: limit.accuracy == Accuracy::Strict,
        patience: fleet.rate_limit.timeout,
    }
}

/// What each rule says, as far as it is known here.
fn verdicts(
    leases: &Leases,
    ask: &Ask<'_>,
    decision: Decision,
    now: Duration,
) -> SmallVec<[Verdict; 1]> {
    let refused = match decision {
        Decision::Refused { retry_after } => Some(retry_after),
        Decision::Admitted | Decision::Lost => None,
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
