//! A request as spans, by OpenTelemetry's semantic conventions for HTTP (stable, 1.23 and later): one of the request, and one of
//! each of weir's calls of the upstream, which are several where it is tried again. Does no I/O.

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use crate::event::{AuditEvent, Micros};

/// What is told of a request whose trace is kept.
#[derive(Debug)]
pub struct Traced {
    pub event: AuditEvent,
    pub user_agent: Option<String>,
    pub trace_id: [u8; 16],
    /// Of the request.
    pub span_id: [u8; 8],
    /// Of the caller.
    pub parent_id: Option<[u8; 8]>,
    /// The caller's `tracestate`.
    pub state: Option<String>,
    /// Whether the client spoke TLS.
    pub secure: bool,
    /// The host that it asked for, where a proxy says that it is another.
    pub host: Option<String>,
    /// Who is at the other end of the connection, where that is known.
    pub peer: Option<IpAddr>,
    /// The version of HTTP, where it is known.
    pub came_by: Option<&'static str>,
    /// Whether the client was told the event's status.
    pub told: bool,
    /// Whether it was told so by weir.
    pub rejected: bool,
    /// The number of gRPC's status, where it is a call of that.
    pub grpc: Option<u8>,
    /// The path as the client spelt it, where it is another.
    pub asked_path: Option<String>,
    /// The path that the upstream was asked for, likewise.
    pub sent_path: Option<String>,
    /// Whether it came with a session.
    pub session: bool,
    /// In their order.
    pub calls: Vec<Call>,
}

/// One of weir's calls of the upstream.
#[derive(Debug)]
pub struct Call {
    pub span_id: [u8; 8],
    /// From the request's head to its begin.
    pub after: Micros,
    /// Whether it is under TLS.
    pub secure: bool,
    /// From the request's head to its end, where that is not the request's.
    pub until: Option<Micros>,
    /// Whom it was sent to, where that is known.
    pub endpoint: Option<String>,
    /// The version of HTTP, once there was a connection.
    pub sent_by: Option<&'static str>,
    /// What the upstream answered, if it did.
    pub status: Option<u16>,
    /// Why it did not, or not to its end.
    pub reason: Option<String>,
    /// From the end of the request to the head of the response.
    pub waited: Option<Micros>,
    /// How many calls came before.
    pub again: u32,
}

impl Traced {
    /// How many spans it is.
    pub fn spans(&self) -> u64 {
        1 + self.calls.len() as u64
    }

    /// How many bytes of memory it takes, some.
    pub fn bytes(&self) -> usize {
        let event = &self.event;
        let texts = [&event.method, &event.path, &event.host];
        let others = [
            &event.user,
            &event.label,
            &event.route,
            &event.upstream,
            &event.endpoint,
            &event.query,
            &event.breaker,
            &event.request_id,
            &self.user_agent,
            &self.state,
            &self.host,
            &self.asked_path,
            &self.sent_path,
        ];
        let calls = self.calls.iter();
        let of_calls = calls.flat_map(|call| [&call.endpoint, &call.reason]);
        let headers = event.headers.iter().flat_map(|(name, value)| [name, value]);
        let texts = texts.into_iter().chain(headers).chain(&event.limits);
        let texts = texts.chain(others.into_iter().chain(of_calls).flatten());
        size_of::<Traced>()
            + self.calls.len() * size_of::<Call>()
            + texts.map(String::len).sum::<usize>()
    }
}

/// The spans of a request.
pub fn of(traced: &Traced) -> impl Iterator<Item = SpanData> {
    let calls = traced.calls.iter().map(|call| client_span(traced, call));
    [server_span(traced)].into_iter().chain(calls)
}

