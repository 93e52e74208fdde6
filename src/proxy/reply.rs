//! Every reply that weir gives of its own accord, and so the only place with status codes. Bodies are RFC 9457 problems; each reply names
//! its cause in Proxy-Status (RFC 9209). Does no I/O.

mod tls;
mod told;
mod unreached;

use std::borrow::Cow;
use std::cell::{Ref, RefCell};
use std::io;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use smallvec::SmallVec;

use self::told::Told;
use crate::clock;
use crate::config::breakers::Fallback;
use crate::http1::head::HeadError;
use crate::http1::path::PathError;
use crate::http1::response::{BadResponse, reason};
use crate::http2::grpc::GrpcStatus;
use crate::net::tls::Trouble;
use crate::policy::shed::Strain;
use crate::upstream::{Cause, Stage};

/// Why weir answers in the upstream's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rejection {
    BadHead(HeadError),
    BadPath(PathError),
    /// A request target that is not a path, such as that of CONNECT.
    BadTarget,
    /// A field or the query says another method, by which the request would have another route.
    OtherMethod,
    /// The client took longer than its time to send a head.
    HeadTimeout,
    /// The request body's framing is wrong.
    BadBody,
    /// The client stalled within its body.
    BodyTimeout,
    NoRoute,
    /// A rate limit.
    QuotaExceeded(Box<Exceeded>),
    /// A shared limit of which Redis does not answer, and which is to refuse then.
    LimitUnknown,
    /// No session, on a route that requires one.
    Unauthenticated(Unauthenticated),
    /// A session without this claim, on a route that asks for it.
    Forbidden(String),
    /// A log-in, by a user with as many sessions as allowed.
    TooManySessions,
    /// A log-in, with as many sessions in memory as allowed.
    SessionsFull,
    /// Redis does not answer, and nothing that is known of the session holds any more.
    SessionStoreDown,
    /// The upstream's circuit breaker.
    CircuitOpen(Box<CircuitOpen>),
    /// As much is asked of the upstream as may be.
    Overloaded,
    /// The process itself has more to do than it can.
    Shed(Strain),
    /// None of the upstream's endpoints is known, or up.
    NoEndpoint,
    /// Its event cannot be made safe, and delivery is guaranteed.
    AuditUnavailable,
    /// Longer than the listener takes.
    BodyTooLarge,
    /// An Expect other than `100-continue`.
    Expectation,
    /// TRACE: its answer would show a client what weir and its proxies put into requests.
    Trace,
    /// Its connection came to a transparent listener and was meant for weir itself, or for no one knows whom.
    NotRedirected,
    /// It is weir's own, redirected back.
    Loop,
    /// Plain HTTP, to a listener that speaks TLS.
    PlainOnTls,
    ConnectFailed(Cause),
    ConnectTimeout(Stage),
    /// There is no TLS with the upstream.
    UpstreamTls(Trouble),
    /// The upstream closed, reset or sent nonsense before its head was whole.
    UpstreamBroken,
    /// The upstream answered, and what is no head that weir passes on.
    BadResponse(BadResponse),
    UpstreamTimeout,
    /// The time that a gRPC client gave its call.
    DeadlineExceeded,
    /// An extended CONNECT for what is not passed on.
    OtherProtocol,
    /// An extended CONNECT to an upstream that answered as to any request.
    NotSwitched,
}

/// How a client is asked who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unauthenticated {
    /// Whether a bearer token would do.
    pub bearer: bool,
    /// The name of the sessions.
    pub realm: String,
    /// Whether a token was sent, but of no live session.
    pub unknown_token: bool,
}

/// To whom a reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asker {
    /// Whether its connection stays open.
    pub keep_alive: bool,
    /// Whether it gets no body: by HEAD (RFC 9110 section 9.3.2), or by gRPC, whose refusals are trailers.
    pub without_body: bool,
    /// Whether it speaks HTTP/1.0.
    pub old: bool,
}

/// What an open breaker answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CircuitOpen {
    pub retry_after: Duration,
    /// By an operator, whatever the upstream does.
    pub is_forced: bool,
    /// In place of weir's own reply.
    pub fallback: Option<Fallback>,
}

/// Which limits refuse a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exceeded {
    /// Their names, each written as a JSON string.
    pub limits: SmallVec<[&'static str; 2]>,
    /// When to come again, where there is such a time.
    pub retry_after: Option<Duration>,
    /// What the client is told of its quotas, ready for the wire.
    pub fields: Vec<u8>,
}

