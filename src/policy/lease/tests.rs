//! Whole fleets of processes against the promise, each with a lease of one authority; the rules of one lease are `rules`', as tests.

mod rules;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use proptest::prelude::*;

use super::*;
use crate::config::limits::{Period, Rule, Window};
use crate::policy::limit::{self, Now, State};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const TERMS: Terms = Terms {
    ttl: Duration::from_millis(50),
    share: 0.1,
    strict: false,
    patience: Duration::from_millis(20),
};

/// What the scripts of `lua/` do, by the arithmetic of memory.
struct Authority {
    rule: Rule,
    state: State,
}

impl Authority {
    fn grant(&mut self, request: &Request, now: Duration) -> Grant {
        let moment = Now {
            mono: now,
            wall: now,
        };
        let free = limit::check(&self.rule, &self.state, 0, moment).remaining;
        let ahead = request.want.min((free as f64 * request.share) as u64);
        let tokens = match free >= request.first {
            true => free.min(request.need.max(ahead)),
            false => 0,
        };
        if tokens > 0 {
            limit::take(&self.rule, &mut self.state, tokens, moment);
        }
        let lacking = if tokens == 0 { request.first.max(1) } else { 1 };
        let refused = limit::check(&self.rule, &self.state, lacking, moment);
        let refusal = match refused.retry_after {
            Some(wait) => Refusal::For(wait),
            None => Refusal::Ever,
        };
        let after = limit::check(&self.rule, &self.state, 0, moment);
        let void_after =
            matches!(self.rule, Rule::Window(Window::Fixed { .. })).then_some(after.reset);
        let rule = RuleState {
            remaining: after.remaining,
            reset: after.reset,
            refusal: (tokens < request.need && !refused.admitted).then_some(refusal),
            void_after,
        };
        Grant {
            tokens,
            at: u64::try_from(now.as_micros()).unwrap(),
            rules: [rule].into_iter().collect(),
        }
    }
}

/// Many processes, each with a clock of its own, and one authority behind a network that delays and loses.
struct Fleet {
    authority: Authority,
    terms: Terms,
    nodes: Vec<Node>,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    next_event: u64,
    network: Network,
    random: fastrand::Rng,
    admitted: Vec<(Duration, u64)>,
    questions: u64,
}

struct Node {
    lease: Lease,
    /// Ahead of true time.
    skew: Duration,
    /// The question under way, by its number.
    asking: Option<(u64, Request)>,
}

#[derive(Debug, Clone, Copy)]
struct Network {
    /// One way, at most.
    delay: Duration,
    /// Of questions and of answers.
    loss: f64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives {
        node: usize,
        cost: u64,
        tries: u32,
    },
    Reaches {
        node: usize,
        question: u64,
    },
    Answers {
        node: usize,
        question: u64,
        grant: usize,
    },
    GivesUp {
        node: usize,
        question: u64,
    },
}

impl Fleet {
    fn new(rule: Rule, terms: Terms, nodes: usize, network: Network, seed: u64) -> Fleet {
        let mut random = fastrand::Rng::with_seed(seed);
        let node = |_| Node {
            lease: Lease::default(),
            skew: Duration::from_millis(random.u64(0..10_000_000)),
            asking: None,
        };
        Fleet {
            authority: Authority {
                rule,
                state: State::default(),
            },
            terms,
            nodes: (0..nodes).map(node).collect(),
            now: 1_000 * SECOND,
            events: BinaryHeap::new(),
            next_event: 0,
            network,
            random,
            admitted: Vec::new(),
            questions: 0,
        }
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.next_event += 1;
        self.events.push(Reverse((time, self.next_event, event)));
    }