fn server_span(traced: &Traced) -> SpanData {
    let event = &traced.event;
    let mut attributes = method(&event.method);
    let mut put = |key: &'static str, value: Value| attributes.push(KeyValue::new(key, value));
    let scheme = if traced.secure { "https" } else { "http" };
    put("url.scheme", scheme.into());
    let path = traced.asked_path.as_ref().unwrap_or(&event.path);
    put("url.path", path.clone().into());
    if let Some(query) = &event.query {
        put("url.query", query.clone().into());
    }
    put("client.address", event.client.to_string().into());
    if let Some(peer) = traced.peer {
        put("network.peer.address", peer.to_string().into());
    }
    if let Some(version) = traced.came_by {
        put("network.protocol.version", version.into());
    }
    if traced.told {
        put("http.response.status_code", i64::from(event.status).into());
    }
    put("http.request.body.size", count(event.bytes_in));
    put("http.response.body.size", count(event.bytes_out));
    if let Some(route) = &event.route {
        put("http.route", route.clone().into());
    }
    if let Some(agent) = &traced.user_agent {
        put("user_agent.original", agent.clone().into());
    }
    put("weir.request_id", event.request_id().into_owned().into());
    put("weir.session", traced.session.into());
    if let Some(upstream) = &event.upstream {
        put("weir.upstream", upstream.clone().into());
    }
    if let Some(label) = &event.label {
        put("weir.rejection", label.clone().into());
    }
    if let Some(status) = traced.grpc {
        put("rpc.grpc.status_code", i64::from(status).into());
    }
    if let Some(breaker) = &event.breaker {
        put("weir.breaker", breaker.clone().into());
    }
    if !event.limits.is_empty() {
        let limits = event.limits.iter().cloned().map(StringValue::from);
        put("weir.limits", Value::Array(Array::String(limits.collect())));
    }
    // What broke off is one, whatever was told before.
    let is_error = event.status >= 500 || (event.label.is_some() && !traced.rejected);
    let status = status(
        is_error,
        event.label.as_deref(),
        event.status,
        &mut attributes,
    );
    let (host, port) = host_and_port(traced.host.as_ref().unwrap_or(&event.host));
    attributes.extend(address(host, port));
    let name = match &event.route {
        Some(route) => Cow::Owned(format!("{} {route}", name(&event.method))),
        None => Cow::Owned(name(&event.method).to_owned()),
    };
    SpanData {
        parent_span_id: traced.parent_id.map_or(SpanId::INVALID, SpanId::from_bytes),
        parent_span_is_remote: traced.parent_id.is_some(),
        start_time: time(event.time),
        status,
        ..span(traced, traced.span_id, SpanKind::Server, name, attributes)
    }
}

fn client_span(traced: &Traced, call: &Call) -> SpanData {
    let event = &traced.event;
    let mut attributes = method(&event.method);
    if let Some(endpoint) = &call.endpoint {
        let (scheme, usual) = match call.secure {
            true => ("https", 443),
            false => ("http", 80),
        };
        let authority = match endpoint.strip_prefix("unix:") {
            None => {
                // The conventions require it of clients, the usual one too.
                let (host, port) = host_and_port(endpoint);
                let port = port.unwrap_or(usual);
                attributes.extend(address(host, Some(port)));
                // A name's address is known to the connection alone.
                if call.sent_by.is_some() && host.parse::<IpAddr>().is_ok() {
                    attributes.push(KeyValue::new("network.peer.address", host.to_owned()));
                    attributes.push(KeyValue::new("network.peer.port", i64::from(port)));
                }
                endpoint
            }
            Some(socket) => {
                attributes.push(KeyValue::new("server.address", socket.to_owned()));
                attributes.push(KeyValue::new("network.transport", "unix"));
                if call.sent_by.is_some() {
                    attributes.push(KeyValue::new("network.peer.address", socket.to_owned()));
                }
                "localhost"
            }
        };
        let path = traced.sent_path.as_ref().unwrap_or(&event.path);
        let query = event.query.as_ref().map(|query| format!("?{query}"));
        let query = query.unwrap_or_default();
        let url = format!("{scheme}://{authority}{path}{query}");
        attributes.push(KeyValue::new("url.full", url));
    }
    let mut put = |key: &'static str, value: Value| attributes.push(KeyValue::new(key, value));
    if let Some(version) = call.sent_by {
        put("network.protocol.version", version.into());
    }
    if let Some(status) = call.status {
        put("http.response.status_code", i64::from(status).into());
    }
    if call.again > 0 {
        put("http.request.resend_count", i64::from(call.again).into());
    }
    if let Some(waited) = call.waited {
        put("weir.upstream_duration_us", count(waited.0));
    }
    // What broke off, or was refused since it could not be had, is the call's failure; other refusals have no call.
    let answered = call.status.unwrap_or_default();
    let is_error = call.status.is_none_or(|status| status >= 400) || call.reason.is_some();
    let status = status(is_error, call.reason.as_deref(), answered, &mut attributes);
    let name = Cow::Owned(name(&event.method).to_owned());
    SpanData {
        parent_span_id: SpanId::from_bytes(traced.span_id),
        start_time: time(event.time) + micros(call.after),
        end_time: time(event.time) + micros(call.until.unwrap_or(event.duration)),
        status,
        ..span(traced, call.span_id, SpanKind::Client, name, attributes)
    }
}

