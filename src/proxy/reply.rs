//! Every reply that weir itself gives: the only place with status codes. Bodies are RFC 9457 problems; each reply names
//! its cause in Proxy-Status (RFC 9209).

use std::time::Duration;

use serde::Serialize;

use super::quota::seconds;
use crate::config::breakers::Fallback;
use crate::http1::head::HeadError;
use crate::http1::path::PathError;

/// Why weir answers in the upstream's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rejection {
    BadHead(HeadError),
    BadPath(PathError),
    /// A request target that is not a path, such as that of CONNECT.
    BadTarget,
    /// The client took longer than its time to send a head.
    HeadTimeout,
    /// The request body's framing is wrong.
    BadBody,
    /// The client stalled within its body.
    BodyTimeout,
    NoRoute,
    /// A rate limit.
    QuotaExceeded(Box<Exceeded>),
    /// No session, on a route that requires one.
    Unauthenticated(Unauthenticated),
    /// A session without this claim, on a route that asks for it.
    Forbidden(String),
    /// A log-in, by a user with as many sessions as allowed.
    TooManySessions,
    /// A log-in, with as many sessions in memory as allowed.
    SessionsFull,
    /// The upstream's circuit breaker.
    CircuitOpen(Box<CircuitOpen>),
    /// Longer than the listener takes.
    BodyTooLarge,
    /// An Expect other than `100-continue`.
    Expectation,
    ConnectFailed,
    ConnectTimeout,
    /// The upstream closed, reset or sent nonsense before its head was whole.
    UpstreamBroken,
    UpstreamTimeout,
}

/// How a client is asked who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unauthenticated {
    /// Whether a bearer token would do.
    pub bearer: bool,
    /// The name of the sessions.
    pub realm: String,
    /// Whether a token was sent, but of no live session.
    pub unknown_token: bool,
}

/// What an open breaker answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CircuitOpen {
    pub retry_after: Duration,
    /// In place of weir's own reply.
    pub fallback: Option<Fallback>,
}

/// Which limits refuse a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    /// Their names.
    pub limits: Vec<String>,
    /// When to come again, where there is such a time.
    pub retry_after: Option<Duration>,
    /// What the client is told of its quotas, ready for the wire.
    pub fields: Vec<u8>,
}

impl Rejection {
    /// The status, its reason phrase, the Proxy-Status error type or label, and what to tell the client.
    fn parts(&self) -> (u16, &'static str, &'static str, String) {
        match self {
            Rejection::BadHead(error) => {
                let (status, reason) = match error.status() {
                    431 => (431, "Request Header Fields Too Large"),
                    501 => (501, "Not Implemented"),
                    505 => (505, "HTTP Version Not Supported"),
                    _ => (400, "Bad Request"),
                };
                (status, reason, "http_request_error", error.to_string())
            }
            Rejection::BadPath(error) => {
                (400, "Bad Request", "http_request_error", error.to_string())
            }
            Rejection::BadTarget => (
                400,
                "Bad Request",
                "http_request_error",
                "request target is not a path".to_owned(),
            ),
            Rejection::HeadTimeout => (
                408,
                "Request Timeout",
                "http_request_error",
                "request head took too long".to_owned(),
            ),
            Rejection::BadBody => (
                400,
                "Bad Request",
                "http_request_error",
                "request body is badly framed or cut short".to_owned(),
            ),
            Rejection::BodyTimeout => (
                408,
                "Request Timeout",
                "http_request_error",
                "request body stalled".to_owned(),
            ),
            Rejection::NoRoute => (
                404,
                "Not Found",
                "destination_not_found",
                "no route serves this request".to_owned(),
            ),
            Rejection::QuotaExceeded(exceeded) => {
                let detail = format!("request is over the limit {}", exceeded.limits.join(", "));
                (429, "Too Many Requests", "http_request_denied", detail)
            }
            Rejection::Unauthenticated(asked) => {
                let detail = match asked.unknown_token {
                    true => "the session has ended, or never was",
                    false => "this needs a session, and the request has none",
                };
                (
                    401,
                    "Unauthorized",
                    "http_request_denied",
                    detail.to_owned(),
                )
            }
            Rejection::Forbidden(claim) => (
                403,
                "Forbidden",
                "http_request_denied",
                format!("the session has not the \"{claim}\" that this needs"),
            ),
            Rejection::TooManySessions => (
                403,
                "Forbidden",
                "http_request_denied",
                "the user has as many sessions as allowed: end one first".to_owned(),
            ),
            Rejection::SessionsFull => (
                503,
                "Service Unavailable",
                "proxy_internal_error",
                "no session can be started now".to_owned(),
            ),
            Rejection::CircuitOpen(_) => (
                503,
                "Service Unavailable",
                "destination_unavailable",
                "upstream is failing, and is given time to recover".to_owned(),
            ),
            Rejection::BodyTooLarge => (
                413,
                "Content Too Large",
                "http_request_error",
                "request body is larger than the limit".to_owned(),
            ),
            Rejection::Expectation => (
                417,
                "Expectation Failed",
                "http_request_error",
                "only 100-continue can be expected".to_owned(),
            ),
            Rejection::ConnectFailed => (
                502,
                "Bad Gateway",
                "connection_refused",
                "upstream cannot be reached".to_owned(),
            ),
            Rejection::ConnectTimeout => (
                504,
                "Gateway Timeout",
                "connection_timeout",
                "upstream did not accept a connection in time".to_owned(),
            ),
            Rejection::UpstreamBroken => (
                502,
                "Bad Gateway",
                "http_protocol_error",
                "upstream broke off or sent nonsense".to_owned(),
            ),
            Rejection::UpstreamTimeout => (
                504,
                "Gateway Timeout",
                "http_response_timeout",
                "upstream took too long".to_owned(),
            ),
        }
    }

