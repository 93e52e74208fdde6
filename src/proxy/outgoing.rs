//! A checked request on its way: its head as it goes out, and what its answer will need. Must not do I/O with either side.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::admit::Admitted;
use super::audit;
use super::exchange::{Answered, Conn, Failure, Next};
use super::headers;
use super::outcome::{self, Client};
use super::quota::Quota;
use super::record::Record;
use super::reply::Rejection;
use super::sessions;
use super::trace::Trace;
use super::wire::Buffer;
use crate::clock;
use crate::config::Route;
use crate::config::upstreams::Upstream;
use crate::http1::head::{BodyLength, RequestHead};
use crate::http2::grpc;
use crate::plan::Plan;
use crate::policy::session::{Session, SessionId};
use crate::store::breakers::{CallEnd, CallPermit};
use crate::upstream::{Aim, authority_of};

/// A checked request with its head as it goes out, and what its answer will need.
pub(super) struct Outgoing<'p> {
    pub plan: &'p Plan,
    pub route: &'p Route,
    /// An index into the configuration's upstreams.
    pub upstream: usize,
    /// Which endpoint is wanted.
    pub aim: Aim,
    pub request: Request,
    /// Its head as HTTP/1.1; later the response's.
    pub out: Buffer<'p>,
    /// Whether the client lets its connection live.
    pub keep_alive: bool,
    /// The protocols that the client offers to switch to.
    pub switch_to: Option<Vec<u8>>,
    /// Whether the client waits for `100 Continue`.
    pub expects: bool,
    /// The key of a WebSocket that the client asked for by HTTP/2.
    pub websocket_key: Option<String>,
    pub session: Option<Arc<Session>>,
    /// Those of [`sessions::others`].
    other_sessions: Option<Vec<SessionId>>,
    quota: Quota<'p>,
    permit: Option<CallPermit>,
}

/// The request whose head stands at the front of the client's `buffer`, which is taken off there. `over_http2`: where one side
/// speaks that.
pub(super) fn prepare<'p>(
    conn: &Conn<'p>,
    admitted: Admitted<'p>,
    buffer: &mut Vec<u8>,
    head: &RequestHead,
    over_http2: bool,
    record: &mut Record,
) -> Outgoing<'p> {
    let is_kept = |trace: &Trace| trace.is_kept(admitted.plan);
    record.forwarded = record.trace.as_ref().is_some_and(is_kept).then(clock::mono);
    let switch_to = headers::upgrade(buffer, head);
    let asks = admitted.route.session.as_ref();
    let identity = admitted.session.as_deref().zip(asks);
    let settings = &admitted.plan.config.upstreams[admitted.upstream];
    let authority = || match admitted.aim.original {
        Some(original) => original.to_string(),
        None => settings
            .endpoints
            .first()
            .map_or_else(String::new, authority_of),
    };
    let passed = headers::Passed {
        target: &admitted.target,
        route: admitted.route,
        authority: &authority,
        client: &admitted.client,
        request_id: &admitted.request_id,
        trace: record.trace.as_ref(),
        identity_fields: &admitted.plan.identity_fields,
        identity: identity
            .map(|(session, asks)| (&admitted.plan.sessions[asks.sessions].settings, session)),
    };
    let mut out = conn.lane.buffers.take();
    headers::put_request_head(
        &mut out,
        buffer,
        head,
        &passed,
        conn.peer,
        switch_to.as_deref(),
    );
    let Admitted {
        plan,
        route,
        upstream: upstream_index,
        aim,
        expects,
        session,
        quota,
        permit,
        ..
    } = admitted;
    let mut request = Request::of(conn, route, settings, buffer, head);
    request.by_proxy = admitted.client.behind_trusted;
    request.upgrade = switch_to.is_some();
    if over_http2 {
        request.heed(buffer, head, record);
    }
    let other_sessions = sessions::others(plan, route, session.as_deref(), head.lines(buffer));
    buffer.drain(..head.len);
    Outgoing {
        plan,
        route,
        upstream: upstream_index,
        aim,
        request,
        out,
        keep_alive: head.keep_alive,
        switch_to,
        expects,
        websocket_key: None,
        session,
        other_sessions,
        quota,
        permit,
    }
}

