//! The rules of one lease, as tests.

use super::*;

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
