//! What an exchange is made of, whichever version of HTTP each side speaks: who asks, how the client's connection goes on, how an exchange fails,
//! and what the upstream has answered. Does no I/O but through [`Ends`].

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::answer::Answer;
use super::audit;
use super::following::LaneView;
use super::headers;
use super::lane::Lane;
use super::outbox::Outbox;
use super::record::{CLIENT_GONE, Record, UPSTREAM_LEFT};
use super::reply::Rejection;
use super::wire::{Deadlines, Elapsed, write};
use crate::config::Listener;
use crate::http1::body::BodyReader;
use crate::http1::head::{BodyLength, values};
use crate::http1::response::{ResponseBody, ResponseHead};
use crate::net::clients::Counted;
use crate::net::stream::Stream;
use crate::net::tls::ClientFacts;
use crate::plan::Plan;
use crate::upstream::Bound;

/// The longest body that weir answers without and reads away, in bytes.
const MOST_SKIPPED: u32 = 64 * 1024;

/// Whether a client's connection can carry another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    KeepAlive,
    /// As `KeepAlive`, once so many bytes of the request's body, which nobody wants, were read away.
    Skip(u32),
    Close,
    /// As `Close`, once what the client may still be sending was read away for a while.
    Linger,
    /// As `Close`, at once: what was to be said was not, and must not look whole.
    Cut,
}

impl Next {
    /// Behind a request of whose body so many bytes are not read.
    pub(super) fn behind(unread: u64) -> Next {
        match u32::try_from(unread) {
            Ok(0) => Next::KeepAlive,
            Ok(unread @ ..=MOST_SKIPPED) => Next::Skip(unread),
            Ok(_) | Err(_) => Next::Close,
        }
    }

    /// Whether the client is told that its connection stays open.
    pub(super) fn lives(self) -> bool {
        match self {
            Next::KeepAlive | Next::Skip(_) => true,
            Next::Close | Next::Linger | Next::Cut => false,
        }
    }
}

/// How an exchange failed: before the response's head went out there can be a reply, afterwards only an abort.
#[derive(Debug)]
pub(super) enum Failure {
    Reply(Rejection, Next),
    /// The client broke off or stopped reading.
    ClientGone,
    /// The upstream broke off, stalled or sent nonsense within its response.
    UpstreamGone,
    /// The response's event could not be made safe, so that its end was held back.
    NotPersisted,
    /// weir ended the response within its body, for this reason.
    CutShort(&'static str),
}

impl Failure {
    /// A name for metrics and audit.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Failure::Reply(rejection, _) => rejection.reason(),
            Failure::ClientGone => CLIENT_GONE,
            Failure::UpstreamGone => UPSTREAM_LEFT,
            Failure::NotPersisted => Rejection::AuditUnavailable.reason(),
            Failure::CutShort(reason) => reason,
        }
    }
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Failure {
        Failure::Reply(rejection, Next::Close)
    }
}

/// A client's connection, as a request sees it.
pub(super) struct Conn<'a> {
    pub lane: &'a Lane,
    pub listener: &'a Listener,
    pub peer: &'a Peer,
    /// Whether the client speaks HTTP/2.
    pub is_http2: bool,
    /// Whether the client's connection was too old for another request when this one came, or others are let in since it began.
    pub is_outdated: bool,
}

impl Conn<'_> {
    /// Whether the client is to hear with an answer that its connection ends.
    pub(super) fn is_to_end(&self) -> bool {
        self.is_outdated || self.lane.leave.has_begun()
    }
}

/// Who is at the other end of a connection.
pub(super) struct Peer {
    /// IPv4 as such, also where it came mapped to IPv6.
    pub ip: IpAddr,
    /// As it is written, since each request says it.
    pub text: String,
    /// When its connection is too old for another request, by [`crate::clock::mono`].
    pub old_at: Duration,
    /// [`crate::plan::Listener::admission`], when it was let in.
    pub admission: u64,
    /// The upstream's connection that is its own, since who it is was said there; of a client of HTTP/1.1.
    pub bound: Cell<Option<Box<Bound>>>,
    /// Where connections are counted by client.
    pub counted: Option<Box<Counted>>,
    /// Where the connection is under TLS.
    pub tls: Option<Box<ClientFacts>>,
    /// Where the listener is transparent.
    pub redirected: Option<Box<Redirected>>,
}