impl<'p> Outgoing<'p> {
    pub(super) fn settings(&self) -> &'p Upstream {
        &self.plan.config.upstreams[self.upstream]
    }

    /// How many bytes of its body may be kept to be sent again.
    pub(super) fn keep(&self) -> usize {
        let retries = self.settings().retries.as_ref();
        retries.map_or(0, |retries| retries.buffer)
    }

    /// Does what the upstream's response says to weir, and puts its head for the client in place of the request's in `out`. Says
    /// what becomes of the client's connection, which may live on where it `may_live`. A refusal is no failure of the upstream's, whose
    /// part is over with it.
    pub(super) async fn begin_response(
        &mut self,
        conn: &Conn<'_>,
        answer: &[u8],
        answered: &Answered,
        may_live: bool,
        record: &mut Record,
    ) -> Result<Next, Rejection> {
        let head = &answered.head;
        let told = sessions::start_or_end(
            self.plan,
            conn.lane,
            self.route,
            (self.session.as_deref(), self.other_sessions.as_deref()),
            (answer, head),
            record.draft.as_deref_mut(),
            &mut self.quota.waited,
        );
        let told = match told.await {
            Ok(told) => told,
            Err(rejection) => {
                self.finish(CallEnd::Status(head.status), record);
                return Err(rejection);
            }
        };
        record.status = head.status;
        audit::responded(self.plan, self.route.audit, record, answer, head);
        let lives = self.keep_alive && may_live && head.status != 101 && !conn.is_to_end();
        let back = headers::Back {
            chunked: answered.chunked(),
            is_http10: self.request.is_http10,
            next: if lives { Next::KeepAlive } else { Next::Close },
            changes: &self.route.response_headers,
            switched: self.switch_to.as_deref().filter(|_| head.status == 101),
            of_session: told.is_some(),
            date: &conn.lane.date,
        };
        self.out.clear();
        let quota = &self.quota;
        Ok(headers::put_response_head(
            &mut self.out,
            answer,
            head,
            &back,
            |out| {
                quota.tell(out);
                out.extend_from_slice(told.as_deref().unwrap_or_default());
            },
        ))
    }

    /// The upstream's part is over.
    pub(super) fn finish(&mut self, end: CallEnd, record: &Record) {
        if let Some(permit) = self.permit.take() {
            let waited = record.waited().unwrap_or_default();
            permit.end(end, waited, clock::mono());
        }
    }

    /// The upstream's part is over, without a whole response. What never set out is refused by weir, and costs no quota.
    pub(super) fn failed(&mut self, failure: &Failure, record: &Record) {
        let refused = matches!(
            failure,
            Failure::Reply(Rejection::Overloaded | Rejection::NoEndpoint, _)
        );
        if refused && record.reached.is_none() {
            self.quota.give_back(clock::moment(), |_| true);
        }
        match outcome::end_of(failure, &self.request, record) {
            Some(end) => self.finish(end, record),
            None => {
                if let Some(permit) = self.permit.take() {
                    let waited = record.waited().unwrap_or_default();
                    permit.abandon(waited, clock::mono());
                }
            }
        }
    }

    /// The failure, after which another request may follow where this one was in order and the client was told nothing yet: it is known
    /// where its body ends, of which so many bytes were `read`, and nothing of it is on its way.
    pub(super) fn in_order(&self, conn: &Conn<'_>, failure: Failure, read: Option<u64>) -> Failure {
        let may_live = self.keep_alive && !conn.is_to_end();
        let client = outcome::client_after(&failure);
        let Failure::Reply(refused, next) = failure else {
            return failure;
        };
        let next = match (client, self.request.body, read) {
            (Client::Lives | Client::LivesBehindNone, BodyLength::None, _) if may_live => {
                Next::KeepAlive
            }
            (Client::Lives, BodyLength::Fixed(bytes), Some(read)) if may_live => {
                Next::behind(bytes.saturating_sub(read))
            }
            _ => next,
        };
        Failure::Reply(refused, next)
    }
}

