//! A request's way to an endpoint that answers it, by HTTP/1.1: a turn, an endpoint, a connection; and another try where the file asks for
//! one and it does no harm. Owns what may be tried again; must not know what is done with the answer.
//!
//! A request that the upstream may have seen is sent again for the methods that the file names alone, which are all idempotent. One of which
//! not a byte was sent is for any method. The upstream's breaker gets one result for all tries together: it judges whether the upstream
//! serves, and a request that another endpoint rescued was served. Each endpoint's own failures are told to the outlier detection.

use tokio::time::sleep;

use super::Exchange;
use crate::config::upstreams::Retries;
use crate::proxy::exchange::{Answered, Failure, Peer, is_over};
use crate::proxy::outcome::{is_stale, learn, of_endpoint, unreached};
use crate::proxy::reply::Rejection;
use crate::proxy::retries::{EndedTry, Point, Tries};
use crate::upstream::{Bound, Connected, Picked, Pool, Slot, Until};

/// The endpoint that has answered, over this connection.
pub(super) struct Answerer<'p> {
    pub connected: Connected,
    picked: Picked<'p>,
    _slot: Slot<'p>,
}

/// What came of one try.
type Tried = Result<(Connected, Answered), Failure>;

impl Answerer<'_> {
    /// Keeps the connection for another request, of this client's alone where it is bound: for that the upstream is to have asked, or a
    /// header would do for a client to have as many connections as it likes.
    pub(super) fn give_back(self, client: &Peer, after_head: bool) {
        let (pool, connected) = (&self.picked.pool, self.connected);
        match (connected.is_bound, connected.is_challenged) {
            (false, _) => pool.give_back(connected, after_head),
            (true, false) => {}
            (true, true) => {
                let bound = Bound::keep(pool, connected, after_head);
                client.bound.set(bound.map(Box::new));
            }
        }
    }
}

