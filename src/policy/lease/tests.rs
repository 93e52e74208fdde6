//! The rules of `lease`, as tests, and whole fleets of processes against the promise.

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
fn a_key_seen_once_is_asked_for_once_and_takes_one() {
    let mut lease = Lease::default();
    assert_eq!(lease.take(1, SECOND), Answer::Ask);
    let request = lease.ask(1, &TERMS, SECOND);
    assert_eq!((request.first, request.need, request.want), (1, 1, 1));
    assert!(matches!(lease.take(2, SECOND), Answer::Wait(_)));
    let grant = Authority {
        rule: Rule::Window(Window::Bucket {
            count: 10,
            per: SECOND,
            burst: 10,
        }),
        state: State::default(),
    }
    .grant(&request, SECOND);
    let taken = lease.granted(&request, &grant, &TERMS, SECOND + MS);
    assert!(taken.is_some());
    assert_eq!(lease.take(1, SECOND + MS), Answer::Ask);
    assert_eq!(
        lease.ask(1, &TERMS, SECOND + MS).need,
        3,
        "with the one who waited"
    );
}

#[test]
fn all_who_wait_are_asked_for_each_time() {
    let mut lease = Lease::default();
    let grant = |tokens| Grant {
        tokens,
        at: 0,
        rules: SmallVec::new(),
    };
    let wait = |lease: &mut Lease| match lease.take(1, SECOND) {
        Answer::Wait(round) => round,
        other => panic!("{other:?}"),
    };
    let first = lease.ask(1, &TERMS, SECOND);
    let rounds = [(); 8].map(|()| wait(&mut lease));
    lease.granted(&first, &grant(1), &TERMS, SECOND);
    let second = lease.ask(1, &TERMS, SECOND);
    assert_eq!(second.need, 1 + 8);
    // Told of the first answer, they look again while the second is awaited.
    let rounds = rounds.map(|round| {
        lease.leave(1, round);
        wait(&mut lease)
    });
    lease.leave(1, rounds[0]);
    lease.granted(&second, &grant(1), &TERMS, SECOND);
    let third = lease.ask(1, &TERMS, SECOND);
    assert_eq!(third.need, 1 + 7, "one has left");
}

#[test]
fn the_last_tokens_are_taken_one_by_one() {
    let rule = Rule::Window(Window::Bucket {
        count: 8,
        per: 3_600 * SECOND,
        burst: 8,
    });
    let mut authority = Authority {
        rule,
        state: State::default(),
    };
    let (mut lease, mut now) = (Lease::default(), SECOND);
    for taken in 1..=8 {
        // Ten milliseconds apart, which is a pace that a larger lease would serve.
        now += 10 * MS;
        assert_eq!(lease.take(1, now), Answer::Ask, "{taken}");
        let request = lease.ask(1, &TERMS, now);
        let grant = authority.grant(&request, now);
        assert!(lease.granted(&request, &grant, &TERMS, now).is_some());
        assert_eq!(grant.rules[0].remaining, 8 - taken);
    }
}

/// What Redis grants `lease` of a fixed window that ends after `left`, to whoever asks for `cost` at `now`: what that spends.
fn grant_of_a_window(
    lease: &mut Lease,
    (cost, tokens): (u64, u64),
    left: Duration,
    now: Duration,
) -> Batch {
    let request = lease.ask(cost, &TERMS, now);
    let rule = RuleState {
        remaining: 100,
        reset: left,
        refusal: None,
        void_after: Some(left),
    };
    let grant = Grant {
        tokens,
        at: u64::try_from(now.as_micros()).unwrap(),
        rules: [rule].into_iter().collect(),
    };
    lease.granted(&request, &grant, &TERMS, now).unwrap()
}

#[test]
fn who_waits_behind_the_last_token_is_told_when_the_next_one_comes() {
    let rule = Rule::Window(Window::Fixed {
        limit: 1,
        period: Period::Fixed(3_600 * SECOND),
    });
    let (mut lease, state) = (Lease::default(), State::default());
    let mut authority = Authority { rule, state };
    assert_eq!(lease.take(1, SECOND), Answer::Ask);
    // One that waits is asked for by the next question, and both see the answer to that.
    let request = Request {
        need: 2,
        ..lease.ask(1, &TERMS, SECOND)
    };
    let grant = authority.grant(&request, SECOND);
    assert!(
        lease
            .granted(&request, &grant, &TERMS, SECOND + MS)
            .is_some()
    );
    let told = lease.take(1, SECOND + MS);
    let wait = 3_599 * SECOND - MS;
    let retry_after = Some(wait);
    assert_eq!(told, Answer::Refused { retry_after });
    // Which is believed for a moment.
    assert_eq!(lease.take(1, SECOND + 20 * MS), Answer::Ask);
}

