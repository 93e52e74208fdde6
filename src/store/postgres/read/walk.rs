//! Between which places a search looks, and how it goes on from one window to the next. Must not ask the server.

use crate::store::audit::{Cursor, Order, StoreError, Stored};
use crate::store::postgres::row::Date;

/// Transactions of a span of `weir.audit_spans`, as a power of two.
pub(super) const SPAN: u32 = 17;

/// The next spans in the order asked for.
pub(super) struct Stretch {
    pub(super) between: Between,
    /// Of which its batches are.
    pub(super) days: Vec<Date>,
    /// Where to go on from; `None` where no span is left.
    pub(super) next: Option<Between>,
}

/// The next transactions in the order asked for.
pub(super) struct Window {
    /// Batches in it.
    pub(super) count: i64,
    /// The last transaction in it.
    pub(super) edge: i64,
    /// Of which its events are.
    pub(super) days: Vec<Date>,
}

/// Between which places to look; neither is part of it.
#[derive(Clone, Copy)]
pub(super) struct Between {
    pub(super) low: Cursor,
    pub(super) high: Cursor,
}

/// Ahead of all places of a transaction.
pub(super) fn before(arrival: i64) -> Cursor {
    Cursor {
        arrival,
        boot: i32::MIN,
        seq: i64::MIN,
        ..Cursor::default()
    }
}

/// Behind all places of a transaction.
pub(super) fn behind(arrival: i64) -> Cursor {
    Cursor {
        arrival,
        boot: i32::MAX,
        seq: i64::MAX,
        ..Cursor::default()
    }
}

impl Window {
    /// The part of `between` that is in this window.
    pub(super) fn of(&self, between: Between, order: Order) -> Between {
        match order {
            Order::OldestFirst => Between {
                high: between.high.min(behind(self.edge)),
                ..between
            },
            Order::NewestFirst => Between {
                low: between.low.max(before(self.edge)),
                ..between
            },
        }
    }
}

impl Between {
    /// What is left once the event at `place` was read: never more than before.
    pub(super) fn beyond(self, place: Cursor, order: Order) -> Between {
        match order {
            Order::OldestFirst => Between {
                low: self.low.max(place),
                ..self
            },
            Order::NewestFirst => Between {
                high: self.high.min(place),
                ..self
            },
        }
    }

    /// The part of this up to the span `edge`, as yet without days, and what is left behind it.
    pub(super) fn up_to(self, edge: i64, order: Order, is_last: bool) -> Stretch {
        let first = edge << SPAN;
        let last = first | ((1 << SPAN) - 1);
        let (between, next) = match order {
            Order::OldestFirst => (
                Between {
                    high: self.high.min(behind(last)),
                    ..self
                },
                Between {
                    low: before(last.saturating_add(1)),
                    ..self
                },
            ),
            Order::NewestFirst => (
                Between {
                    low: self.low.max(before(first)),
                    ..self
                },
                Between {
                    high: behind(first.saturating_sub(1)),
                    ..self
                },
            ),
        };
        Stretch {
            between,
            days: Vec::new(),
            next: Some(next).filter(|_| !is_last),
        }
    }

    pub(super) fn behind(self, last: Option<&Stored>, order: Order) -> Between {
        last.map_or(self, |last| self.beyond(last.cursor, order))
    }

    /// Where to go on, within this, where `rest` is what was not looked at yet; an error if that is all of it.
    pub(super) fn left_off(self, rest: Between, order: Order) -> Result<Cursor, StoreError> {
        // The spans may go further than what was asked for.
        let (began, place) = match order {
            Order::OldestFirst => (self.low, rest.low.min(self.high)),
            Order::NewestFirst => (self.high, rest.high.max(self.low)),
        };
        match place == began {
            true => Err(StoreError::OutOfTime),
            false => Ok(place),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::AuditEvent;

    #[test]
    fn a_search_never_goes_back() {
        let stored = |arrival| Stored {
            cursor: before(arrival),
            instance: "a".to_owned(),
            boot: [0; 16],
            event: AuditEvent::sample(),
        };
        let between = Between {
            low: behind(10),
            high: before(20),
        };
        let places = |last: Option<&Stored>, order| {
            let Between { low, high } = between.behind(last, order);
            (low, high)
        };
        for order in [Order::OldestFirst, Order::NewestFirst] {
            assert_eq!(places(None, order), (behind(10), before(20)));
        }
        // What was found last, in this window or in one that is done with.
        for (found, low) in [(15, before(15)), (3, behind(10))] {
            let found = stored(found);
            let left = places(Some(&found), Order::OldestFirst);
            assert_eq!(left, (low, before(20)));
        }
        for (found, high) in [(15, before(15)), (30, before(20))] {
            let found = stored(found);
            let left = places(Some(&found), Order::NewestFirst);
            assert_eq!(left, (behind(10), high));
        }
    }
    #[test]
    fn a_search_goes_on_within_what_was_asked_for() {
        let between = |low, high| Between {
            low: behind(low),
            high: before(high),
        };
        let all = between(10, 20);
        let check = |order, rest: Between, expected: Option<Cursor>| {
            assert_eq!(all.left_off(rest, order).ok(), expected);
        };
        check(Order::OldestFirst, between(15, 20), Some(behind(15)));
        check(Order::NewestFirst, between(10, 15), Some(before(15)));
        // Spans end elsewhere.
        check(Order::OldestFirst, between(1 << SPAN, 20), Some(before(20)));
        check(Order::NewestFirst, between(10, 0), Some(behind(10)));
        // It came nowhere.
        check(Order::OldestFirst, all, None);
        check(Order::NewestFirst, all, None);
    }
}