/// The time as replies tell it, written once a second.
#[derive(Debug, Default)]
pub(super) struct Date(RefCell<(u64, Vec<u8>)>);

impl Date {
    /// The field line of `Date` (RFC 9110 section 6.6.1).
    pub(super) fn field(&self) -> Ref<'_, Vec<u8>> {
        let now = clock::wall();
        if self.0.borrow().0 != now.as_secs() {
            let text = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + now);
            self.0
                .replace((now.as_secs(), format!("Date: {text}\r\n").into_bytes()));
        }
        Ref::map(self.0.borrow(), |(_, field)| field)
    }
}

const OVER_LIMIT: &str = "request is over the limits named";

impl Rejection {
    /// What to tell the client.
    pub(super) fn detail(&self) -> Cow<'static, str> {
        match self {
            Rejection::BadHead(error) => Cow::Owned(error.to_string()),
            Rejection::BadPath(error) => Cow::Owned(error.to_string()),
            Rejection::BadResponse(why) => {
                Cow::Owned(format!("upstream's response cannot be read: {why}"))
            }
            Rejection::Forbidden(claim) => Cow::Owned(format!(
                "the session has not the \"{claim}\" that this needs"
            )),
            other => Cow::Borrowed(other.told().detail),
        }
    }

    /// A name for metrics and audit.
    pub(super) fn reason(&self) -> &'static str {
        self.told().label
    }

    /// Whether it is a policy's word on a request that is in order.
    pub(super) fn is_policy(&self) -> bool {
        self.told().is_policy
    }

    /// The status that the client is told.
    pub(super) fn status(&self) -> u16 {
        let fallback = self.fallback();
        fallback.map_or_else(|| self.told().status, |fallback| fallback.status)
    }

    /// Appends the whole reply to `out`; `body` is room for what it says.
    pub(super) fn put(&self, out: &mut Vec<u8>, body: &mut Vec<u8>, to: Asker, date: &Date) {
        let told = self.told();
        let mut status = told.status;
        let mut content_type = "application/problem+json";
        body.clear();
        if let Some(fallback) = self.fallback() {
            (status, content_type) = (fallback.status, &fallback.content_type);
            body.extend_from_slice(fallback.body.as_bytes());
        } else {
            self.write_problem(&mut *body, status);
        }
        put_status(out, status);
        if !body.is_empty() {
            for part in ["Content-Type: ", content_type, "\r\n"] {
                out.extend_from_slice(part.as_bytes());
            }
        }
        put_length(out, status, body.len());
        let status_parts = ["Proxy-Status: weir; error=", told.error, "; details=\""];
        for part in status_parts.into_iter().chain([told.label, "\"\r\n"]) {
            out.extend_from_slice(part.as_bytes());
        }
        out.extend_from_slice(&date.field());
        if let Rejection::QuotaExceeded(exceeded) = self {
            out.extend_from_slice(&exceeded.fields);
        }
        if *self == Rejection::Trace {
            // RFC 9110 section 15.5.6 wants it; routes and upstreams may take fewer.
            out.extend_from_slice(b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n");
        }
        if let Rejection::Unauthenticated(asked) = self {
            put_challenge(out, asked);
        }
        if let Some(wait) = self.retry_after(&told) {
            out.extend_from_slice(b"Retry-After: ");
            let mut number = itoa::Buffer::new();
            out.extend_from_slice(number.format(seconds(wait).max(1)).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        put_head_end(out, to);
        if !to.without_body {
            out.extend_from_slice(body);
        }
    }

    /// What it is to a client of gRPC, to which no fallback can be told.
    pub(super) fn grpc(&self) -> GrpcStatus {
        GrpcStatus::of_refusal(self.told().status)
    }

    /// What an open breaker answers in place of a problem.
    fn fallback(&self) -> Option<&Fallback> {
        match self {
            Rejection::CircuitOpen(open) => open.fallback.as_ref(),
            _ => None,
        }
    }

    /// The bytes of what [`Rejection::put`] says beside the head.
    pub(super) fn body_len(&self) -> u64 {
        if let Some(fallback) = self.fallback() {
            return fallback.body.len() as u64;
        }
        let mut counted = Counted(0);
        self.write_problem(&mut counted, self.told().status);
        counted.0
    }

    fn write_problem(&self, mut into: impl io::Write, status: u16) {
        if let Rejection::QuotaExceeded(exceeded) = self {
            for part in quota_problem(&exceeded.limits) {
                into.write_all(part.as_bytes())
                    .expect("every byte is taken");
            }
            return;
        }
        let problem = Problem {
            kind: "about:blank",
            title: reason(status),
            status,
            detail: &self.detail(),
        };
        serde_json::to_writer(into, &problem)
            .expect("a problem is texts and a number, and every byte is taken");
    }

    fn retry_after(&self, told: &Told) -> Option<Duration> {
        match self {
            Rejection::QuotaExceeded(exceeded) => exceeded.retry_after,
            Rejection::CircuitOpen(open) => Some(open.retry_after),
            _ => told.passes_soon.then_some(Duration::from_secs(1)),
        }
    }
}

/// Appends the status line.
pub(super) fn put_status(out: &mut Vec<u8>, status: u16) {
    let mut number = itoa::Buffer::new();
    let (number, reason) = (number.format(status), reason(status));
    for part in ["HTTP/1.1 ", number, " ", reason, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// RFC 9110 section 8.6 forbids a length in a 204, and one in a 304 would be that of another response.
pub(super) fn put_length(out: &mut Vec<u8>, status: u16, bytes: usize) {
    if matches!(status, 204 | 304) {
        return;
    }
    let mut number = itoa::Buffer::new();
    for part in ["Content-Length: ", number.format(bytes), "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Says whether the connection stays open, and ends the head.
pub(super) fn put_head_end(out: &mut Vec<u8>, to: Asker) {
    match (to.keep_alive, to.old) {
        (true, false) => {}
        // It closes unless told (RFC 9112 section 9.3).
        (true, true) => out.extend_from_slice(b"Connection: keep-alive\r\n"),
        (false, _) => out.extend_from_slice(b"Connection: close\r\n"),
    }
    out.extend_from_slice(b"\r\n");
}

/// The problem of draft-ietf-httpapi-ratelimit-headers-10, section 5.1, in its parts, which are JSON already, since a flood is answered
/// with it.
fn quota_problem<'a>(limits: &'a [&str]) -> impl Iterator<Item = &'a str> {
    let head = [
        r#"{"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","#,
        r#""title":"Too Many Requests","status":429,"detail":""#,
        OVER_LIMIT,
        r#"","violated-policies":["#,
    ];
    let limits = limits.iter().enumerate();
    let limits = limits.flat_map(|(index, limit)| [if index > 0 { "," } else { "" }, limit]);
    head.into_iter().chain(limits).chain(["]}"])
}

/// Whole seconds, rounded up: a client that waits so long has waited long enough.
pub(super) fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// RFC 9110 section 11.6.1 wants a challenge in a 401; for cookies there is no registered scheme.
fn put_challenge(out: &mut Vec<u8>, asked: &Unauthenticated) {
    let scheme = if asked.bearer { "Bearer" } else { "Session" };
    // RFC 6750 section 3.1.
    let error = match asked.unknown_token {
        true => ", error=\"invalid_token\"",
        false => "",
    };
    let realm = asked.realm.as_str();
    let parts = [
        "WWW-Authenticate: ",
        scheme,
        " realm=\"",
        realm,
        "\"",
        error,
        "\r\n",
    ];
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Bytes that are written nowhere.
struct Counted(u64);

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A problem of RFC 9457.
#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    detail: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_a_problem_whose_detail_is_valid_json() {
        let (mut reply, mut room) = (Vec::new(), Vec::new());
        let rejection = Rejection::BadPath(PathError::EscapedSeparators);
        let to = Asker {
            keep_alive: false,
            without_body: false,
            old: false,
        };
        rejection.put(&mut reply, &mut room, to, &Date::default());
        let reply = String::from_utf8(reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with(
                "HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\n"
            ),
            "{head}"
        );
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", body.len()))
                && head.ends_with("Connection: close")
        );
        let date = head.lines().find_map(|line| line.strip_prefix("Date: "));
        let date = httpdate::parse_http_date(date.unwrap()).unwrap();
        let told = date.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(clock::wall().abs_diff(told) < Duration::from_secs(5));
        assert!(body.contains(r#"escaped \"/\" or \"\\\", and"#), "{body}");
        assert_eq!(rejection.body_len(), body.len() as u64);
    }
}
