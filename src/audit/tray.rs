//! Where a lane lays the events that requests wait for, until the thread that makes them safe takes them: it takes all that has gathered
//! at once, and is woken only where it sleeps. Must not wait for the disk.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;

use super::Recorder;
use super::receipt::{Duty, Receipt};
use crate::event::{AuditEvent, Encoded};

/// Events that a lane lays together, at most.
const GROUP: usize = 64;
/// Bytes at which a group is full.
const GROUP_BYTES: usize = 256 << 10;
/// What a group has memory for when it begins.
const FIRST_EVENTS: usize = 32;
const FIRST_BYTES: usize = 8 << 10;

/// One lane's, and its way to wake the thread.
#[derive(Debug)]
pub struct Tray {
    slot: Arc<Slot>,
    recorder: Recorder,
}

/// Where an event is.
#[derive(Debug)]
pub enum Laid {
    /// It is the first of a group, which this is the receipt of.
    First(Receipt),
    /// It is of the same group as the one before.
    Along,
    /// There is no room for it; it is counted as dropped.
    Refused,
}

/// What a tray shares with the thread that empties it.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Contents>);

#[derive(Debug, Default)]
enum Contents {
    #[default]
    Empty,
    Group(Encoded, Duty),
    /// Nobody takes what is laid here.
    Closed,
}

impl Tray {
    pub(super) fn new(recorder: &Recorder) -> Tray {
        let slot = Arc::new(Slot::default());
        recorder.shared.trays.lock().push(slot.clone());
        Tray {
            slot,
            recorder: recorder.clone(),
        }
    }

    /// Lays an event there. Never waits for the disk.
    pub fn lay<T: Serialize>(&self, event: &AuditEvent<T>) -> Laid {
        if self.recorder.shared.reserve(1) == 0 {
            return Laid::Refused;
        }
        let mut contents = self.slot.0.lock();
        match &mut *contents {
            Contents::Group(events, _) if events.len() < GROUP && events.size() < GROUP_BYTES => {
                events.push(event);
                return Laid::Along;
            }
            Contents::Closed => return Laid::Refused,
            Contents::Empty | Contents::Group(..) => {}
        }
        let duty = Duty::default();
        let receipt = duty.receipt();
        let mut events = Encoded::with_room(FIRST_EVENTS, FIRST_BYTES);
        events.push(event);
        let full = std::mem::replace(&mut *contents, Contents::Group(events, duty));
        drop(contents);
        match full {
            Contents::Group(events, duty) => self.recorder.send(events, Some(duty)),
            Contents::Empty | Contents::Closed => self.recorder.wake(),
        }
        Laid::First(receipt)
    }
}

impl Slot {
    /// The group that is there.
    pub(super) fn take(&self) -> Option<(Encoded, Duty)> {
        let mut contents = self.0.lock();
        match std::mem::take(&mut *contents) {
            Contents::Group(events, duty) => Some((events, duty)),
            other => {
                *contents = other;
                None
            }
        }
    }

    /// What is there is lost, and whatever is laid there from here on is refused.
    pub(super) fn close(&self) {
        let lost = std::mem::replace(&mut *self.0.lock(), Contents::Closed);
        drop(lost);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::super::{Queue, Taken};
    use super::*;
    use crate::clock;
    use crate::config::audit::Delivery;

    const SOON: Duration = Duration::from_secs(20);

    fn event(path: &str) -> AuditEvent<&str> {
        AuditEvent {
            path,
            ..AuditEvent::sample()
        }
    }

    fn take(queue: &Queue, patience: Duration) -> Taken {
        let mut taken = Taken::default();
        assert!(queue.fill(&mut taken, 1_000, Duration::ZERO, patience));
        taken
    }

    /// Of each batch that was taken, how many events it has.
    fn sizes(taken: &Taken) -> Vec<usize> {
        taken.batches.iter().map(Encoded::len).collect()
    }

    #[test]
    fn what_gathers_is_taken_at_once_and_in_groups_of_a_bounded_size() {
        let (recorder, queue) = Queue::new(1_000, Delivery::Guaranteed);
        let tray = recorder.tray();
        assert!(matches!(tray.lay(&event("/")), Laid::First(_)));
        assert!(matches!(tray.lay(&event("/")), Laid::Along));
        assert_eq!(sizes(&take(&queue, SOON)), [2]);
        for _ in 0..=GROUP {
            tray.lay(&event("/"));
        }
        assert_eq!(sizes(&take(&queue, SOON)), [GROUP, 1]);
    }

    #[tokio::test]
    async fn what_finds_no_room_or_nobody_who_takes_it_is_refused_and_counted() {
        let (recorder, queue) = Queue::new(1, Delivery::Guaranteed);
        let tray = recorder.tray();
        let Laid::First(receipt) = tray.lay(&event("/")) else {
            panic!("there is room for one");
        };
        assert!(matches!(tray.lay(&event("/")), Laid::Refused));
        assert_eq!(recorder.counts().dropped, 1);
        drop(queue);
        assert!(!receipt.settled().await);
        let (recorder, queue) = Queue::new(1, Delivery::Guaranteed);
        let tray = recorder.tray();
        drop(queue);
        assert!(matches!(tray.lay(&event("/")), Laid::Refused));
        assert_eq!(recorder.counts().dropped, 1);
    }

    #[test]
    fn a_thread_that_falls_asleep_just_then_is_woken() {
        const LANES: usize = 3;
        const EVENTS: usize = 20_000;
        let (recorder, queue) = Queue::new(LANES * EVENTS, Delivery::Guaranteed);
        let lanes: Vec<_> = (0..LANES)
            .map(|_| {
                let tray = recorder.tray();
                thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build();
                    runtime.unwrap().block_on(async {
                        for count in 0..EVENTS {
                            let Laid::First(receipt) = tray.lay(&event("/")) else {
                                continue;
                            };
                            // Groups of one and of two.
                            if count % 3 > 0 {
                                assert!(receipt.settled().await);
                            }
                        }
                    });
                })
            })
            .collect();
        let mut left = LANES * EVENTS;
        while left > 0 {
            let asleep = clock::now();
            let taken = take(&queue, SOON);
            // A wake that comes late, of what was taken by chance before, finds nothing.
            assert!(
                taken.count > 0 || clock::now() - asleep < SOON,
                "nobody woke the thread, and {left} events wait"
            );
            left -= taken.count;
            taken.duties.into_iter().flatten().for_each(Duty::safe);
        }
        lanes.into_iter().for_each(|lane| lane.join().unwrap());
    }
}