/// A connection that was redirected here, or should have been.
#[derive(Debug, Clone, Copy)]
pub(super) struct Redirected {
    /// Where it was to go, if that is known.
    pub to: Option<SocketAddr>,
    /// Where it came to.
    pub here: Option<SocketAddr>,
    pub from: Option<SocketAddr>,
}

impl Peer {
    pub(super) fn new(ip: IpAddr, old_at: Duration, admission: u64) -> Peer {
        let ip = ip.to_canonical();
        Peer {
            ip,
            text: ip.to_string(),
            old_at,
            admission,
            bound: Cell::default(),
            counted: None,
            tls: None,
            redirected: None,
        }
    }
}

/// The client's end of a connection, with what was read from it and not used.
pub(super) struct Ends<'a> {
    pub client: &'a mut Stream,
    pub buffer: &'a mut Vec<u8>,
    pub deadlines: &'a mut Deadlines,
}

impl Ends<'_> {
    /// Writes all of `bytes` to the client, for at most `within`.
    pub(super) async fn write(&mut self, bytes: &[u8], within: Duration) -> Result<(), Failure> {
        let written = self.deadlines.within(within, write(self.client, bytes));
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(Elapsed) => Err(Failure::ClientGone),
        }
    }
}

/// The rejection once it is on record, or the one that says that it cannot be; the client gets its words where there is a `body`.
pub(super) async fn on_record(
    conn: &Conn<'_>,
    view: &LaneView,
    rejection: Rejection,
    body: bool,
    record: &mut Record,
) -> Rejection {
    record.note_refused(&rejection, body);
    match audit::persist(&view.plan, &conn.lane.outbox, record).await {
        Ok(()) => rejection,
        Err(audit::NotPersisted) => {
            record.note_refused(&Rejection::AuditUnavailable, body);
            Rejection::AuditUnavailable
        }
    }
}

/// Puts a route's own answer on record, unless it cannot be; the client gets its words where there is a `body`.
pub(super) async fn answer_on_record(
    conn: &Conn<'_>,
    view: &LaneView,
    answer: &Answer<'_>,
    body: bool,
    record: &mut Record,
) -> Result<(), Rejection> {
    record.status = answer.status;
    if body {
        record.bytes_out = answer.body.len() as u64;
    }
    let safe = audit::persist(&view.plan, &conn.lane.outbox, record).await;
    safe.map_err(|audit::NotPersisted| Rejection::AuditUnavailable)
}

/// A response's head, and whether the whole request was sent before it came.
pub(super) struct Answered {
    pub head: ResponseHead,
    pub uploaded: bool,
}

impl Answered {
    /// Whether the upstream asks who the client is for as long as the connection lives.
    pub(super) fn challenges(&self, answer: &[u8]) -> bool {
        headers::bind(values(answer, &self.head.fields, "www-authenticate"))
    }

    /// Whether the body goes out in chunks, to a client that knows them.
    pub(super) fn chunked(&self) -> bool {
        match self.head.body {
            ResponseBody::Length(BodyLength::Chunked) | ResponseBody::UntilClose => true,
            ResponseBody::Length(BodyLength::None | BodyLength::Fixed(_)) => false,
        }
    }

    /// What reads the body from HTTP/1.1, and whether the end of the connection ends it.
    pub(super) fn reader(&self) -> (BodyReader, bool) {
        match self.head.body {
            ResponseBody::Length(length) => (BodyReader::of_response(length), false),
            ResponseBody::UntilClose => (BodyReader::new(BodyLength::Fixed(u64::MAX)), true),
        }
    }
}

/// Before the end of the response goes out; `told` once its head has.
pub(super) async fn persist(
    plan: &Plan,
    outbox: &Outbox,
    record: &mut Record,
    told: bool,
) -> Result<(), Failure> {
    let safe = audit::persist(plan, outbox, record).await;
    safe.map_err(|audit::NotPersisted| match told {
        true => Failure::NotPersisted,
        false => Rejection::AuditUnavailable.into(),
    })
}

/// Whether all of the response stands in `answer`, and its connection can serve another request.
pub(super) fn is_over(answered: &Answered, answer: &[u8]) -> bool {
    let body = match answered.head.body {
        ResponseBody::Length(BodyLength::None) => 0,
        ResponseBody::Length(BodyLength::Fixed(bytes)) => bytes,
        ResponseBody::Length(BodyLength::Chunked) | ResponseBody::UntilClose => return false,
    };
    let whole = (answered.head.len as u64).saturating_add(body);
    answered.head.keep_alive && answered.uploaded && answer.len() as u64 == whole
}
