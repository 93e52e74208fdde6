//! What each rejection is told as: one row, for the reply and for all that tells of it elsewhere. docs/reference.md has the same rows.

use super::{OVER_LIMIT, Rejection, tls, unreached};
use crate::policy::shed::Strain;

pub(super) struct Told {
    pub status: u16,
    /// The error type of Proxy-Status (RFC 9209 section 2.3).
    pub error: &'static str,
    /// For metrics, audit and logs.
    pub label: &'static str,
    /// What the client is told; empty where the rejection [words](Rejection::detail) it by what it knows.
    pub detail: &'static str,
    /// Whether it is a policy's word on a request that is in order.
    pub is_policy: bool,
    /// Whether it may be otherwise in a second, where nothing is known of when.
    pub passes_soon: bool,
}

impl Told {
    fn policy(self) -> Told {
        Told {
            is_policy: true,
            ..self
        }
    }

    fn passes_soon(self) -> Told {
        Told {
            passes_soon: true,
            ..self
        }
    }
}

const REQUEST: &str = "http_request_error";
const DENIED: &str = "http_request_denied";
const NOT_FOUND: &str = "destination_not_found";
const UNAVAILABLE: &str = "destination_unavailable";
const OWN: &str = "proxy_internal_error";
const NO_RESPONSE: &str = "http_response_timeout";

impl Rejection {
    pub(super) fn told(&self) -> Told {
        match self {
            Rejection::BadHead(error) => told(error.status(), REQUEST, "bad_head", ""),
            Rejection::BadPath(_) => told(400, REQUEST, "bad_path", ""),
            Rejection::BadTarget => told(
                400,
                REQUEST,
                "bad_target",
                "request target is not a path, or names another host than Host",
            ),
            Rejection::OtherMethod => told(
                400,
                REQUEST,
                "other_method",
                "a field such as X-HTTP-Method-Override, or \"_method\" in the query, names another method, by which this has another route",
            ),
            Rejection::HeadTimeout => {
                told(408, REQUEST, "head_timeout", "request head took too long")
            }
            Rejection::BadBody => told(
                400,
                REQUEST,
                "bad_body",
                "request body is badly framed or cut short",
            ),
            Rejection::BodyTimeout => told(408, REQUEST, "body_timeout", "request body stalled"),
            Rejection::NoRoute => {
                told(404, NOT_FOUND, "no_route", "no route serves this request").policy()
            }
            Rejection::QuotaExceeded(_) => told(429, DENIED, "quota_exceeded", OVER_LIMIT).policy(),
            Rejection::LimitUnknown => told(
                503,
                OWN,
                "limit_unknown",
                "whether the request is over its limit cannot be told now",
            )
            .policy()
            .passes_soon(),
            Rejection::Unauthenticated(asked) => told(
                401,
                DENIED,
                "unauthenticated",
                match asked.unknown_token {
                    true => "the session has ended, or never was",
                    false => "this needs a session, and the request has none",
                },
            )
            .policy(),
            Rejection::Forbidden(_) => told(403, DENIED, "forbidden", "").policy(),
            Rejection::TooManySessions => told(
                403,
                DENIED,
                "too_many_sessions",
                "the user has as many sessions as allowed: end one first",
            ),
            Rejection::SessionsFull => {
                told(503, OWN, "sessions_full", "no session can be started now").passes_soon()
            }
            Rejection::SessionStoreDown => told(
                503,
                OWN,
                "session_store_down",
                "sessions cannot be looked at, started or ended now",
            )
            .policy()
            .passes_soon(),
            Rejection::CircuitOpen(open) => told(
                503,
                UNAVAILABLE,
                "circuit_open",
                match open.is_forced {
                    true => "requests to the upstream are held back by an operator",
                    false => "upstream is failing, and is given time to recover",
                },
            )
            .policy(),
            Rejection::Overloaded => told(
                503,
                "connection_limit_reached",
                "overloaded",
                "upstream has as much to do as it may be given",
            )
            .passes_soon(),
            Rejection::Shed(strain) => told(
                503,
                OWN,
                match strain {
                    Strain::LoopDelay => "shed_loop_delay",
                    Strain::Memory => "shed_memory",
                },
                "more is asked than can be served now",
            )
            .policy()
            .passes_soon(),
            Rejection::NoEndpoint => told(
                503,
                UNAVAILABLE,
                "no_endpoint",
                "upstream has no endpoint that could be asked",
            )
            .passes_soon(),
            Rejection::AuditUnavailable => told(
                503,
                OWN,
                "audit_unavailable",
                "the request cannot be put on record now",
            )
            .policy()
            .passes_soon(),
            Rejection::BodyTooLarge => told(
                413,
                REQUEST,
                "body_too_large",
                "request body is larger than the limit",
            ),
            Rejection::Expectation => told(
                417,
                REQUEST,
                "expectation",
                "only 100-continue can be expected",
            ),
            Rejection::Trace => told(405, DENIED, "trace", "TRACE is not served"),
            Rejection::NotRedirected => told(
                502,
                NOT_FOUND,
                "not_redirected",
                "the connection was not redirected here, so that there is nowhere to go",
            ),
            Rejection::Loop => told(
                502,
                "proxy_loop_detected",
                "loop",
                "the request came back to the proxy that sent it",
            ),
            Rejection::PlainOnTls => told(
                400,
                REQUEST,
                "plain_on_tls",
                "plain HTTP was sent to a port that speaks TLS: use https",
            ),
            Rejection::ConnectFailed(cause) => told(
                502,
                unreached::failed(*cause),
                "connect_failed",
                "upstream cannot be reached",
            ),
            Rejection::ConnectTimeout(stage) => told(
                504,
                unreached::timed_out(*stage),
                "connect_timeout",
                "upstream did not accept a connection in time",
            ),
            Rejection::UpstreamTls(trouble) => {
                let (error, label, detail) = tls::said_of(*trouble);
                told(502, error, label, detail)
            }
            Rejection::UpstreamBroken => told(
                502,
                "http_protocol_error",
                "upstream_broken",
                "upstream broke off or sent nonsense",
            ),
            Rejection::BadResponse(_) => told(502, "http_protocol_error", "upstream_broken", ""),
            Rejection::UpstreamTimeout => told(
                504,
                NO_RESPONSE,
                "upstream_timeout",
                "upstream took too long",
            ),
            Rejection::DeadlineExceeded => told(
                504,
                NO_RESPONSE,
                "deadline_exceeded",
                "the call's deadline is over",
            ),
            Rejection::OtherProtocol => told(
                501,
                REQUEST,
                "other_protocol",
                "only WebSocket can be spoken so, with upstreams that take it",
            ),
            Rejection::NotSwitched => told(
                502,
                "http_upgrade_failed",
                "not_switched",
                "upstream did not switch to WebSocket",
            ),
        }
    }
}