#[test]
fn a_token_that_comes_back_is_not_spent_in_another_window() {
    let mut lease = Lease::default();
    // In flight when its window ends, and refused by another limit in the next.
    let taken = grant_of_a_window(&mut lease, (1, 1), 10 * MS, SECOND);
    let next = SECOND + 10 * MS;
    grant_of_a_window(&mut lease, (1, 3), SECOND, next);
    lease.put_back(taken, next + MS);
    let spent = (0..10).filter(|_| matches!(lease.take(1, next + MS), Answer::Admitted(_)));
    assert_eq!(spent.count(), 2, "what the next window granted");
    let back = lease.ask(1, &TERMS, next + MS).back;
    assert_eq!((back.tokens, back.taken_at), (1, taken.taken_at));

    // In time it is spent again.
    let mut lease = Lease::default();
    let taken = grant_of_a_window(&mut lease, (1, 1), SECOND, SECOND);
    lease.put_back(taken, SECOND + MS);
    assert_eq!(lease.take(1, SECOND + MS), Answer::Admitted(taken));
}

#[test]
fn a_token_that_comes_back_late_is_not_refused_to_others() {
    let mut lease = Lease::default();
    let taken = grant_of_a_window(&mut lease, (1, 1), SECOND, SECOND);
    let request = lease.ask(1, &TERMS, SECOND + MS);
    let mut authority = Authority {
        rule: Rule::Window(Window::Fixed {
            limit: 0,
            period: Period::Day,
        }),
        state: State::default(),
    };
    let refusal = authority.grant(&request, SECOND + MS);
    assert_eq!(lease.granted(&request, &refusal, &TERMS, SECOND + MS), None);
    // Its own time is over, that of the refusal is not.
    let late = SECOND + 50 * MS;
    assert!(matches!(lease.take(1, late), Answer::Refused { .. }));
    lease.put_back(taken, late);
    assert_eq!(lease.take(1, late), Answer::Ask);
    assert_eq!(lease.ask(1, &TERMS, late).back.tokens, 1);
}

#[test]
fn tokens_are_void_when_their_own_time_is_over() {
    let mut lease = Lease::default();
    grant_of_a_window(&mut lease, (1, 2), SECOND, SECOND);
    grant_of_a_window(&mut lease, (1, 3), SECOND, SECOND + 20 * MS);
    // Of the first lease none are left, of the second one.
    assert!(matches!(
        lease.take(2, SECOND + 21 * MS),
        Answer::Admitted(_)
    ));
    // A dear request finds too little and asks for more, which outlives that one.
    grant_of_a_window(&mut lease, (5, 6), SECOND, SECOND + 40 * MS);
    let late = SECOND + 75 * MS;
    assert!(matches!(lease.take(1, late), Answer::Admitted(_)));
    assert_eq!(
        lease.take(1, late),
        Answer::Ask,
        "its time was over at 70 ms"
    );
}

#[test]
fn a_request_that_costs_nothing_passes() {
    let mut lease = Lease::default();
    for rule in [
        Rule::Window(Window::Fixed {
            limit: 0,
            period: Period::Day,
        }),
        Rule::Window(Window::Bucket {
            count: 1,
            per: SECOND,
            burst: 1,
        }),
    ] {
        let state = State::default();
        assert_eq!(lease.take(0, SECOND), Answer::Ask);
        let request = lease.ask(0, &TERMS, SECOND);
        let grant = Authority { rule, state }.grant(&request, SECOND);
        assert!(lease.granted(&request, &grant, &TERMS, SECOND).is_some());
        assert!(matches!(lease.take(0, SECOND), Answer::Admitted(_)));
        lease = Lease::default();
    }
}

