//! The rules of a shared breaker, as tests, and whole fleets of processes around a model of the script.

mod adopted;
mod model;
mod outages;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::{HalfOpen, SlowCall, Window};
use super::CallOutcome::{Failure, Success};
use super::*;
use model::{PROBES, Script, settings};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

/// Processes, the script, and what is on the way between them.
struct Sim {
    now: Duration,
    script: Script,
    members: Vec<Member>,
    requests: Vec<(usize, Report)>,
    replies: BTreeMap<usize, Reply>,
    /// Calls under way: process, permit, since when.
    calls: Vec<(usize, Permit, Duration)>,
    /// Results told to members, by process and the generation that admitted the call.
    results: BTreeMap<(usize, u64), u64>,
    /// Which of the members live; the others are dead.
    alive: Vec<usize>,
}

impl Sim {
    fn new(members: usize, quorum: usize) -> Sim {
        let member = |_| Member::new(settings(), OnLoss::Local);
        Sim {
            now: 100 * SECOND,
            script: Script::new(quorum),
            members: (0..members).map(member).collect(),
            requests: Vec::new(),
            replies: BTreeMap::new(),
            calls: Vec::new(),
            results: BTreeMap::new(),
            alive: (0..members).collect(),
        }
    }

    fn enter(&mut self, process: usize) -> bool {
        let (asked, _) = self.members[process].try_enter(self.now, 0.0);
        let entered = asked.is_ok();
        if let Ok(permit) = asked {
            self.calls.push((process, permit, self.now));
        }
        self.check_probes();
        entered
    }

    fn end(&mut self, index: usize, outcome: CallOutcome) {
        let (process, permit, since) = self.calls.swap_remove(index);
        if let Permit::Shared { generation, .. } = permit {
            *self.results.entry((process, generation)).or_default() += 1;
        }
        self.members[process].record(permit, outcome, self.now - since, self.now, 0.0);
    }

    /// Sends a report, unless one is on the way.
    fn send(&mut self, process: usize) {
        if self.members[process].flight.is_none() {
            let report = self.members[process].report(self.now);
            self.requests.push((process, report));
        }
    }

    /// The script runs one request, in any order.
    fn run(&mut self, index: usize) {
        let (process, report) = self.requests.remove(index);
        let brings = report.delta.calls > 0 || !report.results.is_empty() || report.doubts > 0;
        let tells = report.known.generation > self.script.generation;
        let joins = !self.script.members.contains_key(&process) && !brings && !tells;
        self.script.advance(self.now);
        let before = (self.script.generation, self.script.state);
        let reply = self.script.sync(process, &report, self.now);
        let after = (self.script.generation, self.script.state);
        assert!(
            !joins || before == after,
            "a process that joins changes nothing: {before:?} {after:?} {report:?}"
        );
        for (key, counted) in &self.script.counted {
            let told = self.results.get(key).copied().unwrap_or_default();
            assert!(
                *counted <= told,
                "{key:?}: a result counts once, where it belongs"
            );
        }
        if self.members[process].flight.is_some() {
            self.replies.insert(process, reply);
        }
    }

    fn deliver(&mut self, process: usize) {
        if let Some(reply) = self.replies.remove(&process) {
            self.members[process].answered(&reply, self.now);
        }
    }

    fn lose(&mut self, process: usize) {
        self.replies.remove(&process);
        self.members[process].unanswered(true, self.now);
    }

    /// A whole exchange.
    fn sync(&mut self, process: usize) {
        self.send(process);
        self.run(self.requests.len() - 1);
        self.deliver(process);
    }

    fn tell(&mut self, process: usize) {
        if let Some(word) = self.script.said.last().copied() {
            self.members[process].heard(word, self.now);
        }
    }