fn told(status: u16, error: &'static str, label: &'static str, detail: &'static str) -> Told {
    Told {
        status,
        error,
        label,
        detail,
        is_policy: false,
        passes_soon: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use smallvec::smallvec;

    use super::super::{CircuitOpen, Exceeded, Unauthenticated};
    use super::*;
    use crate::http1::head::HeadError;
    use crate::http1::path::PathError;
    use crate::http1::response::{BadResponse, reason};
    use crate::net::tls::Trouble;
    use crate::upstream::{Cause, Stage};

    /// One of each label, and of each status of a label.
    fn all() -> Vec<Rejection> {
        let heads = [
            HeadError::HostMissing,
            HeadError::LineTooLong,
            HeadError::TooLarge,
            HeadError::TransferCoding,
            HeadError::Version,
        ];
        let troubles = [
            Trouble::NoCertificate,
            Trouble::ExpiredCertificate,
            Trouble::UnknownAuthority,
            Trouble::WrongName,
            Trouble::BadCertificate,
            Trouble::Distrusted,
            Trouble::NothingInCommon,
            Trouble::NotTls,
            Trouble::Protocol,
        ];
        let asked = Unauthenticated {
            bearer: false,
            realm: String::new(),
            unknown_token: false,
        };
        let exceeded = Exceeded {
            limits: smallvec![],
            retry_after: None,
            fields: Vec::new(),
        };
        let open = CircuitOpen {
            retry_after: Duration::ZERO,
            is_forced: false,
            fallback: None,
        };
        let others = [
            Rejection::BadPath(PathError::AboveRoot),
            Rejection::BadTarget,
            Rejection::OtherMethod,
            Rejection::HeadTimeout,
            Rejection::BadBody,
            Rejection::BodyTimeout,
            Rejection::NoRoute,
            Rejection::QuotaExceeded(Box::new(exceeded)),
            Rejection::LimitUnknown,
            Rejection::Unauthenticated(asked),
            Rejection::Forbidden("role".to_owned()),
            Rejection::TooManySessions,
            Rejection::SessionsFull,
            Rejection::SessionStoreDown,
            Rejection::CircuitOpen(Box::new(open)),
            Rejection::Overloaded,
            Rejection::Shed(Strain::LoopDelay),
            Rejection::Shed(Strain::Memory),
            Rejection::NoEndpoint,
            Rejection::AuditUnavailable,
            Rejection::BodyTooLarge,
            Rejection::Expectation,
            Rejection::Trace,
            Rejection::NotRedirected,
            Rejection::Loop,
            Rejection::PlainOnTls,
            Rejection::ConnectFailed(Cause::Refused),
            Rejection::ConnectTimeout(Stage::Connection),
            Rejection::UpstreamBroken,
            Rejection::BadResponse(BadResponse::Version),
            Rejection::UpstreamTimeout,
            Rejection::DeadlineExceeded,
            Rejection::OtherProtocol,
            Rejection::NotSwitched,
        ];
        let heads = heads.map(Rejection::BadHead).into_iter();
        let troubles = troubles.map(Rejection::UpstreamTls);
        heads.chain(troubles).chain(others).collect()
    }

    #[test]
    fn each_label_is_documented_with_its_status() {
        let reference = include_str!("../../../docs/reference.md");
        let (_, section) = reference.split_once("\n## Why weir refuses\n").unwrap();
        let (table, _) = section.split_once("\n\nThree more").unwrap();
        let documented: BTreeSet<_> = table
            .lines()
            .filter_map(|row| row.strip_prefix("| `")?.split_once("` | "))
            .flat_map(|(label, rest)| {
                let (statuses, _) = rest.split_once(" |").unwrap();
                let statuses = statuses.split(", ");
                statuses.map(move |status| (label, status.parse().unwrap()))
            })
            .collect();
        let all = all();
        let told = all.iter().map(Rejection::told);
        let told: BTreeSet<_> = told.map(|told| (told.label, told.status)).collect();
        assert_eq!(told, documented);
    }

    #[test]
    fn each_status_has_its_phrase_and_each_reply_its_words() {
        for rejection in all() {
            let status = rejection.told().status;
            assert_ne!(reason(status), "", "{status}");
            assert_ne!(rejection.detail(), "", "{rejection:?}");
        }
        assert_eq!(reason(413), "Content Too Large");
    }
}
