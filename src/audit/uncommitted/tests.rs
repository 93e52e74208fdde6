//! The rules of batches that are not known to be committed, as tests; whole ways of them are in `schedules`.

mod schedules;

use uuid::Uuid;

use super::*;
use crate::clock;
use crate::store::spool::Spool;

/// Batches of ten events and three bytes each.
fn uncommitted(count: u64) -> Uncommitted {
    let mut uncommitted = Uncommitted::default();
    for first in (0..count).map(|index| index * 10 + 1) {
        uncommitted.push(
            (first, first + 9),
            [7; 3].into(),
            None,
            Vec::new(),
            clock::now(),
        );
    }
    uncommitted
}

fn next(uncommitted: &mut Uncommitted) -> Option<u64> {
    uncommitted.next().map(|(first, _)| first)
}

fn entry(id: &str) -> Entry {
    Entry {
        shard: 1,
        id: id.to_owned(),
        added: clock::now(),
    }
}

#[test]
fn each_batch_is_sent_once_in_order_unless_it_fails_or_is_lost() {
    let mut uncommitted = uncommitted(3);
    assert_eq!(
        (next(&mut uncommitted), next(&mut uncommitted)),
        (Some(1), Some(11))
    );
    uncommitted.again(1, clock::now());
    assert_eq!(next(&mut uncommitted), Some(1));
    assert_eq!(next(&mut uncommitted), Some(21));
    assert_eq!(next(&mut uncommitted), None);
    uncommitted.added(11, entry("1-1"));
    assert!(uncommitted.is_in(11, "1-1") && !uncommitted.is_in(11, "1-2"));
    let (waiting, last) = uncommitted.waiting(clock::now(), Duration::ZERO, 0, 2);
    assert_eq!((&waiting[&1], last), (&vec![(11, "1-1".to_owned())], None));
    let (waiting, last) = uncommitted.waiting(clock::now(), Duration::ZERO, 0, 1);
    assert_eq!((waiting.len(), last), (1, Some(11)));
    assert!(
        uncommitted
            .waiting(clock::now(), Duration::ZERO, 11, 1)
            .0
            .is_empty()
    );
    uncommitted.again(11, clock::now());
    assert!(!uncommitted.is_in(11, "1-1"));
    assert_eq!(next(&mut uncommitted), Some(11));
}

#[test]
fn what_is_committed_is_let_go_and_counted_once() {
    let mut uncommitted = uncommitted(3);
    let released = uncommitted.committed(&[(1, 10), (11, 19), (1, 10), (99, 99)]);
    assert_eq!((released.events, uncommitted.len()), (10, 2));
    assert_eq!((uncommitted.events(), uncommitted.memory()), (20, 6));
    assert_eq!(next(&mut uncommitted), Some(11));
}

#[test]
fn only_what_a_stream_has_is_shed_for_memory() {
    let mut uncommitted = uncommitted(3);
    uncommitted.added(11, entry("1-1"));
    uncommitted.added(21, entry("1-2"));
    assert_eq!(uncommitted.shed(9).events, 0);
    assert_eq!(uncommitted.shed(6).events, 10);
    assert_eq!(uncommitted.shed(0).events, 10);
    assert_eq!((uncommitted.len(), uncommitted.memory()), (1, 3));
}

#[test]
fn what_cannot_be_read_now_is_gone_around_and_sent_later() {
    let folder = tempfile::tempdir().unwrap();
    let (mut spool, _) = Spool::open(folder.path(), 8 << 20, Uuid::nil()).unwrap();
    let mut uncommitted = uncommitted(4);
    for (first, memory) in [(1, 0), (11, 0), (21, 100)] {
        let place = spool.append(&[7; 3]).unwrap();
        assert_eq!(uncommitted.spooled(first, place, memory), None);
    }
    assert_eq!(next(&mut uncommitted), Some(1));
    uncommitted.again(1, clock::now());
    uncommitted.set_aside();
    assert_eq!(next(&mut uncommitted), Some(21));
    assert_eq!(uncommitted.unsent(), 1);
    uncommitted.committed(&[(11, 20)]);
    assert!(uncommitted.bring_back() && !uncommitted.bring_back());
    assert_eq!(
        [0; 3].map(|_| next(&mut uncommitted)),
        [Some(1), Some(31), None]
    );
}

#[test]
fn what_the_spool_had_and_memory_still_has_is_at_risk_again_once_it_is_gone_there() {
    let folder = tempfile::tempdir().unwrap();
    let (mut spool, _) = Spool::open(folder.path(), 8 << 20, Uuid::nil()).unwrap();
    let mut uncommitted = uncommitted(3);
    for (first, memory) in [(1, 0), (11, 100), (21, 100)] {
        let place = spool.append(&[7; 3]).unwrap();
        assert_eq!(uncommitted.spooled(first, place, memory), None);
    }
    uncommitted.added(21, entry("1-1"));
    let unspooled = |uncommitted: &mut Uncommitted, spool: &Spool| {
        uncommitted.unspooled(spool.gone(), clock::now()).len()
    };
    assert_eq!(unspooled(&mut uncommitted, &spool), 0);
    let segment = folder.path().join(Uuid::nil().to_string());
    std::fs::remove_file(segment.join("00000001.seg")).unwrap();
    assert_eq!(unspooled(&mut uncommitted, &spool), 2);
    let at_risk = uncommitted.at_risk().into_iter().map(|(first, _)| first);
    assert_eq!(at_risk.collect::<Vec<_>>(), [11]);
    assert!(uncommitted.place(1).is_some());
    uncommitted.again(21, clock::now());
    assert_eq!(uncommitted.at_risk().len(), 2);
}

#[tokio::test]
async fn requests_are_answered_once_their_batch_is_in_a_stream_and_not_if_it_is_lost() {
    let mut uncommitted = Uncommitted::default();
    let duties = [(); 2].map(|()| Duty::default());
    let receipts = duties.each_ref().map(Duty::receipt);
    for (first, duty) in [1, 2].into_iter().zip(duties) {
        uncommitted.push(
            (first, first),
            [7; 3].into(),
            None,
            vec![duty],
            clock::now(),
        );
    }
    assert!(uncommitted.is_at_risk());
    uncommitted.added(1, entry("1-1"));
    assert!(receipts[0].settled().await);
    let released = uncommitted.remove(2);
    assert_eq!((released.events, uncommitted.is_at_risk()), (1, false));
    assert!(!receipts[1].settled().await);
    // Committed before the stream's answer was here.
    let duty = Duty::default();
    let receipt = duty.receipt();
    uncommitted.push((3, 3), [7; 3].into(), None, vec![duty], clock::now());
    uncommitted.committed(&[(3, 3)]);
    assert!(receipt.settled().await);
}

#[test]
fn what_is_to_be_spooled_first_is_not_sent_before() {
    let mut uncommitted = uncommitted(2);
    uncommitted.spool_first = true;
    assert_eq!(next(&mut uncommitted), None);
    uncommitted.spool_first = false;
    assert_eq!(next(&mut uncommitted), Some(1));
}