    /// Of the present generation no more probes are under way than there may be, those counted that have ended.
    fn check_probes(&self) {
        let timeout = self.script.settings.half_open.probe_timeout;
        let of_now = |(_, permit, since): &&(usize, Permit, Duration)| {
            let Permit::Shared {
                generation,
                probe: Some(_),
            } = permit
            else {
                return false;
            };
            *generation == self.script.generation && self.now < *since + timeout
        };
        let running = u32::try_from(self.calls.iter().filter(of_now).count()).unwrap();
        let (good, bad) = self.script.probed();
        assert!(running + good + bad <= PROBES);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Pass(u64),
    Enter(usize),
    End(prop::sample::Index, bool),
    Drop(prop::sample::Index),
    Send(usize),
    Run(prop::sample::Index),
    LoseRequest(prop::sample::Index),
    Deliver(usize),
    Lose(usize),
    Tell(usize),
    Whole(usize),
    Restart(usize),
    Reload(usize),
}

const MEMBERS: usize = 4;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let index = any::<prop::sample::Index>;
    let member = || 0..MEMBERS;
    prop::collection::vec(
        prop_oneof![
            3 => (0u64..1500).prop_map(Op::Pass),
            6 => member().prop_map(Op::Enter),
            5 => (index(), prop::bool::weighted(0.6)).prop_map(|(i, failed)| Op::End(i, failed)),
            1 => index().prop_map(Op::Drop),
            2 => member().prop_map(Op::Send),
            2 => index().prop_map(Op::Run),
            1 => index().prop_map(Op::LoseRequest),
            2 => member().prop_map(Op::Deliver),
            1 => member().prop_map(Op::Lose),
            1 => member().prop_map(Op::Tell),
            6 => member().prop_map(Op::Whole),
            1 => member().prop_map(Op::Restart),
        ],
        0..300,
    )
}

fn probing_ops() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    // Two of them, so that slots change hands.
    let member = || 0..2usize;
    prop_oneof![
        2 => prop_oneof![0u64..50, 1000u64..2500].prop_map(Op::Pass),
        6 => member().prop_map(Op::Enter),
        1 => (index(), any::<bool>()).prop_map(|(i, failed)| Op::End(i, failed)),
        1 => index().prop_map(Op::Drop),
        3 => member().prop_map(Op::Send),
        3 => index().prop_map(Op::Run),
        2 => member().prop_map(Op::Deliver),
        2 => member().prop_map(Op::Lose),
        4 => member().prop_map(Op::Whole),
        1 => member().prop_map(Op::Reload),
    ]
}