    /// Requests of `costs` at random nodes, `per_second` of them, for `time`.
    fn run(&mut self, time: Duration, per_second: u64, costs: std::ops::Range<u64>) {
        let start = self.now;
        for _ in 0..per_second * u64::try_from(time.as_millis()).unwrap() / 1000 {
            let offset = time.mul_f64(self.random.f64());
            let node = self.random.usize(0..self.nodes.len());
            let cost = self.random.u64(costs.clone());
            let tries = 0;
            self.at(start + offset, Event::Arrives { node, cost, tries });
        }
        let mut grants = Vec::new();
        while let Some(Reverse((now, _, event))) = self.events.pop() {
            self.now = now;
            match event {
                Event::Arrives { node, cost, tries } => self.arrives(node, cost, tries),
                Event::Reaches { node, question } => {
                    let Some((asked, request)) = self.nodes[node].asking else {
                        continue;
                    };
                    if asked != question {
                        continue;
                    }
                    grants.push((now, self.authority.grant(&request, now)));
                    let grant = grants.len() - 1;
                    if let Some(later) = self.passes() {
                        self.at(
                            now + later,
                            Event::Answers {
                                node,
                                question,
                                grant,
                            },
                        );
                    }
                }
                Event::Answers {
                    node,
                    question,
                    grant,
                } => {
                    let terms = self.terms;
                    let Node {
                        lease,
                        skew,
                        asking,
                    } = &mut self.nodes[node];
                    let Some((_, request)) = asking.take_if(|(asked, _)| *asked == question) else {
                        continue;
                    };
                    let (granted_at, grant) = &grants[grant];
                    let taken = lease.granted(&request, grant, &terms, now + *skew);
                    // Whoever asked is of the window in which Redis decided, however long the answer takes.
                    if let Some(taken) = taken.filter(|taken| taken.tokens > 0) {
                        self.admitted.push((*granted_at, taken.tokens));
                    }
                }
                Event::GivesUp { node, question } => {
                    let Node { lease, asking, .. } = &mut self.nodes[node];
                    if asking.take_if(|(asked, _)| *asked == question).is_some() {
                        lease.unanswered();
                    }
                }
            }
        }
        self.admitted.sort_unstable();
    }

    fn arrives(&mut self, node: usize, cost: u64, tries: u32) {
        let (now, terms) = (self.now, self.terms);
        let Node { lease, skew, .. } = &mut self.nodes[node];
        let local = now + *skew;
        let question = match lease.take(cost, local) {
            Answer::Admitted(_) => {
                let low = lease.runs_low(&terms, local);
                let request = low.then(|| lease.ask(0, &terms, local));
                self.admitted.push((now, cost));
                request
            }
            Answer::Refused { .. } => None,
            Answer::Ask => Some(lease.ask(cost, &terms, local)),
            Answer::Wait(_) => {
                if tries < 5 {
                    let tries = tries + 1;
                    self.at(now + 4 * MS, Event::Arrives { node, cost, tries });
                }
                None
            }
        };
        if let Some(request) = question {
            self.questions += 1;
            let question = self.questions;
            self.nodes[node].asking = Some((question, request));
            if let Some(later) = self.passes() {
                self.at(now + later, Event::Reaches { node, question });
            }
            self.at(now + terms.patience, Event::GivesUp { node, question });
        }
    }

    /// How long a message takes, unless it is lost.
    fn passes(&mut self) -> Option<Duration> {
        let delay = self.network.delay.mul_f64(self.random.f64());
        (self.random.f64() >= self.network.loss).then_some(delay)
    }

    fn total(&self) -> u64 {
        self.admitted.iter().map(|(_, cost)| cost).sum()
    }
}

/// Over every span that begins and ends with an admission: at most `burst` + `rate` × (span + `slack`).
fn bucket_holds(
    admitted: &[(Duration, u64)],
    burst: u64,
    rate: f64,
    slack: Duration,
) -> Result<(), String> {
    // The worst start of a span is a running minimum of what had been admitted before it, less what the rate allows.
    let (mut sum, mut least) = (0, f64::INFINITY);
    for (time, cost) in admitted {
        let allowed = time.as_secs_f64() * rate;
        least = least.min(sum as f64 - allowed);
        sum += cost;
        let over = sum as f64 - allowed - least - burst as f64 - rate * slack.as_secs_f64();
        if over > 1e-6 {
            return Err(format!("{over} too many by {time:?}"));
        }
    }
    Ok(())
}

