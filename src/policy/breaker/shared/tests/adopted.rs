//! What a process forgets of its own as the shared state changes, and what it goes on with.

use super::*;

/// One process with these settings, which goes by the shared state.
fn alone(settings: Settings) -> Sim {
    let mut sim = Sim::new(1, 1);
    sim.members[0] = Member::new(settings, OnLoss::Local);
    sim.sync(0);
    sim
}

/// The script comes to a state, and the process hears of it by a report.
fn come(sim: &mut Sim, to: State, lasts: Duration) {
    sim.script.go(to, sim.now, lasts);
    sim.sync(0);
    assert_eq!(sim.members[0].view.state, to);
}

fn doubts(sim: &mut Sim) -> u64 {
    let now = sim.now;
    sim.members[0].doubts(now)
}

fn in_a_row(consecutive_failures: u32) -> Settings {
    Settings {
        consecutive_failures,
        ..settings()
    }
}

#[test]
fn failures_from_before_another_state_are_no_reason_to_doubt() {
    let mut sim = alone(in_a_row(3));
    calls(&mut sim, 0, Failure, 2);
    assert_eq!(doubts(&mut sim), 2);
    come(&mut sim, State::ForcedOpen, Duration::ZERO);
    come(&mut sim, State::Closed, Duration::ZERO);
    assert_eq!(doubts(&mut sim), 0);
    calls(&mut sim, 0, Failure, 1);
    assert_eq!(doubts(&mut sim), 1, "of its row there is one, too");
}

#[test]
fn failures_of_a_ramp_count_once_it_has_ended() {
    let mut sim = alone(settings());
    come(&mut sim, State::Recovering, SECOND);
    sim.now += SECOND - MS;
    let mut failed = 0;
    while failed < 2 {
        if sim.enter(0) {
            sim.end(0, Failure);
            failed += 1;
        }
    }
    sim.now += MS;
    sim.sync(0);
    assert_eq!(sim.members[0].view.state, State::Closed);
    assert_eq!(doubts(&mut sim), 2);
}

#[test]
fn a_ramp_that_is_heard_of_admits_few_at_first() {
    let mut sim = alone(settings());
    come(&mut sim, State::Recovering, SECOND);
    let admitted = (0..20).filter(|_| sim.enter(0)).count();
    assert!((1..10).contains(&admitted), "{admitted}");
}

#[test]
fn requests_that_were_refused_in_an_older_state_ask_for_no_probes() {
    let mut sim = alone(settings());
    come(&mut sim, State::Open, SECOND);
    assert!(!sim.enter(0));
    come(&mut sim, State::Closed, Duration::ZERO);
    let report = sim.members[0].report(sim.now);
    assert!(!report.demanded);
}

#[test]
fn a_slot_of_an_older_half_open_admits_no_probe() {
    let mut sim = alone(settings());
    come(&mut sim, State::HalfOpen, Duration::ZERO);
    sim.sync(0);
    assert!(!sim.members[0].probes.held().is_empty(), "held ahead");
    sim.script.go(State::HalfOpen, sim.now, Duration::ZERO);
    sim.tell(0);
    assert!(!sim.enter(0));
}

#[test]
fn each_trip_of_its_own_is_reported_at_once() {
    let mut sim = alone(in_a_row(1));
    // In use, which is told at once, too.
    calls(&mut sim, 0, Success, 1);
    for _ in 0..2 {
        let (permit, _) = sim.members[0].try_enter(sim.now, 0.0);
        let tells = sim.members[0].record(permit.unwrap(), Failure, MS, sim.now, 0.0);
        assert!(tells);
        come(&mut sim, State::ForcedOpen, Duration::ZERO);
        come(&mut sim, State::Closed, Duration::ZERO);
    }
}

#[test]
fn a_refusal_says_whether_it_was_forced() {
    let mut sim = alone(settings());
    for (state, is_forced) in [(State::Open, false), (State::ForcedOpen, true)] {
        come(&mut sim, state, 10 * SECOND);
        let (refused, _) = sim.members[0].try_enter(sim.now, 0.0);
        assert_eq!(refused.unwrap_err().is_forced, is_forced);
    }
}

#[test]
fn who_found_no_slot_in_an_older_half_open_asks_at_once_in_the_next() {
    let mut sim = alone(settings());
    come(&mut sim, State::HalfOpen, Duration::ZERO);
    sim.enter(0);
    sim.sync(0);
    sim.members[0].starved = true;
    sim.script.go(State::HalfOpen, sim.now, Duration::ZERO);
    sim.tell(0);
    let (refused, wakes) = sim.members[0].try_enter(sim.now, 0.0);
    assert!(refused.is_err() && wakes);
}

#[test]
fn who_is_alone_while_open_shows_what_it_has_seen_before() {
    let mut sim = alone(settings());
    calls(&mut sim, 0, Failure, 2);
    come(&mut sim, State::Open, 10 * SECOND);
    assert_eq!(lost(&mut sim), Some(Change::Lost));
    let shown = sim.members[0].snapshot(sim.now);
    assert_eq!((shown.state, shown.failures), (State::Open, 2));
}