    /// The status that the client is told.
    pub fn status(&self) -> u16 {
        match self {
            Rejection::CircuitOpen(open) => open
                .fallback
                .as_ref()
                .map_or(503, |fallback| fallback.status),
            other => other.parts().0,
        }
    }

    /// A name for metrics and audit.
    pub fn reason(&self) -> &'static str {
        match self {
            Rejection::BadHead(_) => "bad_head",
            Rejection::BadPath(_) => "bad_path",
            Rejection::BadTarget => "bad_target",
            Rejection::HeadTimeout => "head_timeout",
            Rejection::BadBody => "bad_body",
            Rejection::BodyTimeout => "body_timeout",
            Rejection::NoRoute => "no_route",
            Rejection::QuotaExceeded(_) => "quota_exceeded",
            Rejection::Unauthenticated(_) => "unauthenticated",
            Rejection::Forbidden(_) => "forbidden",
            Rejection::TooManySessions => "too_many_sessions",
            Rejection::SessionsFull => "sessions_full",
            Rejection::CircuitOpen(_) => "circuit_open",
            Rejection::BodyTooLarge => "body_too_large",
            Rejection::Expectation => "expectation",
            Rejection::ConnectFailed => "connect_failed",
            Rejection::ConnectTimeout => "connect_timeout",
            Rejection::UpstreamBroken => "upstream_broken",
            Rejection::UpstreamTimeout => "upstream_timeout",
        }
    }

    /// Whether it is a policy's word on a request that is in order.
    pub fn is_policy(&self) -> bool {
        match self {
            Rejection::NoRoute
            | Rejection::QuotaExceeded(_)
            | Rejection::Unauthenticated(_)
            | Rejection::Forbidden(_)
            | Rejection::CircuitOpen(_) => true,
            Rejection::BadHead(_)
            | Rejection::BadPath(_)
            | Rejection::BadTarget
            | Rejection::HeadTimeout
            | Rejection::BadBody
            | Rejection::BodyTimeout
            | Rejection::BodyTooLarge
            | Rejection::Expectation
            | Rejection::TooManySessions
            | Rejection::SessionsFull
            | Rejection::ConnectFailed
            | Rejection::ConnectTimeout
            | Rejection::UpstreamBroken
            | Rejection::UpstreamTimeout => false,
        }
    }

    /// The whole reply on the wire. Without `keep_alive` it says that the connection closes.
    pub fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        let (status, title, label, detail) = self.parts();
        let problem = Problem {
            kind: "about:blank",
            title,
            status,
            detail: &detail,
            violated_policies: &[],
        };
        let (problem, retry_after, fields) = match self {
            Rejection::QuotaExceeded(exceeded) => {
                // draft-ietf-httpapi-ratelimit-headers-10, section 5.1.
                let kind = "https://iana.org/assignments/http-problem-types#quota-exceeded";
                let problem = Problem {
                    kind,
                    violated_policies: &exceeded.limits,
                    ..problem
                };
                (problem, exceeded.retry_after, exceeded.fields.as_slice())
            }
            Rejection::CircuitOpen(open) => (problem, Some(open.retry_after), &[][..]),
            Rejection::SessionsFull => (problem, Some(Duration::from_secs(1)), &[][..]),
            _ => (problem, None, &[][..]),
        };
        let fallback = match self {
            Rejection::CircuitOpen(open) => open.fallback.as_ref(),
            _ => None,
        };
        let (status, title, content_type, body) = match fallback {
            // The reason phrase has no meaning and may be empty (RFC 9112 section 4).
            Some(fallback) => (
                fallback.status,
                "",
                &*fallback.content_type,
                fallback.body.clone().into_bytes(),
            ),
            None => (
                status,
                title,
                "application/problem+json",
                serde_json::to_vec(&problem).unwrap_or_default(),
            ),
        };
        let mut reply = format!(
            "HTTP/1.1 {status} {title}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
             Proxy-Status: weir; error={label}\r\n",
            body.len()
        )
        .into_bytes();
        reply.extend_from_slice(fields);
        if let Rejection::Unauthenticated(asked) = self {
            // RFC 9110 section 11.6.1 wants a challenge; for cookies there is no registered scheme.
            let scheme = if asked.bearer { "Bearer" } else { "Session" };
            // RFC 6750 section 3.1.
            let error = match asked.unknown_token {
                true => ", error=\"invalid_token\"",
                false => "",
            };
            let challenge = format!(
                "WWW-Authenticate: {scheme} realm=\"{}\"{error}\r\n",
                asked.realm
            );
            reply.extend_from_slice(challenge.as_bytes());
        }
        if let Some(wait) = retry_after {
            reply
                .extend_from_slice(format!("Retry-After: {}\r\n", seconds(wait).max(1)).as_bytes());
        }
        if !keep_alive {
            reply.extend_from_slice(b"Connection: close\r\n");
        }
        reply.extend_from_slice(b"\r\n");
        reply.extend_from_slice(&body);
        reply
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
    #[serde(
        rename = "violated-policies",
        skip_serializing_if = "<[String]>::is_empty"
    )]
    violated_policies: &'a [String],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_a_problem_whose_detail_is_valid_json() {
        let reply =
            String::from_utf8(Rejection::BadPath(PathError::AmbiguousEscape).to_bytes(false))
                .unwrap();
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
        assert!(body.contains(r#"escaped \"/\", \"\\\" or NUL"#), "{body}");
    }
}
