//! What the failure of an exchange means, whichever version each side speaks: to the upstream's breaker and to its endpoint, to what is
//! learnt of its pace, to another try, and to the connections of both sides. How it is told is `reply`'s. Must not act on it.

use super::exchange::Failure;
use super::outgoing::Request;
use super::record::Record;
use super::reply::Rejection;
use super::retries::Point;
use crate::config::upstreams::RetryOn;
use crate::http2::grpc::GrpcStatus;
use crate::store::breakers::CallEnd;
use crate::upstream::{Cause, EndpointOutcome, Fault, Slot, Unreached};

/// What an exchange failed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Met {
    /// The upstream has as much to do as it may be given, or has no endpoint.
    NoPlace,
    /// weir itself lacks what a connection takes.
    Own,
    /// There was no connection.
    NoConnection,
    /// It broke, or carried nonsense, before a response's head was told to the client.
    Broken,
    /// The upstream took too long to answer, or to read.
    TimedOut,
    /// The client's own deadline, before the head.
    Deadline,
    /// The upstream broke off, stalled or sent nonsense within its response.
    BrokenOff,
    /// weir ended the response within its body.
    CutShort,
    ClientLeft,
    /// What weir makes of the request, or of the answer, by itself.
    NotTheirs,
}

/// What becomes of a client's connection of HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Client {
    /// It may live on, behind what is left of the body.
    Lives,
    /// It may, where the request has no body.
    LivesBehindNone,
    /// As the failure says.
    AsSaid,
}

impl Met {
    fn of(failure: &Failure) -> Met {
        match failure {
            Failure::Reply(rejection, _) => Met::of_rejection(rejection),
            Failure::ClientGone => Met::ClientLeft,
            Failure::UpstreamGone => Met::BrokenOff,
            Failure::NotPersisted => Met::NotTheirs,
            Failure::CutShort(_) => Met::CutShort,
        }
    }

    fn of_rejection(rejection: &Rejection) -> Met {
        match rejection {
            Rejection::Overloaded | Rejection::NoEndpoint => Met::NoPlace,
            Rejection::ConnectFailed(Cause::Own) => Met::Own,
            Rejection::ConnectFailed(
                Cause::Refused
                | Cause::NoAddress
                | Cause::NoRoute
                | Cause::Unavailable
                | Cause::BrokenOff
                | Cause::OtherProtocol,
            )
            | Rejection::ConnectTimeout(_)
            | Rejection::UpstreamTls(_) => Met::NoConnection,
            Rejection::UpstreamBroken | Rejection::BadResponse(_) => Met::Broken,
            Rejection::UpstreamTimeout => Met::TimedOut,
            Rejection::DeadlineExceeded => Met::Deadline,
            Rejection::BadHead(_)
            | Rejection::BadPath(_)
            | Rejection::BadTarget
            | Rejection::OtherMethod
            | Rejection::HeadTimeout
            | Rejection::BadBody
            | Rejection::BodyTimeout
            | Rejection::NoRoute
            | Rejection::QuotaExceeded(_)
            | Rejection::LimitUnknown
            | Rejection::Unauthenticated(_)
            | Rejection::Forbidden(_)
            | Rejection::TooManySessions
            | Rejection::SessionsFull
            | Rejection::SessionStoreDown
            | Rejection::CircuitOpen(_)
            | Rejection::Shed(_)
            | Rejection::AuditUnavailable
            | Rejection::BodyTooLarge
            | Rejection::Expectation
            | Rejection::Trace
            | Rejection::NotRedirected
            | Rejection::Loop
            | Rejection::PlainOnTls
            | Rejection::OtherProtocol
            | Rejection::NotSwitched => Met::NotTheirs,
        }
    }

    /// To the breaker, and to what judges the endpoint.
    fn end(self) -> Option<CallEnd> {
        match self {
            Met::NoConnection => Some(CallEnd::ConnectFailed),
            Met::Broken | Met::BrokenOff => Some(CallEnd::Reset),
            Met::TimedOut => Some(CallEnd::TimedOut),
            Met::Deadline => Some(CallEnd::Deadline),
            // What weir lacks itself is not the upstream's fault.
            Met::NoPlace | Met::Own | Met::CutShort | Met::ClientLeft | Met::NotTheirs => None,
        }
    }
}