/// What Redis grants of `want` at `now`, to the first that needs one.
fn granted(lease: &mut Lease, (need, want): (u64, u64), tokens: u64, now: Duration) {
    let request = Request {
        need,
        want,
        ..lease.ask(1, &TERMS, now)
    };
    let rule = RuleState {
        remaining: 0,
        reset: SECOND,
        refusal: (tokens == 0).then_some(Refusal::For(3_600 * SECOND)),
        void_after: None,
    };
    let grant = Grant {
        tokens,
        at: 0,
        rules: [rule].into_iter().collect(),
    };
    lease.granted(&request, &grant, &TERMS, now);
}

#[test]
fn a_refusal_is_believed_for_a_second_and_not_of_a_smaller_cost() {
    let mut lease = Lease::default();
    granted(&mut lease, (1, 1), 0, SECOND);
    let over = 2 * SECOND;
    let retry_after = Some(3_599 * SECOND + MS);
    let refused = Answer::Refused { retry_after };
    assert_eq!(lease.take(1, over - MS), refused);
    lease.refused.as_mut().unwrap().cost = 2;
    assert_eq!(lease.take(2, over - MS), refused);
    assert_eq!(lease.take(1, over - MS), Answer::Ask);
    assert_eq!(lease.take(2, over), Answer::Ask);
}

#[test]
fn more_is_asked_for_before_a_lease_is_used_up_or_over() {
    let mut lease = Lease::default();
    granted(&mut lease, (1, 100), 100, SECOND);
    let low = |lease: &Lease, after| lease.runs_low(&TERMS, SECOND + after);
    assert_eq!([37, 38].map(|after| low(&lease, after * MS)), [false, true]);
    lease.take(74, SECOND);
    assert!(!low(&lease, MS), "a quarter is left");
    lease.take(1, SECOND);
    assert!(low(&lease, MS));
    // An empty bucket is let fill.
    let mut lease = Lease::default();
    granted(&mut lease, (1, 100), 10, SECOND);
    lease.take(9, SECOND);
    assert_eq!([12, 13].map(|after| low(&lease, after * MS)), [false, true]);
}

#[test]
fn who_has_given_up_is_not_asked_for() {
    let mut lease = Lease::default();
    lease.ask(1, &TERMS, SECOND);
    let Answer::Wait(first) = lease.take(2, SECOND) else {
        panic!("it is being asked");
    };
    lease.unanswered();
    assert_eq!(lease.ask(1, &TERMS, SECOND).need, 1);
    assert!(matches!(lease.take(3, SECOND), Answer::Wait(_)));
    lease.leave(2, first);
    assert_eq!(lease.ask(1, &TERMS, SECOND).need, 1 + 3);
}

#[test]
fn what_is_wanted_follows_what_is_spent() {
    let want = |lease: &Lease, after| lease.clone().ask(1, &TERMS, SECOND + after).want;
    let mut lease = Lease::default();
    granted(&mut lease, (1, 1_000), 1_000, SECOND);
    let Answer::Admitted(taken) = lease.take(999, SECOND) else {
        panic!("so many were granted");
    };
    assert_eq!([400, 401].map(|after| want(&lease, after * MS)), [156, 1]);
    // What was refused elsewhere was not spent.
    lease.put_back(taken, SECOND);
    assert_eq!(want(&lease, 10 * MS), 6);
}

#[test]
fn who_starves_among_others_may_take_a_larger_share_until_it_has_enough() {
    let mut lease = Lease::default();
    let mut share = |need, tokens| {
        granted(&mut lease, (need, 2), tokens, SECOND);
        lease.ask(1, &TERMS, SECOND).share / TERMS.share
    };
    assert_eq!(
        [(2, 1), (2, 1), (2, 0), (1, 1), (2, 2)].map(|(need, tokens)| share(need, tokens)),
        [2.0, 4.0, 4.0, 4.0, 1.0]
    );
}

#[test]
fn what_ends_first_is_spent_first() {
    let mut lease = Lease::default();
    grant_of_a_window(&mut lease, (1, 3), SECOND, SECOND);
    grant_of_a_window(&mut lease, (5, 6), 10 * MS, SECOND);
    let spent = |lease: &mut Lease, now| {
        (0..9)
            .filter(|_| matches!(lease.take(1, now), Answer::Admitted(_)))
            .count()
    };
    // Of the window that is over none.
    assert_eq!(spent(&mut lease.clone(), SECOND + 9 * MS), 3);
    assert_eq!(spent(&mut lease, SECOND + 10 * MS), 2);
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