/// A checked request as it goes out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// How the client frames the body, and so does weir.
    pub body: BodyLength,
    /// Whether the method is HEAD.
    pub is_head: bool,
    /// Whether it costs nothing to send it twice: it is without a body, and changes nothing.
    pub is_safe: bool,
    /// Whether it does no harm to send it twice (RFC 9110 section 9.2.2).
    pub can_repeat: bool,
    /// Whether the file says that it may be sent again, though the upstream may have seen it.
    pub may_be_retried: bool,
    /// Whether a switch of protocols was asked for.
    pub upgrade: bool,
    /// Whether it says who the client is for as long as the upstream's connection lives, as [`headers::bind`] knows.
    pub binds: bool,
    /// Whether it came by a proxy that is trusted, whose connection may be of several clients.
    pub by_proxy: bool,
    /// Whether the client speaks HTTP/1.0, which has no chunks.
    pub is_http10: bool,
    pub max_body: u64,
    /// For the response's head once the request is sent, and for each stall of an upstream that does not read.
    pub within: Duration,
    /// For the body to be whole, from the head on.
    pub read_within: Duration,
    /// For each stall of the client's, and of the upstream's within a body.
    pub idle: Duration,
    /// Where gRPC is spoken and one side is HTTP/2.
    pub grpc: Option<Call>,
    /// Whether the client says that it takes trailers, where one side is HTTP/2.
    pub takes_trailers: bool,
}

/// A call of gRPC.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    /// When the client gives up, by [`clock::mono`].
    pub deadline: Option<Duration>,
}

impl Request {
    /// Of a head that asks for no switch, and for nothing that only HTTP/2 has.
    fn of(
        conn: &Conn<'_>,
        route: &Route,
        settings: &Upstream,
        buffer: &[u8],
        head: &RequestHead,
    ) -> Request {
        let method = &buffer[head.method.clone()];
        let is_safe = [&b"GET"[..], b"HEAD", b"OPTIONS"].contains(&method);
        let is_idempotent = is_safe || [&b"PUT"[..], b"DELETE"].contains(&method);
        let retries = settings.retries.as_ref();
        Request {
            body: head.body,
            is_head: method == b"HEAD",
            is_safe: is_safe && head.body == BodyLength::None,
            can_repeat: is_idempotent && head.body == BodyLength::None,
            may_be_retried: retries
                .is_some_and(|it| it.methods.iter().any(|it| it.as_bytes() == method)),
            upgrade: false,
            binds: headers::bind(head.values(buffer, "authorization")),
            by_proxy: false,
            is_http10: head.minor_version == 0,
            max_body: conn.listener.max_body,
            within: route.timeout.unwrap_or(settings.timeout),
            read_within: conn.listener.request_read,
            idle: conn.listener.stream_idle,
            grpc: None,
            takes_trailers: false,
        }
    }

    /// Takes from the head what has a meaning over HTTP/2.
    fn heed(&mut self, buffer: &[u8], head: &RequestHead, record: &Record) {
        let (mut is_grpc, mut deadline) = (false, None);
        for (name, value) in &head.fields {
            let value = &buffer[value.clone()];
            let is = |wanted| headers::is(buffer, name, wanted);
            if is("content-type") {
                is_grpc |= grpc::is_grpc(value);
            } else if is("te") {
                let mut codings = value.split(|byte| *byte == b',');
                self.takes_trailers |=
                    codings.any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"));
            } else if is("grpc-timeout") {
                deadline = grpc::timeout(value).map(|timeout| record.began + timeout);
            }
        }
        self.grpc = is_grpc.then_some(Call { deadline });
    }

    fn deadline(&self) -> Option<Duration> {
        self.grpc?.deadline
    }

    /// What is left of `span` before the client gives up.
    pub(super) fn left_of(&self, span: Duration) -> Duration {
        let left = self
            .deadline()
            .map(|deadline| deadline.saturating_sub(clock::mono()));
        left.map_or(span, |left| left.min(span))
    }

    /// Comes back when the client gives up.
    pub(super) async fn until_deadline(&self) {
        match self.deadline() {
            Some(deadline) => sleep(deadline.saturating_sub(clock::mono())).await,
            None => pending().await,
        }
    }

    /// Whether the client has given up.
    pub(super) fn is_over(&self) -> bool {
        self.deadline()
            .is_some_and(|deadline| clock::mono() >= deadline)
    }
}