/// What a failed exchange says of the upstream; `None` when it says nothing.
pub(super) fn end_of(failure: &Failure, request: &Request, record: &Record) -> Option<CallEnd> {
    // One that gives up on a body may have had its reason in the client's pace; calls of gRPC stream at whatever pace they like.
    let is_its_own = record.sent.is_some() || request.grpc.is_some();
    end_of_met(Met::of(failure), is_its_own)
}

/// `is_its_own`: whether the upstream, where it broke off, had no other reason.
fn end_of_met(met: Met, is_its_own: bool) -> Option<CallEnd> {
    met.end().filter(|_| is_its_own || met != Met::Broken)
}

/// What an exchange whose response has begun says of the upstream: a response of this `status`, and of this one of gRPC's, if that has come.
pub(super) fn end_of_response<T>(
    status: u16,
    grpc: Option<GrpcStatus>,
    streamed: &Result<T, Failure>,
) -> CallEnd {
    let end = match (streamed, grpc) {
        (Err(Failure::CutShort(_)), Some(GrpcStatus::DEADLINE_EXCEEDED)) => CallEnd::Deadline,
        (_, Some(status)) => CallEnd::Grpc(status),
        (_, None) => CallEnd::Status(status),
    };
    // Where the rest is the client's or weir's own, the upstream has answered.
    let failed = streamed.as_ref().err().map(Met::of);
    failed.and_then(Met::end).unwrap_or(end)
}

/// What the endpoint made of the request; `None` where that is not known.
pub(super) fn of_endpoint(
    tried: Result<u16, &Failure>,
    request: &Request,
    record: &Record,
) -> Option<EndpointOutcome> {
    judged(match (tried, record.grpc) {
        (Ok(status @ 500..), _) | (Ok(status), None) => CallEnd::Status(status),
        (Ok(_), Some(status)) => CallEnd::Grpc(status),
        (Err(failure), _) => end_of(failure, request, record)?,
    })
}

fn judged(end: CallEnd) -> Option<EndpointOutcome> {
    Some(match end {
        CallEnd::Status(status @ 500..=599) => EndpointOutcome::Failed(Fault::Status(status)),
        CallEnd::Grpc(status) if status.is_servers_fault() => {
            EndpointOutcome::Failed(Fault::Grpc(status))
        }
        CallEnd::ConnectFailed => EndpointOutcome::Failed(Fault::Unreached),
        CallEnd::TimedOut => EndpointOutcome::Failed(Fault::TimedOut),
        CallEnd::Reset => EndpointOutcome::Failed(Fault::Reset),
        CallEnd::Status(_) | CallEnd::Grpc(_) => EndpointOutcome::Served,
        // The client's patience says nothing of the endpoint.
        CallEnd::Deadline => return None,
    })
}

/// Learns from this try how many requests the upstream takes at a time, where it says something of that: a reset or a 5xx would pass for
/// a quick answer, and one that did not come in time was that slow at least.
pub(super) fn learn(slot: &Slot<'_>, tried: Result<u16, &Failure>, record: &Record) {
    let tells = match tried {
        Ok(status) => status < 500,
        Err(failure) => was_slow(failure),
    };
    if tells && let Some(took) = record.waited() {
        slot.learn(took);
    }
}

fn was_slow(failure: &Failure) -> bool {
    match Met::of(failure) {
        Met::TimedOut => true,
        Met::NoPlace
        | Met::Own
        | Met::NoConnection
        | Met::Broken
        | Met::Deadline
        | Met::BrokenOff
        | Met::CutShort
        | Met::ClientLeft
        | Met::NotTheirs => false,
    }
}

/// Whether a try that came to this `point` may be followed by another. Where the upstream may have seen the request, that is for those alone
/// to which it is `harmless`.
pub(super) fn is_reason(failure: &Failure, point: Point, on: &RetryOn, harmless: bool) -> bool {
    match Met::of(failure) {
        // For want of ports to one endpoint, another may be reached; Envoy's `connect-failure` has this, too.
        Met::Own | Met::NoConnection => on.connect_failure,
        Met::Broken => match point {
            Point::Unseen if on.reset_before_request => true,
            // Nor has a byte of the response come.
            Point::Unseen | Point::Seen => on.reset && harmless,
            Point::Answered => false,
        },
        Met::TimedOut => on.timeout && harmless,
        Met::NoPlace
        | Met::Deadline
        | Met::BrokenOff
        | Met::CutShort
        | Met::ClientLeft
        | Met::NotTheirs => false,
    }
}

