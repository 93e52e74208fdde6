//! Leases: tokens of a limit that Redis has debited already, which a process spends without asking again. Owns when Redis is
//! asked, for how many, and what is refused meanwhile. Pure: no I/O, no clock; `now` is time since one origin of the process.
//!
//! The promise rests on one rule: a token is spent within `ttl` of the moment before it was asked for, or not at all. So what all
//! processes spend in a window w was debited within w + ttl, and a token of a fixed window dies with its window, whatever
//! clocks say: times come from Redis as durations, and count from before the question.

use std::time::Duration;

use smallvec::SmallVec;

/// Tokens of one lease, at most: they are lost with the process.
const MOST: u64 = 1 << 20;
/// A lease smaller than this is not renewed ahead of its end.
const RENEWED_FROM: u64 = 8;

/// Demand is forgotten after as many times the life of a token.
const FORGOTTEN: u32 = 8;

/// How long a refusal is believed, at most: tokens may come back before their time, from a lease that was not spent or by an
/// operator's hand. A flood of a key costs a question each time.
const REMEMBERED: Duration = Duration::from_secs(1);

/// How a limit is asked about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// How long a token may be spent.
    pub ttl: Duration,
    /// The most that a lease may take of what remains, beyond what is needed at once: 0 to 1.
    pub share: f64,
    /// Whether no token is taken ahead of its need.
    pub strict: bool,
    /// How long an answer is waited for.
    pub patience: Duration,
}

/// What Redis is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// The first of those who wait: less than this is a refusal. 0: nobody waits.
    pub first: u64,
    /// For all who wait.
    pub need: u64,
    /// With what is likely to be needed soon.
    pub want: u64,
    /// Of what remains, what may be taken beyond the need.
    pub share: f64,
    /// Unspent tokens that go back, and when they were debited, by Redis's clock.
    pub back: Batch,
    /// When it was asked, by the process's clock.
    asked: Duration,
}

/// What Redis answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    pub tokens: u64,
    /// Microseconds since the Unix epoch, by Redis's clock.
    pub at: u64,
    /// By rule of the limit.
    pub rules: SmallVec<[RuleState; 1]>,
}

/// One rule of a limit, as Redis sees it once the request is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleState {
    pub remaining: u64,
    /// Until the quota is whole again.
    pub reset: Duration,
    pub refusal: Option<Refusal>,
    /// Until tokens that it granted are void: the end of a fixed window.
    pub void_after: Option<Duration>,
}

/// Why a rule does not grant what the first of those who wait needs; or, where that was granted and less than all need, one token more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Until it can.
    For(Duration),
    /// It never can: the cost is above the limit.
    Ever,
}

/// Tokens debited together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batch {
    pub tokens: u64,
    /// When, by Redis's clock, in microseconds since the Unix epoch.
    pub taken_at: u64,
    /// They may be spent before.
    until: Duration,
}

impl Refused {
    fn retry_after(&self, now: Duration) -> Option<Duration> {
        (!self.ever).then(|| self.retry_at.saturating_sub(now))
    }
}

impl Batch {
    fn spend(&mut self, tokens: u64) -> Batch {
        self.tokens -= tokens;
        Batch { tokens, ..*self }
    }

    /// As if all were taken when the older ones were.
    fn join(&mut self, other: Batch) {
        if self.tokens == 0 {
            *self = other;
        } else if other.tokens > 0 {
            self.tokens += other.tokens;
            self.taken_at = self.taken_at.min(other.taken_at);
            self.until = self.until.min(other.until);
        }
    }
}

/// What becomes of a request of some cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// These are spent.
    Admitted(Batch),
    /// It is refused, for as long as no other answer of Redis comes; `None`: for ever.
    Refused { retry_after: Option<Duration> },
    /// Redis must be asked, by the caller: see [`Lease::ask`].
    Ask,
    /// Redis is being asked; try again once it has answered, and [`Lease::leave`] before.
    Wait(Round),
}

/// Between two questions about a key: who waits is asked for by the one that ends it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round(u32);

/// What a process holds of one limit for one key. The default is a key never seen.
#[derive(Debug, Clone, Default)]
pub struct Lease {
    current: Batch,
    next: Batch,
    unspent: Batch,
    /// Spent since the last grant.
    spent: u64,
    /// What the last grant was, and when.
    size: u64,
    sized_at: Duration,
    /// How often one behind the other a grant fell short.
    hunger: u32,
    /// Redis is being asked until then, unless it answers before.
    asking_until: Duration,
    /// What those need who wait for it.
    waiting: u64,
    round: Round,
    refused: Option<Refused>,
    /// Nothing is asked ahead of its need before.
    sated_until: Duration,
    rules: SmallVec<[Seen; 1]>,
}