impl<'p> Exchange<'_, 'p> {
    /// Sends the request to an endpoint of the upstream's. The response's head comes to stand at the front of `answer`.
    pub(super) async fn ask(&mut self) -> Result<(Answerer<'p>, Answered), Failure> {
        let upstream = self.upstream;
        self.record.note_waiting();
        // Its turn may be some time off, and is another's where the client has left.
        let slot = self.unless_left(upstream.enter()).await?;
        let mut slot = slot.map_err(|_| Rejection::Overloaded)?;
        self.record.note_working();
        let mut picked = match self.pick_bound() {
            Some(picked) => picked,
            None => {
                let picked = upstream.pick(self.outgoing.aim, &[]);
                picked.map_err(|_| Rejection::NoEndpoint)?
            }
        };
        self.record.note_target(&picked.pool);
        let tried = match &self.outgoing.settings().retries {
            None => {
                let tried = self.ask_one(None, &picked).await;
                self.tell(&picked, &tried);
                tried
            }
            // Boxed, to keep the common future small.
            Some(retries) => Box::pin(self.try_and_again(retries, &mut picked)).await,
        };
        let status = tried.as_ref().map(|(_, answered)| answered.head.status);
        learn(&slot, status, self.record);
        let (connected, answered) = tried?;
        slot.answered();
        let answerer = Answerer {
            connected,
            picked,
            _slot: slot,
        };
        Ok((answerer, answered))
    }

    /// The endpoint of the client's own connection, which is taken along.
    fn pick_bound(&mut self) -> Option<Picked<'p>> {
        let own = &self.conn.peer.bound;
        let bound = own.take()?;
        let picked = self.upstream.pick_bound(self.outgoing.aim, &bound);
        match picked {
            Some(_) => self.bound = Some(bound),
            None => own.set(Some(bound)),
        }
        picked
    }

    /// Tries an endpoint, and others, until one serves the request or there is no more to be tried.
    async fn try_and_again(&mut self, retries: &'p Retries, picked: &mut Picked<'p>) -> Tried {
        let mut tries = Tries::new(self.upstream, retries, self.outgoing.request.within);
        loop {
            let tried = self.ask_one(Some(&tries), picked).await;
            self.tell(picked, &tried);
            let ended = EndedTry {
                came: tried.as_ref().map(|(_, answered)| answered.head.status),
                point: Point::of(self.upload.progress.begun.get(), &self.answer),
                is_kept: self.upload.can_begin_again(),
                waited: self.upload.progress.waited(),
            };
            let Some(wait) = tries.another(&self.outgoing.request, &ended) else {
                return tried;
            };
            let reason = ended.came.err().map(Failure::reason);
            let over = self.record.tried(&picked.pool, ended.came.ok(), reason);
            self.unless_left(sleep(wait)).await?;
            let Some(next) = tries.next(self.outgoing.aim, &picked.pool) else {
                return tried;
            };
            if let Ok((connected, answered)) = tried
                && is_over(&answered, &self.answer)
            {
                let after_head = self.outgoing.request.is_head;
                picked.pool.give_back(connected, after_head);
            }
            *picked = next;
            self.answer.clear();
            let head = &mut self.outgoing.out;
            let renamed = self.record.begin_again(over, &picked.pool, head);
            self.upload.begin_again(renamed);
        }
    }

    /// Says what the endpoint made of the request, where that is known.
    fn tell(&self, picked: &Picked<'_>, tried: &Tried) {
        let status = tried.as_ref().map(|(_, answered)| answered.head.status);
        if let Some(outcome) = of_endpoint(status, &self.outgoing.request, self.record) {
            picked.tell(outcome);
        }
        if let Err(Failure::Reply(Rejection::BadResponse(why), _)) = tried {
            picked.note_refused(*why);
        }
    }

    /// Sends the request to one endpoint, over an idle connection or a new one. The response's head is there in the time that `tries`
    /// leave, but for what the client takes to send.
    async fn ask_one(&mut self, tries: Option<&Tries<'_>>, picked: &Picked<'_>) -> Tried {
        let (pool, request) = (&picked.pool, &self.outgoing.request);
        let is_safe = request.is_safe;
        let mut until = tries.map(|tries| tries.until(self.upload.progress.waited()));
        let bound = self.bound.take().and_then(|bound| bound.take(is_safe));
        let mut connected = match bound.or_else(|| pool.idle(is_safe)) {
            Some(connected) => connected,
            None => self.connect(pool, &mut until).await?,
        };
        self.record.reached = Some(pool.clone());
        self.record.sent_by = Some("1.1");
        loop {
            if let Some(until) = until {
                self.outgoing.request.within = until.left();
            }
            match self.both_ways(&mut connected.stream).await {
                Ok(answered) => {
                    let (challenges, request) =
                        (answered.challenges(&self.answer), &self.outgoing.request);
                    connected.is_challenged |= challenges && !request.by_proxy;
                    connected.is_bound |= challenges || request.binds;
                    connected.note_kept_for(answered.head.kept_for);
                    return Ok((connected, answered));
                }
                // The upstream may have closed the idle connection just as the request came; it is sent again only where that
                // can do no harm, since the upstream may have seen it.
                Err(failure) if connected.reused && self.is_stale(&failure) => {
                    self.answer.clear();
                    self.upload.begin_again(None);
                    // Or the new one would wait for its place below the cap.
                    drop(connected);
                    until = tries.map(|tries| tries.until(self.upload.progress.waited()));
                    connected = self.connect(pool, &mut until).await?;
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    fn is_stale(&self, failure: &Failure) -> bool {
        let point = Point::of(self.upload.progress.begun.get(), &self.answer);
        let can_repeat = self.outgoing.request.can_repeat;
        is_stale(failure, point, self.upload.can_begin_again(), can_repeat)
    }

    async fn connect(
        &mut self,
        pool: &Pool,
        until: &mut Option<Until>,
    ) -> Result<Connected, Failure> {
        // Boxed, to keep the common future small.
        let connected = Box::pin(self.unless_left(pool.connect(until))).await?;
        Ok(connected.map_err(unreached)?)
    }
}