impl Sim {
    fn step(&mut self, op: &Op) {
        match op {
            Op::Pass(millis) => self.now += *millis as u32 * MS,
            Op::Enter(place) => drop(self.enter(self.alive[*place])),
            Op::End(index, failed) if !self.calls.is_empty() => {
                let outcome = if *failed { Failure } else { Success };
                self.end(index.index(self.calls.len()), outcome);
            }
            Op::Drop(index) if !self.calls.is_empty() => {
                let (process, permit, _) = self.calls.swap_remove(index.index(self.calls.len()));
                self.members[process].release(permit);
            }
            Op::Send(place) => self.send(self.alive[*place]),
            Op::Run(index) if !self.requests.is_empty() => {
                self.run(index.index(self.requests.len()));
            }
            Op::LoseRequest(index) if !self.requests.is_empty() => {
                drop(self.requests.remove(index.index(self.requests.len())));
            }
            Op::Deliver(place) => self.deliver(self.alive[*place]),
            Op::Lose(place) => self.lose(self.alive[*place]),
            Op::Tell(place) => self.tell(self.alive[*place]),
            Op::Whole(place) if self.members[self.alive[*place]].flight.is_none() => {
                self.sync(self.alive[*place]);
            }
            Op::Restart(place) => {
                let dead = self.alive[*place];
                self.calls.retain(|(owner, ..)| *owner != dead);
                self.alive[*place] = self.members.len();
                self.members.push(Member::new(settings(), OnLoss::Freeze));
            }
            Op::Reload(place) => {
                let process = self.alive[*place];
                let mut new = Member::new(settings(), OnLoss::Local);
                new.succeed(&self.members[process]);
                self.members[process] = new;
                self.requests.retain(|(owner, _)| *owner != process);
                self.replies.remove(&process);
                // What is under way ends with the old one.
                for (owner, permit, _) in &mut self.calls {
                    if *owner == process
                        && let Permit::Shared { probe, .. } = permit
                    {
                        *probe = probe.map(|_| u64::MAX);
                    }
                }
            }
            Op::End(..) | Op::Drop(_) | Op::Run(_) | Op::LoseRequest(_) | Op::Whole(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Also: a result counts once and for its generation alone, a process that joins changes nothing, and no more probes run
    /// than there are slots; the simulation asserts it at each step.
    #[test]
    fn reports_may_be_late_lost_or_out_of_order(ops in ops(), quorum in 1usize..4) {
        let mut sim = Sim::new(MEMBERS, quorum);
        let mut newest = 0;
        for op in &ops {
            sim.step(op);
            prop_assert!(sim.script.generation >= newest);
            newest = sim.script.generation;
            for member in &sim.members {
                prop_assert!(member.view.generation <= newest);
            }
        }
        // Whatever was lost: once all hear again, all go by one state.
        for _ in 0..2 {
            for process in sim.alive.clone() {
                sim.lose(process);
                sim.sync(process);
            }
        }
        let of = |process: &usize| sim.members[*process].view.generation;
        let last = of(sim.alive.last().unwrap());
        prop_assert_eq!(last, sim.script.generation);
        prop_assert!(sim.alive.iter().all(|process| last - of(process) <= 2));
    }

    /// As above, from half-open on, which histories at random seldom come to.
    #[test]
    fn probes_never_exceed_the_slots(ops in prop::collection::vec(probing_ops(), 0..120)) {
        let mut sim = Sim::new(MEMBERS, 1);
        all_sync(&mut sim);
        calls(&mut sim, 0, Failure, 4);
        all_sync(&mut sim);
        sim.now += SECOND;
        for op in &ops {
            sim.step(op);
        }
    }

    #[test]
    fn one_sick_process_trips_no_quorum_of_two(calls in prop::collection::vec((0..MEMBERS, 1u64..200), 1..300)) {
        let mut sim = Sim::new(MEMBERS, 2);
        (0..MEMBERS).for_each(|process| sim.sync(process));
        for (process, pause) in calls {
            sim.now += pause as u32 * MS;
            sim.enter(process);
            sim.end(0, if process == 0 { Failure } else { Success });
            (0..MEMBERS).for_each(|process| sim.sync(process));
            prop_assert_eq!(sim.script.state, State::Closed);
        }
    }
}

/// All of them, and none lost.
fn all_sync(sim: &mut Sim) {
    for process in sim.alive.clone() {
        sim.sync(process);
    }
}

/// Calls that end so, reported.
fn calls(sim: &mut Sim, process: usize, outcome: CallOutcome, n: usize) {
    for _ in 0..n {
        assert!(sim.enter(process));
        sim.end(sim.calls.len() - 1, outcome);
    }
    sim.sync(process);
}

fn opened() -> Sim {
    let mut sim = Sim::new(2, 2);
    all_sync(&mut sim);
    calls(&mut sim, 0, Failure, 4);
    assert_eq!(
        sim.script.state,
        State::Closed,
        "one alone does not trip it"
    );
    calls(&mut sim, 1, Failure, 1);
    assert_eq!(sim.script.state, State::Open);
    sim
}

#[test]
fn two_processes_that_see_failures_trip_it() {
    let mut sim = opened();
    assert!(sim.enter(0), "it has not heard");
    sim.tell(0);
    assert!(!sim.enter(0));
    // The call that it let through meanwhile.
    sim.end(0, Success);
    sim.sync(0);
    assert_eq!(
        sim.script.window.calls, 5,
        "an older generation's call counts for nothing"
    );
}

#[test]
fn one_alone_is_enough_where_no_other_lives() {
    let mut sim = Sim::new(1, 2);
    sim.sync(0);
    calls(&mut sim, 0, Failure, 4);
    assert_eq!(sim.script.state, State::Open);
}

#[test]
fn a_failure_now_and_then_is_no_reason_to_doubt() {
    let mut sim = Sim::new(2, 2);
    all_sync(&mut sim);
    calls(&mut sim, 1, Success, 9);
    calls(&mut sim, 1, Failure, 1);
    calls(&mut sim, 0, Failure, 40);
    assert_eq!(sim.script.state, State::Closed);
}

#[test]
fn half_of_what_trips_is_reason_to_doubt() {
    let doubts = |settings: Settings, outcomes: &[CallOutcome]| {
        let mut member = Member::new(settings, OnLoss::Local);
        for outcome in outcomes {
            let (permit, _) = member.try_enter(SECOND, 0.0);
            member.record(permit.unwrap(), *outcome, MS, SECOND, 0.0);
        }
        member.report(SECOND).doubts
    };
    let well = [Success; 9];
    assert_eq!(doubts(settings(), &[&well[..3], &[Failure]].concat()), 1);
    assert_eq!(doubts(settings(), &[&well[..4], &[Failure]].concat()), 0);
    let in_a_row = Settings {
        consecutive_failures: 3,
        ..settings()
    };
    let in_a_row = |failures| {
        let outcomes = [&well[..], &[Failure; 2][..failures]].concat();
        doubts(in_a_row.clone(), &outcomes)
    };
    assert_eq!([1, 2].map(in_a_row), [0, 2]);
}

#[test]
fn what_was_never_sent_is_told_by_the_next_report() {
    let mut member = Member::new(settings(), OnLoss::Local);
    let first = Delta {
        calls: 3,
        failures: 2,
        trailing: 2,
        ..Delta::default()
    };
    for (sent, told) in [(false, 4), (true, 1)] {
        member.delta = first;
        member.report(SECOND);
        // Meanwhile another came.
        member.delta = Delta {
            calls: 1,
            succeeded: true,
            ..Delta::default()
        };
        member.unanswered(sent, SECOND);
        let delta = member.report(SECOND).delta;
        assert_eq!((delta.calls, delta.trailing), (told, 0), "{sent}");
        member.unanswered(true, SECOND);
    }
}

/// It may be its first call.
#[test]
fn a_stray_failure_makes_no_second_of_one_sick_process() {
    let slow = |sim: &mut Sim, process| {
        assert!(sim.enter(process));
        sim.now += 2 * SECOND;
        sim.end(sim.calls.len() - 1, Success);
        sim.sync(process);
    };
    let fail = |sim: &mut Sim, process| calls(sim, process, Failure, 1);
    for stray in [fail, slow] {
        let mut sim = Sim::new(3, 2);
        all_sync(&mut sim);
        calls(&mut sim, 0, Failure, 4);
        stray(&mut sim, 1);
        calls(&mut sim, 0, Failure, 4);
        assert_eq!(sim.script.state, State::Closed);
        stray(&mut sim, 1);
        assert_eq!(sim.script.state, State::Open);
    }
    // A quorum of one asks no other.
    let mut sim = Sim::new(3, 1);
    sim.script.settings.minimum_calls = 1;
    all_sync(&mut sim);
    calls(&mut sim, 2, Failure, 1);
    assert_eq!(sim.script.state, State::Open);
}

#[test]
fn a_local_trip_is_reported_at_once_and_once() {
    let mut member = Member::new(settings(), OnLoss::Local);
    let mut script = Script::new(2);
    let now = 100 * SECOND;
    assert!(member.try_enter(now, 0.0).0.is_ok());
    let report = member.report(now);
    member.answered(&script.sync(0, &report, now), now);
    let mut fail = || {
        let permit = member.try_enter(now, 0.0).0.unwrap();
        member.record(permit, Failure, MS, now, 0.0)
    };
    assert_eq!(
        [fail(), fail(), fail(), fail(), fail()],
        [false, false, false, true, false]
    );
    assert_eq!(member.report_in(now), Duration::ZERO);
}

#[test]
fn probes_are_asked_for_by_refused_requests_and_held_ahead() {
    let mut sim = opened();
    sim.sync(0);
    assert!(!sim.enter(0));
    sim.now += SECOND;
    sim.sync(0);
    assert_eq!(sim.script.state, State::HalfOpen);
    assert!(sim.enter(0), "the request while open has asked");
    assert!(!sim.enter(0), "one slot for each request that asked");
    sim.end(0, Success);
    sim.sync(0);
    calls(&mut sim, 0, Success, 1);
    assert_eq!(sim.script.state, State::Recovering);
}

#[test]
fn slots_that_others_want_are_given_back() {
    let mut sim = opened();
    sim.now += SECOND;
    // Each holds one, unasked; then one is in want.
    all_sync(&mut sim);
    all_sync(&mut sim);
    assert!(sim.enter(0) && !sim.enter(0));
    sim.now += REPORT_EVERY;
    sim.sync(0);
    assert!(sim.enter(0), "a third slot was free");
    sim.end(0, Success);
    sim.end(0, Failure);
    sim.enter(0);
    sim.sync(0);
    assert!(!sim.enter(0), "the last slot is held by the other");
    sim.sync(0);
    sim.now += 2 * REPORT_EVERY;
    sim.sync(1);
    sim.sync(1);
    sim.sync(0);
    assert!(sim.enter(0));
}

#[test]
fn one_sick_process_keeps_no_breaker_open() {
    let mut sim = opened();
    sim.now += SECOND;
    all_sync(&mut sim);
    all_sync(&mut sim);
    assert_eq!(sim.script.state, State::HalfOpen);
    // Each holds a slot. Who fails at once is the first to have another.
    calls(&mut sim, 0, Failure, 1);
    calls(&mut sim, 0, Failure, 1);
    assert_eq!(sim.script.state, State::HalfOpen);
    calls(&mut sim, 1, Success, 1);
    assert_eq!(sim.script.state, State::Recovering);
}

#[test]
fn slots_of_a_dead_process_come_back() {
    let mut sim = opened();
    sim.now += SECOND;
    sim.sync(0);
    sim.sync(0);
    assert!(sim.enter(0));
    sim.calls.clear();
    sim.now += HOLD + 2 * SECOND + SLOT_GRACE;
    sim.sync(1);
    assert_eq!(
        sim.script
            .slots
            .keys()
            .filter(|(owner, _)| *owner == 0)
            .count(),
        0
    );
}

#[test]
fn a_slot_that_no_report_named_for_long_is_used_no_more() {
    let mut sim = opened();
    sim.now += SECOND;
    sim.sync(0);
    sim.sync(0);
    assert!(sim.enter(0), "held ahead");
    sim.calls.clear();
    sim.sync(1);
    sim.sync(1);
    sim.now += HOLD;
    assert!(!sim.enter(1));
}

#[test]
fn a_probe_without_an_end_has_failed() {
    let mut sim = opened();
    sim.now += SECOND;
    for _ in 0..2 {
        sim.sync(0);
        sim.enter(0);
        sim.sync(0);
        sim.enter(0);
        sim.now += 2 * SECOND;
        sim.sync(0);
    }
    assert_eq!(sim.script.state, State::Open);
    assert_eq!(
        sim.script.ends - sim.now,
        2 * SECOND,
        "twice as long as before"
    );
}

#[test]
fn a_probe_with_a_good_head_passes_by_time_and_one_that_waits_gives_its_slot_back() {
    for (stage, good) in [(Stage::Waiting, 0), (Stage::Answered(Success, SECOND), 1)] {
        let mut sim = opened();
        sim.now += SECOND;
        // The first asks for a slot, the second has it.
        sim.sync(0);
        sim.enter(0);
        sim.sync(0);
        assert!(sim.enter(0));
        let (_, permit, _) = sim.calls[0];
        sim.now += SECOND;
        sim.members[0].come(permit, stage, sim.now, 0.0);
        sim.now += SECOND;
        sim.sync(0);
        assert_eq!(sim.script.probed(), (0, 0), "{stage:?}");
        sim.now += SECOND;
        sim.sync(0);
        assert_eq!(sim.script.probed(), (good, 0), "{stage:?}");
        sim.end(0, Failure);
        sim.sync(0);
        assert_eq!(sim.script.probed(), (good, 0), "{stage:?}");
        assert_eq!(sim.script.state, State::HalfOpen);
    }
}

/// One that went by the shared state, and got no answers for `LOST_AFTER`.
fn lost(sim: &mut Sim) -> Option<Change> {
    sim.send(0);
    sim.requests.clear();
    sim.now += LOST_AFTER;
    sim.members[0].unanswered(true, sim.now)
}

#[test]
fn lost_redis_leaves_a_process_its_own_window() {
    let mut sim = Sim::new(2, 2);
    all_sync(&mut sim);
    calls(&mut sim, 0, Failure, 3);
    assert_eq!(lost(&mut sim), Some(Change::Lost));
    assert!(sim.enter(0));
    sim.end(0, Failure);
    assert!(!sim.enter(0), "the fourth failure of its own trips it");
    sim.sync(0);
    assert!(sim.members[0].is_together());
    assert!(sim.enter(0), "the shared state is as it was");
    assert_eq!(sim.script.window.calls, 3);
}

#[test]
fn frozen_it_stays_as_it_was_and_an_opening_ends() {
    let mut sim = Sim::new(1, 1);
    sim.members[0] = Member::new(settings(), OnLoss::Freeze);
    sim.sync(0);
    assert_eq!(lost(&mut sim), Some(Change::Lost));
    for _ in 0..10 {
        assert!(sim.enter(0));
        sim.end(0, Failure);
    }
    assert!(sim.enter(0));
    sim.calls.clear();
    sim.sync(0);
    calls(&mut sim, 0, Failure, 4);
    assert_eq!(lost(&mut sim), Some(Change::Lost));
    assert!(
        sim.enter(0),
        "a second has passed: it is tried by probes of its own"
    );
    sim.end(0, Failure);
    sim.enter(0);
    sim.end(0, Failure);
    assert!(!sim.enter(0));
}

#[test]
fn a_breaker_in_use_reports_often_and_one_at_rest_seldom() {
    let mut sim = Sim::new(1, 1);
    sim.sync(0);
    let due = |sim: &Sim| sim.members[0].report_in(sim.now);
    assert_eq!(due(&sim), SECOND);
    let (asked, wake) = sim.members[0].try_enter(sim.now, 0.0);
    assert!(asked.is_ok() && wake, "its first call after a rest");
    sim.sync(0);
    assert_eq!(due(&sim), REPORT_EVERY);
    assert!(!sim.members[0].try_enter(sim.now, 0.0).1);
    sim.now += 2 * IDLE_AFTER;
    sim.sync(0);
    assert_eq!(due(&sim), SECOND);
}

#[test]
fn of_two_states_with_one_number_the_one_that_answers_is_right() {
    let mut sim = opened();
    sim.sync(0);
    sim.script.state = State::ForcedClosed;
    assert!(!sim.enter(0));
    sim.sync(0);
    assert!(sim.enter(0));
}

#[test]
fn a_blink_of_redis_changes_nothing() {
    let mut sim = opened();
    sim.sync(0);
    sim.send(0);
    sim.now += LOST_AFTER / 2;
    assert_eq!(sim.members[0].unanswered(true, sim.now), None);
    assert!(!sim.enter(0));
}