#[derive(Debug, Clone, Copy)]
struct Refused {
    /// Redis is not asked before.
    until: Duration,
    /// When the same request can be admitted, as far as Redis knew.
    retry_at: Duration,
    /// What was refused; a smaller cost may still pass.
    cost: u64,
    ever: bool,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    remaining: u64,
    reset_at: Duration,
    refuses: bool,
}

/// One rule of a limit, as far as a process knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleView {
    pub remaining: u64,
    pub reset: Duration,
    /// Whether it was this rule that refused last.
    pub refuses: bool,
}

impl Lease {
    /// Spends `cost`, if that can be decided here.
    pub fn take(&mut self, cost: u64, now: Duration) -> Answer {
        self.expire(now);
        if self.held() >= cost && (cost > 0 || !self.rules.is_empty()) {
            let of_current = cost.min(self.current.tokens);
            let mut taken = self.current.spend(of_current);
            taken.join(self.next.spend(cost - of_current));
            self.spent += cost;
            return Answer::Admitted(taken);
        }
        match self.refused {
            Some(refused) if now < refused.until && cost >= refused.cost => {
                return Answer::Refused {
                    retry_after: refused.retry_after(now),
                };
            }
            Some(_) | None => {}
        }
        if now < self.asking_until {
            self.waiting = self.waiting.saturating_add(cost);
            return Answer::Wait(self.round);
        }
        Answer::Ask
    }

    /// A request that was told to wait does so no more: it looks again, or has given up. Once it was asked for, it is not
    /// among those who wait, and must not be taken from their number.
    pub fn leave(&mut self, cost: u64, round: Round) {
        if round == self.round {
            self.waiting = self.waiting.saturating_sub(cost);
        }
    }

    /// Gives back what a request took that was refused elsewhere. It can be spent again with those that it was debited with,
    /// for as long as they can; with any others it would outlive its own time, and its window.
    pub fn put_back(&mut self, taken: Batch, now: Duration) {
        self.expire(now);
        self.spent = self.spent.saturating_sub(taken.tokens);
        let lives = taken.until > now;
        if lives && self.current.until == taken.until {
            self.current.tokens += taken.tokens;
        } else if lives && self.next.tokens > 0 && self.next.until == taken.until {
            self.next.tokens += taken.tokens;
        } else if taken.tokens > 0 {
            self.unspent.join(taken);
            // The next question takes it along.
            self.refused = None;
        }
    }

    /// Whether more is to be asked for now, so that nobody has to wait for it later.
    pub fn runs_low(&self, terms: &Terms, now: Duration) -> bool {
        !terms.strict
            && self.size >= RENEWED_FROM
            && now >= self.asking_until
            && now >= self.sated_until
            && self.next.tokens == 0
            && (self.current.tokens < self.size / 4
                || self.current.until.saturating_sub(now) < terms.ttl / 4)
    }

    /// What to ask for a request of `cost`, or for nobody (0). Until [`Lease::granted`] or [`Lease::unanswered`], others wait.
    pub fn ask(&mut self, cost: u64, terms: &Terms, now: Duration) -> Request {
        self.expire(now);
        let need = cost.saturating_add(std::mem::take(&mut self.waiting));
        self.round.0 = self.round.0.wrapping_add(1);
        if now.saturating_sub(self.sized_at) > terms.ttl * FORGOTTEN {
            (self.size, self.spent, self.hunger) = (0, 0, 0);
        }
        // As much as is spent in the life of a token at the pace so far; a lease grows fourfold at a time, at most.
        let span = now.saturating_sub(self.sized_at).max(terms.ttl / 64);
        let pace = self.spent as f64 * terms.ttl.as_secs_f64() / span.as_secs_f64();
        let likely = ((pace * 1.25) as u64).min(self.size.saturating_mul(4));
        let want = if terms.strict { need } else { need.max(likely) };
        let back = std::mem::take(&mut self.unspent);
        self.asking_until = now + terms.patience;
        Request {
            first: cost,
            need,
            want: want.min(MOST.max(need)),
            // Whoever starves may take more: it spends that at once, so that it starves no one for long.
            share: (terms.share * f64::from(1u32 << self.hunger.min(16))).min(1.0),
            back,
            asked: now,
        }
    }