/// Whether a request that came to this `point` over a connection that had been idle may only have come as that was closed, and is to go over
/// a new one: where `is_kept` it can, and where it `can_repeat` it may twice.
pub(super) fn is_stale(failure: &Failure, point: Point, is_kept: bool, can_repeat: bool) -> bool {
    let may = match point {
        Point::Unseen => is_kept,
        Point::Seen => can_repeat,
        Point::Answered => false,
    };
    may && Met::of(failure) == Met::Broken
}

/// What a failure leaves of the client's connection of HTTP/1.1.
pub(super) fn client_after(failure: &Failure) -> Client {
    match Met::of(failure) {
        Met::NoPlace | Met::Own | Met::NoConnection => Client::Lives,
        Met::Broken | Met::TimedOut => Client::LivesBehindNone,
        Met::Deadline | Met::BrokenOff | Met::CutShort | Met::ClientLeft | Met::NotTheirs => {
            Client::AsSaid
        }
    }
}

/// Whether the request may have waited for a connection that is gone without a word; `answered` once its response has begun.
pub(super) fn waited_in_vain(failure: &Failure, answered: bool) -> bool {
    match Met::of(failure) {
        Met::TimedOut | Met::Deadline | Met::BrokenOff | Met::CutShort => true,
        // That may have been its reason, unless it was answered.
        Met::ClientLeft => !answered,
        Met::NoPlace | Met::Own | Met::NoConnection | Met::Broken | Met::NotTheirs => false,
    }
}

/// Whether an upload that ended so leaves its response to go on: the upstream no longer reads, and may have answered before that.
pub(super) fn leaves_response(upload: &Failure) -> bool {
    match Met::of(upload) {
        Met::Broken | Met::TimedOut => true,
        Met::NoPlace
        | Met::Own
        | Met::NoConnection
        | Met::Deadline
        | Met::BrokenOff
        | Met::CutShort
        | Met::ClientLeft
        | Met::NotTheirs => false,
    }
}

/// Why a response ends where nothing has moved for too long, either way: an upstream may only be waiting for what its client does not send.
pub(super) fn stalled(upload_waits_for_client: bool) -> Option<Rejection> {
    upload_waits_for_client.then_some(Rejection::BodyTimeout)
}

/// How a response fails within its body; `ours`: where it is not the upstream that broke off.
pub(super) fn within_body(ours: Option<&Rejection>) -> Failure {
    ours.map_or(Failure::UpstreamGone, |rejection| {
        Failure::CutShort(rejection.reason())
    })
}

