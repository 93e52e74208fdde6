//! The way of one request from try to try. Whether there is another is [`retries`](crate::proxy::retries)'; must not send it.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::sleep;

use super::down::Back;
use crate::proxy::exchange::Failure;
use crate::proxy::outcome::of_endpoint;
use crate::proxy::outgoing::{Outgoing, Request};
use crate::proxy::record::Record;
use crate::proxy::reply::Rejection;
use crate::proxy::retries::{EndedTry, Point, Tries};
use crate::upstream::{Picked, Slot, Until};

/// A request whose response has not begun.
pub(super) struct CurrentTry<'r> {
    /// For all tries together.
    pub slot: Slot<'r>,
    /// Whom this one goes to.
    pub picked: Picked<'r>,
    /// Whether it is known what that made of the request.
    told: bool,
    /// How far this one has come.
    pub point: Point,
    /// Whether the upstream has left what is there of the body untaken.
    pub is_stuck: bool,
    /// For the client to send, in all tries.
    pub waited: Duration,
    /// Where the upstream has retries.
    tries: Option<Tries<'r>>,
    /// Whether some of the request's body can be sent no more.
    is_lost: &'r Cell<bool>,
}

impl<'r> CurrentTry<'r> {
    pub(super) fn new(
        slot: Slot<'r>,
        picked: Picked<'r>,
        tries: Option<Tries<'r>>,
        is_lost: &'r Cell<bool>,
    ) -> CurrentTry<'r> {
        CurrentTry {
            slot,
            picked,
            told: false,
            point: Point::Unseen,
            is_stuck: false,
            waited: Duration::ZERO,
            tries,
            is_lost,
        }
    }

    /// When a try is given up that begins now, or begins again, where there may be others.
    pub(super) fn until(&self) -> Option<Until> {
        let tries = self.tries.as_ref()?;
        Some(tries.until(self.waited))
    }

    /// Says what the endpoint made of the request, once.
    pub(super) fn tell(&mut self, came: Result<u16, &Failure>, request: &Request, record: &Record) {
        if !self.told
            && let Some(outcome) = of_endpoint(came, request, record)
        {
            self.picked.tell(outcome);
        }
        if !self.told
            && let Err(Failure::Reply(Rejection::BadResponse(why), _)) = came
        {
            self.picked.note_refused(*why);
        }
        self.told = true;
    }

    /// How long to wait before another try; `None` where what came of this one stands.
    pub(super) fn another(
        &mut self,
        request: &Request,
        came: Result<u16, &Failure>,
    ) -> Option<Duration> {
        let ended = EndedTry {
            came,
            point: self.point,
            is_kept: !self.is_lost.get(),
            waited: self.waited,
        };
        self.tries.as_mut()?.another(request, &ended)
    }

    /// The head of the response that goes to the client is here: there is no other try.
    pub(super) fn answered(&mut self) {
        self.slot.answered();
        if let Some(tries) = &mut self.tries {
            tries.end();
        }
    }

    /// Goes over to the next endpoint once this long has passed; false where there is none, and what came of this try stands.
    pub(super) async fn go_on(
        &mut self,
        wait: Duration,
        came: Result<u16, &Failure>,
        outgoing: &mut Outgoing<'_>,
        back: &mut Back<'_, '_>,
        record: &mut Record,
    ) -> Result<bool, Failure> {
        self.tell(came, &outgoing.request, record);
        let reason = came.err().map(Failure::reason);
        let over = record.tried(&self.picked.pool, came.ok(), reason);
        back.unless_gone(&outgoing.request, sleep(wait)).await?;
        let aim = outgoing.aim;
        let tries = self.tries.as_mut();
        let Some(next) = tries.and_then(|tries| tries.next(aim, &self.picked.pool)) else {
            return Ok(false);
        };
        record.begin_again(over, &next.pool, &mut outgoing.out);
        (self.picked, self.told) = (next, false);
        Ok(true)
    }
}