fn span(
    traced: &Traced,
    id: [u8; 8],
    span_kind: SpanKind,
    name: Cow<'static, str>,
    attributes: Vec<KeyValue>,
) -> SpanData {
    let (began, event) = (time(traced.event.time), &traced.event);
    let state = traced.state.as_ref().map(|state| state.parse());
    SpanData {
        span_context: SpanContext::new(
            TraceId::from_bytes(traced.trace_id),
            SpanId::from_bytes(id),
            TraceFlags::SAMPLED,
            false,
            // What the SDK cannot read the next hop may all the same.
            state.and_then(Result::ok).unwrap_or(TraceState::NONE),
        ),
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind,
        name,
        start_time: began,
        end_time: began + micros(event.duration),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("weir")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

/// What clients may make up must not be a name.
fn known(method: &str) -> bool {
    const KNOWN: [&str; 10] = [
        "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE",
    ];
    KNOWN.contains(&method)
}

fn name(method: &str) -> &str {
    match known(method) {
        true => method,
        false => "HTTP",
    }
}

fn method(method: &str) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(20);
    match known(method) {
        true => attributes.push(KeyValue::new("http.request.method", method.to_owned())),
        false => {
            attributes.push(KeyValue::new("http.request.method", "_OTHER"));
            let original = KeyValue::new("http.request.method_original", method.to_owned());
            attributes.push(original);
        }
    }
    attributes
}

/// Of `HOST:PORT`; an IPv6 address is without its brackets.
fn host_and_port(authority: &str) -> (&str, Option<u16>) {
    let behind_literal = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    let port = authority[behind_literal..].find(':');
    let (host, port) = match port {
        Some(at) => (
            &authority[..behind_literal + at],
            authority[behind_literal + at + 1..].parse().ok(),
        ),
        None => (authority, None),
    };
    (host.trim_start_matches('[').trim_end_matches(']'), port)
}

fn address(host: &str, port: Option<u16>) -> impl Iterator<Item = KeyValue> {
    let address = (!host.is_empty()).then(|| KeyValue::new("server.address", host.to_owned()));
    let port = port.map(|port| KeyValue::new("server.port", i64::from(port)));
    address.into_iter().chain(port)
}

/// The span's status, and `error.type` where it is an error.
fn status(
    is_error: bool,
    label: Option<&str>,
    status: u16,
    attributes: &mut Vec<KeyValue>,
) -> Status {
    if !is_error {
        return Status::Unset;
    }
    let kind = label.map_or_else(|| status.to_string(), str::to_owned);
    attributes.push(KeyValue::new("error.type", kind));
    Status::error("")
}

fn count(count: u64) -> Value {
    i64::try_from(count).unwrap_or(i64::MAX).into()
}

fn time(micros: Micros) -> SystemTime {
    UNIX_EPOCH + self::micros(micros)
}

fn micros(micros: Micros) -> Duration {
    Duration::from_micros(micros.0)
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    pub(in crate::telemetry) fn traced() -> Traced {
        Traced {
            event: AuditEvent {
                seq: 0,
                time: Micros(1_700_000_000_000_000),
                client: Ipv4Addr::LOCALHOST.into(),
                user: Some("ann".to_owned()),
                label: None,
                route: Some("/pay/*".to_owned()),
                method: "GET".to_owned(),
                path: "/pay/x".to_owned(),
                status: 200,
                id: [7; 16],
                upstream: Some("app".to_owned()),
                endpoint: Some("app.internal:8080".to_owned()),
                host: "[::1]:80".to_owned(),
                query: Some("a=1".to_owned()),
                limits: ["l: admitted".to_owned()].into_iter().collect(),
                breaker: Some("admitted".to_owned()),
                bytes_in: 1,
                bytes_out: 2,
                duration: Micros(1_500),
                upstream_duration: Some(Micros(900)),
                request_id: None,
                trace_id: Some([1; 16]),
                headers: Vec::new(),
            },
            user_agent: Some("curl".to_owned()),
            trace_id: [1; 16],
            span_id: [2; 8],
            parent_id: None,
            state: None,
            secure: false,
            host: None,
            peer: None,
            came_by: Some("1.1"),
            told: true,
            rejected: false,
            grpc: None,
            asked_path: None,
            sent_path: Some("/v2/x".to_owned()),
            session: true,
            calls: vec![Call {
                span_id: [3; 8],
                after: Micros(100),
                secure: false,
                until: None,
                endpoint: Some("app.internal:8080".to_owned()),
                sent_by: Some("1.1"),
                status: Some(200),
                reason: None,
                waited: Some(Micros(900)),
                again: 0,
            }],
        }
    }

    /// Any.
    pub(in crate::telemetry) fn span() -> SpanData {
        server_span(&traced())
    }

    fn value(span: &SpanData, key: &str) -> Option<String> {
        let mut attributes = span.attributes.iter();
        let found = attributes.find(|attribute| attribute.key.as_str() == key)?;
        Some(found.value.to_string())
    }

    #[test]
    fn a_call_is_a_child_of_its_request() {
        let spans: Vec<_> = of(&traced()).collect();
        let [server, client] = &spans[..] else {
            panic!("{spans:?}");
        };
        assert_eq!(client.parent_span_id, server.span_context.span_id());
        assert_eq!(server.parent_span_id, SpanId::INVALID);
        assert_eq!((&*server.name, &*client.name), ("GET /pay/*", "GET"));
        assert!(client.start_time > server.start_time && client.end_time == server.end_time);
        assert_eq!(value(server, "server.address").as_deref(), Some("::1"));
        assert_eq!(value(server, "server.port").as_deref(), Some("80"));
        assert_eq!(value(server, "weir.session").as_deref(), Some("true"));
        assert_eq!(value(server, "url.path").as_deref(), Some("/pay/x"));
        let full = value(client, "url.full");
        assert_eq!(full.as_deref(), Some("http://app.internal:8080/v2/x?a=1"));
        assert_eq!(value(client, "server.port").as_deref(), Some("8080"));
        assert_eq!(
            (&server.status, &client.status),
            (&Status::Unset, &Status::Unset)
        );
    }

    #[test]
    fn a_call_says_where_it_went_and_how() {
        let check = |endpoint: &str, secure: bool, address, port, full, peer: [_; 2]| {
            let mut traced = traced();
            traced.event.query = None;
            traced.calls[0].endpoint = Some(endpoint.to_owned());
            traced.calls[0].secure = secure;
            let check = |traced: &Traced, peer: [_; 2]| {
                let span = of(traced).nth(1).unwrap();
                let keys = ["server.address", "server.port", "url.full"];
                let said = keys.map(|key| value(&span, key));
                let said = said.each_ref().map(Option::as_deref);
                assert_eq!(said, [Some(address), port, Some(full)], "{endpoint}");
                let keys = ["network.peer.address", "network.peer.port"];
                let said = keys.map(|key| value(&span, key));
                assert_eq!(said.each_ref().map(Option::as_deref), peer, "{endpoint}");
            };
            check(&traced, peer);
            traced.calls[0].sent_by = None;
            check(&traced, [None; 2]);
        };
        let (port, none) = (Some("443"), [None; 2]);
        check("app:443", true, "app", port, "https://app:443/v2/x", none);
        check("app:443", false, "app", port, "http://app:443/v2/x", none);
        let (port, peer) = (Some("80"), [Some("::1"), Some("80")]);
        check("[::1]:80", false, "::1", port, "http://[::1]:80/v2/x", peer);
        let (socket, address) = ("unix:/run/app.sock", "/run/app.sock");
        let peer = [Some(address), None];
        check(socket, false, address, None, "http://localhost/v2/x", peer);
        check(socket, true, address, None, "https://localhost/v2/x", peer);
    }

    #[test]
    fn what_is_an_error_depends_on_the_side() {
        let check = |status: u16, label: Option<&str>, answered: Option<u16>, server, client| {
            let mut traced = traced();
            traced.event.status = status;
            traced.event.label = label.map(str::to_owned);
            traced.rejected = label.is_some() && status >= 400;
            traced.calls[0].status = answered;
            traced.calls[0].reason = label.map(str::to_owned);
            let kinds: Vec<_> = of(&traced).map(|span| value(&span, "error.type")).collect();
            let kinds: Vec<_> = kinds.iter().map(Option::as_deref).collect();
            assert_eq!(kinds, [server, client], "{status} {label:?} {answered:?}");
        };
        check(200, None, Some(200), None, None);
        check(404, None, Some(404), None, Some("404"));
        check(503, None, Some(503), Some("503"), Some("503"));
        let (refused, broken) = (Some("connect_failed"), Some("upstream_aborted"));
        check(502, refused, None, refused, refused);
        check(200, broken, Some(200), broken, broken);
        check(429, Some("x"), Some(200), None, Some("x"));
    }

    #[test]
    fn what_clients_make_up_is_no_name() {
        let mut traced = traced();
        traced.event.method = "GRAB".to_owned();
        traced.event.route = None;
        let span = of(&traced).next().unwrap();
        assert_eq!(&*span.name, "HTTP");
        assert_eq!(
            value(&span, "http.request.method").as_deref(),
            Some("_OTHER")
        );
        let original = value(&span, "http.request.method_original");
        assert_eq!(original.as_deref(), Some("GRAB"));
    }
}