pub(super) fn unreached(unreached: Unreached) -> Rejection {
    match unreached {
        Unreached::Failed(cause) => Rejection::ConnectFailed(cause),
        Unreached::TimedOut(stage) => Rejection::ConnectTimeout(stage),
        Unreached::Insecure(trouble) => Rejection::UpstreamTls(trouble),
        Unreached::Full => Rejection::Overloaded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::response::BadResponse;
    use crate::net::tls::Trouble;
    use crate::upstream::Stage;

    fn on(reasons: &[&str]) -> RetryOn {
        RetryOn {
            connect_failure: reasons.contains(&"connect_failure"),
            reset_before_request: reasons.contains(&"reset_before_request"),
            reset: reasons.contains(&"reset"),
            timeout: reasons.contains(&"timeout"),
            ..RetryOn::default()
        }
    }

    #[test]
    fn what_was_not_seen_is_for_any_method_and_what_is_answered_for_none() {
        let check = |reason, point, expected: (bool, bool)| {
            let broken = Failure::from(Rejection::UpstreamBroken);
            let on = on(&[reason]);
            let told = [false, true].map(|harmless| is_reason(&broken, point, &on, harmless));
            assert_eq!(told, <[bool; 2]>::from(expected), "{reason} {point:?}");
        };
        check("reset_before_request", Point::Unseen, (true, true));
        check("reset_before_request", Point::Seen, (false, false));
        check("reset", Point::Unseen, (false, true));
        check("reset", Point::Seen, (false, true));
        check("reset", Point::Answered, (false, false));
        check("timeout", Point::Unseen, (false, false));
    }

    /// The whole of what failures mean, a line each.
    #[test]
    fn each_failure_means_this() {
        let check = |failure: Failure, told: &str| {
            let met = Met::of(&failure);
            let breaker = match [true, false].map(|is_its_own| end_of_met(met, is_its_own)) {
                [None, _] => "-".to_owned(),
                [Some(end), None] => format!("{end:?} if its own"),
                [Some(end), Some(_)] => format!("{end:?}"),
            };
            let endpoint = match end_of_met(met, true).and_then(judged) {
                None => "-".to_owned(),
                Some(EndpointOutcome::Served) => "Served".to_owned(),
                Some(EndpointOutcome::Failed(fault)) => format!("{fault:?}"),
            };
            let reasons = ["connect_failure", "reset", "timeout"];
            let again = reasons
                .into_iter()
                .find(|reason| is_reason(&failure, Point::Seen, &on(&[reason]), true));
            let mut may = Vec::new();
            if was_slow(&failure) {
                may.push("slow");
            }
            if is_stale(&failure, Point::Seen, false, true) {
                may.push("stale");
            }
            if leaves_response(&failure) {
                may.push("response stands");
            }
            may.push(match [false, true].map(|it| waited_in_vain(&failure, it)) {
                [false, _] => "",
                [true, false] => "doubt unless answered",
                [true, true] => "doubt",
            });
            may.retain(|it| !it.is_empty());
            let client = client_after(&failure);
            let again = again.unwrap_or("-");
            let may = may.join(", ");
            assert_eq!(
                format!("{breaker} | {endpoint} | {again} | {client:?} | {may}"),
                told,
                "{failure:?}"
            );
        };
        let refused = |rejection: Rejection, told| check(rejection.into(), told);
        // The breaker, the endpoint, another try, the client's connection, and what else there is.
        for none in [Rejection::Overloaded, Rejection::NoEndpoint] {
            refused(none, "- | - | - | Lives | ");
        }
        let own = Rejection::ConnectFailed(Cause::Own);
        refused(own, "- | - | connect_failure | Lives | ");
        for none in [
            Rejection::ConnectFailed(Cause::Refused),
            Rejection::ConnectTimeout(Stage::Connection),
            Rejection::UpstreamTls(Trouble::Distrusted),
        ] {
            let told = "ConnectFailed | Unreached | connect_failure | Lives | ";
            refused(none, told);
        }
        for none in [
            Rejection::UpstreamBroken,
            Rejection::BadResponse(BadResponse::Version),
        ] {
            let told =
                "Reset if its own | Reset | reset | LivesBehindNone | stale, response stands";
            refused(none, told);
        }
        refused(
            Rejection::UpstreamTimeout,
            "TimedOut | TimedOut | timeout | LivesBehindNone | slow, response stands, doubt",
        );
        let deadline = "Deadline | - | - | AsSaid | doubt";
        refused(Rejection::DeadlineExceeded, deadline);
        for ours in [
            Rejection::AuditUnavailable,
            Rejection::BadBody,
            Rejection::BodyTimeout,
            Rejection::BodyTooLarge,
            Rejection::NotSwitched,
            Rejection::SessionStoreDown,
        ] {
            refused(ours, "- | - | - | AsSaid | ");
        }
        check(Failure::UpstreamGone, "Reset | Reset | - | AsSaid | doubt");
        check(Failure::CutShort("why"), "- | - | - | AsSaid | doubt");
        check(Failure::NotPersisted, "- | - | - | AsSaid | ");
        let left = "- | - | - | AsSaid | doubt unless answered";
        check(Failure::ClientGone, left);
    }

    /// Behind a response's head.
    #[test]
    fn an_upstream_that_has_answered_failed_only_if_it_broke_off() {
        let deadline = GrpcStatus::DEADLINE_EXCEEDED;
        let check = |failure: Failure, grpc, expected| {
            let streamed = Err::<(), _>(failure);
            assert_eq!(end_of_response(200, grpc, &streamed), expected);
        };
        check(Failure::UpstreamGone, None, CallEnd::Reset);
        check(Failure::UpstreamGone, Some(deadline), CallEnd::Reset);
        check(Rejection::UpstreamBroken.into(), None, CallEnd::Reset);
        check(
            Rejection::AuditUnavailable.into(),
            None,
            CallEnd::Status(200),
        );
        check(Failure::ClientGone, None, CallEnd::Status(200));
        check(
            Failure::NotPersisted,
            Some(deadline),
            CallEnd::Grpc(deadline),
        );
        check(Failure::CutShort("why"), None, CallEnd::Status(200));
        check(Failure::CutShort("why"), Some(deadline), CallEnd::Deadline);
        assert_eq!(end_of_response(503, None, &Ok(())), CallEnd::Status(503));
    }
}