#[test]
fn a_hot_key_costs_few_questions() {
    let rule = Rule::Window(Window::Bucket {
        count: 1_000_000,
        per: SECOND,
        burst: 1_000_000,
    });
    let network = Network {
        delay: MS / 2,
        loss: 0.0,
    };
    let mut fleet = Fleet::new(rule, TERMS, 1, network, 7);
    fleet.run(2 * SECOND, 50_000, 1..2);
    let (total, questions) = (fleet.total(), fleet.questions);
    assert!(total > 99_000, "{total} of 100,000 admitted");
    assert!(questions * 100 < total, "{questions} questions for {total}");
}

#[test]
fn a_flood_of_a_hot_key_costs_few_questions() {
    let rule = Rule::Window(Window::Bucket {
        count: 10_000,
        per: SECOND,
        burst: 10_000,
    });
    let network = Network {
        delay: MS / 2,
        loss: 0.0,
    };
    for nodes in [1, 8] {
        let mut fleet = Fleet::new(rule, TERMS, nodes, network, 7);
        fleet.run(2 * SECOND, 200_000, 1..2);
        let (total, questions) = (fleet.total(), fleet.questions);
        assert!(total >= 29_400, "{nodes} nodes: {total} of 30,000 admitted");
        assert!(
            questions < 4_000,
            "{nodes} nodes: {questions} questions for 400,000"
        );
    }
}

#[test]
fn what_is_allowed_is_used_up_when_many_ask() {
    let network = Network {
        delay: MS,
        loss: 0.0,
    };
    for strict in [false, true] {
        let terms = Terms { strict, ..TERMS };
        let bucket = Rule::Window(Window::Bucket {
            count: 100,
            per: SECOND,
            burst: 100,
        });
        let mut fleet = Fleet::new(bucket, terms, 8, network, 3);
        fleet.run(10 * SECOND, 10_000, 1..2);
        let total = fleet.total();
        assert!((1_078..=1_105).contains(&total), "bucket: {total} of 1,100");
        let window = Rule::Window(Window::Fixed {
            limit: 100,
            period: Period::Fixed(SECOND),
        });
        let mut fleet = Fleet::new(window, terms, 8, network, 3);
        fleet.run(10 * SECOND, 10_000, 1..2);
        let end = 1_010 * SECOND;
        fleet.admitted.retain(|(time, _)| *time < end);
        let total = fleet.total();
        assert!((980..=1_000).contains(&total), "window: {total} of 1,000");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_fleet_takes_more_than_was_promised(
        nodes in prop_oneof![1usize..10, 100usize..=200],
        (count, burst) in (1u64..2_000, 1u64..500),
        per_second in 10u64..5_000,
        (delay, loss) in (0u64..15, prop_oneof![Just(0.0), 0.0..0.3]),
        strict in any::<bool>(),
        most in 1u64..4,
        seed in any::<u64>(),
    ) {
        let network = Network { delay: Duration::from_millis(delay), loss };
        let terms = Terms { strict, ..TERMS };
        let bucket = Rule::Window(Window::Bucket { count, per: SECOND, burst });
        let mut fleet = Fleet::new(bucket, terms, nodes, network, seed);
        fleet.run(2 * SECOND, per_second, 1..most + 1);
        let held = bucket_holds(&fleet.admitted, burst, count as f64, terms.ttl);
        prop_assert!(held.is_ok(), "{held:?}");

        let window = Rule::Window(Window::Fixed { limit: burst, period: Period::Fixed(200 * MS) });
        let mut fleet = Fleet::new(window, terms, nodes, network, seed);
        fleet.run(2 * SECOND, per_second, 1..most + 1);
        let mut sums = BTreeMap::new();
        for (time, cost) in &fleet.admitted {
            *sums.entry(time.as_nanos() / (200 * MS).as_nanos()).or_insert(0) += cost;
        }
        prop_assert!(sums.values().all(|sum| *sum <= burst), "{burst}: {sums:?}");
    }
}