    /// Takes in what Redis granted, at `now`; the request of `first` is admitted at once, if it is: what it spent.
    pub fn granted(
        &mut self,
        request: &Request,
        grant: &Grant,
        terms: &Terms,
        now: Duration,
    ) -> Option<Batch> {
        self.expire(now);
        self.asking_until = Duration::ZERO;
        let asked = request.asked;
        let ends = |rule: &RuleState| rule.void_after;
        let life = grant
            .rules
            .iter()
            .filter_map(ends)
            .fold(terms.ttl, Duration::min);
        let reset = grant.rules.iter().map(|rule| rule.reset).max();
        // An empty bucket is let fill for a while, else each token would cost a question.
        let breather = match terms.strict {
            true => Duration::ZERO,
            false => (terms.ttl / 4).min(reset.unwrap_or_default() / 4),
        };
        self.rules = grant
            .rules
            .iter()
            .map(|rule| Seen {
                remaining: rule.remaining,
                reset_at: asked + rule.reset,
                refuses: rule.refusal.is_some(),
            })
            .collect();
        // A refusal says nothing of the demand.
        if grant.tokens > 0 {
            (self.size, self.spent, self.sized_at) = (grant.tokens, 0, now);
        }
        let short = grant.tokens < request.want;
        // Only where others wait is all sure to be spent at once. A refusal leaves it as it is: what comes back to an empty bucket
        // is then taken by one question, not by many.
        let crowded = request.need > request.first;
        self.hunger = match (short, grant.tokens) {
            (false, _) => 0,
            (true, 1..) if crowded => self.hunger.saturating_add(1),
            (true, _) => self.hunger,
        };
        if short {
            self.sated_until = now + breather;
        }
        let admitted = grant.tokens >= request.first;
        let mut batch = Batch {
            tokens: grant.tokens,
            taken_at: grant.at,
            until: asked + life,
        };
        let taken = admitted.then(|| batch.spend(request.first));
        self.spent += taken.map_or(0, |taken| taken.tokens);
        self.keep(batch, now);
        let refusals = || grant.rules.iter().filter_map(|rule| rule.refusal);
        let waits = refusals().map(|refusal| match refusal {
            Refusal::For(wait) => wait,
            Refusal::Ever => terms.ttl,
        });
        self.refused = match (admitted, grant.tokens < request.need) {
            (false, _) => {
                let wait = waits.max().unwrap_or_default();
                Some(Refused {
                    until: asked + wait.min(REMEMBERED).max(breather),
                    retry_at: asked + wait.max(breather),
                    cost: request.first,
                    ever: refusals().any(|refusal| refusal == Refusal::Ever),
                })
            }
            // It was the last there was.
            (true, true) => Some(Refused {
                until: asked + breather,
                retry_at: asked + waits.max().unwrap_or_default().max(breather),
                cost: 0,
                ever: false,
            }),
            (true, false) => None,
        };
        taken
    }

    /// Redis has not answered. What it may have granted is lost, and what went back may not have arrived.
    pub fn unanswered(&mut self) {
        self.asking_until = Duration::ZERO;
        self.waiting = 0;
        self.round.0 = self.round.0.wrapping_add(1);
    }

    /// How long what was refused last is refused yet; `None`: for ever.
    pub fn retry_after(&self, now: Duration) -> Option<Duration> {
        self.refused?.retry_after(now)
    }

    /// What the rules say; empty until Redis has answered once.
    pub fn rules(&self, now: Duration) -> impl Iterator<Item = RuleView> {
        let held = self.held();
        self.rules.iter().map(move |rule| RuleView {
            remaining: rule.remaining.saturating_add(held),
            reset: rule.reset_at.saturating_sub(now),
            refuses: rule.refuses,
        })
    }

    fn held(&self) -> u64 {
        self.current.tokens + self.next.tokens
    }

    fn keep(&mut self, batch: Batch, now: Duration) {
        if batch.until <= now {
            self.unspent.join(batch);
            return;
        }
        if self.current.tokens == 0 {
            self.current = std::mem::take(&mut self.next);
        }
        if self.current.tokens == 0 {
            self.current = batch;
        } else {
            self.next.join(batch);
        }
        // Those that end first are spent first, and looked at alone when their time is over.
        if self.next.tokens > 0 && self.next.until < self.current.until {
            std::mem::swap(&mut self.current, &mut self.next);
        }
    }

    /// Tokens whose time is over are void here and go back with the next question.
    fn expire(&mut self, now: Duration) {
        while self.current.until <= now && self.held() > 0 {
            if self.current.tokens > 0 {
                self.unspent.join(self.current);
            }
            self.current = std::mem::take(&mut self.next);
        }
    }
}

#[cfg(test)]
mod tests;
