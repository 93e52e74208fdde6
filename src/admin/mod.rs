//! The admin port: metrics, health, and what operators see and change. Runs on the control thread, so that a scrape never
//! delays a request. Errors are RFC 9457 problems. Must not touch a lane's connections.

pub mod app_health;
mod audit;
mod breakers;
pub mod drain;
pub mod health;
mod limits;
mod metrics;
mod sessions;
mod upstreams;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, ORIGIN,
    WWW_AUTHENTICATE,
};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::clock;
use crate::config::show;
use crate::net::body;
use crate::net::places::{Place, Places};
use crate::plan::Plan;
use crate::policy::session::bearer;
use crate::store::fleet::FleetConnections;
use crate::store::postgres::Postgres;
use crate::store::redis::CallError;
use crate::telemetry::log::LogRateLimit;
use crate::telemetry::panics::counted;
use app_health::AppProbes;
use drain::Leave;
use health::Health;
use health::machine::Disk;

/// The largest body that a call takes, in bytes.
const MAX_BODY: usize = 64 * 1024;
/// Connections of one port at a time; see [`Places`].
const MAX_CONNECTIONS: usize = 128;
/// After that a connection ends with the answer under way, which has so long to be made and taken: the slowest is a query of the audit.
const LIFE: Duration = Duration::from_secs(60);
const LAST_ANSWER: Duration = Duration::from_secs(40);
/// Bytes of a path that a refusal's line has.
const LOGGED: usize = 200;

/// What operators ask for.
const V1: &str =
    "/v1/config /v1/limits /v1/breakers /v1/upstreams /v1/sessions /v1/audit /v1/drain";

/// What the admin port sees of the process.
#[derive(Debug)]
pub struct Admin {
    pub plan: watch::Receiver<Arc<Plan>>,
    /// The control thread's, where the plan has a fleet.
    pub redis: Option<FleetConnections>,
    /// The control thread's, where the configuration has it: queries read by it.
    pub postgres: Option<Arc<Postgres>>,
    /// What ingests the audit, where this process does.
    pub writes: Option<Arc<Postgres>>,
    /// What the audit is written to, where there are lanes.
    pub disk: Option<Disk>,
    pub health: Health,
    pub app_probes: AppProbes,
    /// Where there are lanes.
    pub leave: Option<Leave>,
    pub refusals: Refusals,
}

/// When the log is told of calls that are refused: of some, whoever makes them.
#[derive(Debug)]
pub struct Refusals(Mutex<LogRateLimit>);

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals(Mutex::new(LogRateLimit::new(5)))
    }
}

/// A reply, or the problem in its place.
type Answer = Result<Reply, Problem>;

#[derive(Debug)]
enum Reply {
    Json(Value),
    /// JSON, as it is to be sent.
    Written(String),
    /// Of this MIME type.
    Text(&'static str, String),
    /// JSON with a status other than 200.
    Status(StatusCode, Value),
    Nothing,
}

/// What a caller did wrong, and the mend.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    detail: String,
    /// The methods that there are, for a 405.
    allow: Option<&'static str>,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Problem {
        Problem {
            status,
            detail: detail.into(),
            allow: None,
        }
    }

    fn bad(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, detail)
    }

    fn not_found(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::NOT_FOUND, detail)
    }

    /// Redis has not answered, though it may have done what it was asked to.
    fn redis(error: &CallError) -> Problem {
        let detail = format!("{error}: what was asked for may be done, or not; try again");
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }

    fn method(allow: &'static str) -> Problem {
        let detail = format!("this path knows {allow}");
        Problem {
            status: StatusCode::METHOD_NOT_ALLOWED,
            detail,
            allow: Some(allow),
        }
    }
}

/// Serves all paths on `listener` for ever.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) -> io::Result<()> {
    accept(listener, admin, false).await
}

/// Serves `/metrics`, `/ready` for load balancers, and the app's probes, on `listener` for ever.
pub async fn serve_metrics(listener: TcpListener, admin: Arc<Admin>) -> io::Result<()> {
    accept(listener, admin, true).await
}

async fn accept(listener: TcpListener, admin: Arc<Admin>, metrics_alone: bool) -> io::Result<()> {
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let place = places.take().await.map_err(io::Error::other)?;
                let panics = admin.plan.borrow().metrics.tasks.panics.clone();
                let served = connection((stream, peer), place, admin.clone(), metrics_alone);
                tokio::spawn(counted(panics, served));
            }
            // Out of descriptors, or the caller is gone already.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn connection(
    (stream, peer): (TcpStream, SocketAddr),
    (place, left): (Place, oneshot::Receiver<()>),
    admin: Arc<Admin>,
    metrics_alone: bool,
) {
    let place = &place;
    let service = service_fn(|request: Request<Incoming>| {
        place.heard();
        let admin = admin.clone();
        async move {
            let answer = answer(&admin, request, peer, metrics_alone).await;
            // Until it asks again, or while it does not take its answer.
            place.silent();
            Ok::<_, Infallible>(render(answer))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(10))
        .serve_connection(TokioIo::new(stream), service);
    let serve = async {
        let mut served = pin!(served);
        // A caller that breaks off is its own affair; so is one that does not take its answer.
        if timeout(LIFE, served.as_mut()).await.is_err() {
            served.as_mut().graceful_shutdown();
            let _ = timeout(LAST_ANSWER, served).await;
        }
    };
    tokio::select! {
        () = serve => {}
        Ok(()) = left => {}
    }
}

async fn answer(
    admin: &Arc<Admin>,
    request: Request<Incoming>,
    peer: SocketAddr,
    metrics_alone: bool,
) -> Answer {
    let plan = admin.plan.borrow().clone();
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().split('/').skip(1).map(decoded);
    let path = path.collect::<Result<Vec<_>, _>>()?;
    let path: Vec<_> = path.iter().map(String::as_str).collect();
    // Whose answer is GET's; hyper leaves its body out.
    let method = match parts.method {
        Method::HEAD => &Method::GET,
        _ => &parts.method,
    };
    if path.first() == Some(&"app-health") {
        return app_health(admin, method, parts.uri.path()).await;
    }
    if metrics_alone && path != ["metrics"] && path != ["ready"] {
        return Err(Problem::not_found(
            "only /metrics and /ready are served here",
        ));
    }
    match (method, path.as_slice()) {
        (&Method::GET, ["metrics"]) => Ok(metrics::answer(admin, &plan, &parts.headers)),
        (&Method::GET, ["live"]) => Ok(admin.health.live()),
        (&Method::GET, ["ready"]) => Ok(admin.health.ready()),
        (&Method::GET, ["health"]) => Ok(admin.health.health().await),
        (_, ["metrics" | "live" | "ready" | "health"]) => Err(Problem::method("GET, HEAD")),
        (method, ["v1", rest @ ..]) => {
            // Neither the query nor the key of an override: both can have what a client is known by.
            let path = match rest {
                ["limits", name, "overrides", _, ..] => {
                    format!("/v1/limits/{name}/overrides/***")
                }
                _ => parts.uri.path().to_owned(),
            };
            let may = refuse_pages(&plan, &parts.headers)
                .and_then(|()| authorise(&plan, parts.headers.get(AUTHORIZATION)));
            if let Err(problem) = may {
                refused(admin, &plan, method, &path, peer, &problem);
                return Err(problem);
            }
            let body = whole(&parts, body).await;
            if method == Method::GET {
                return v1(admin, &plan, method, rest, &parts.uri, &body?).await;
            }
            let rest: Vec<_> = rest.iter().map(|part| (*part).to_owned()).collect();
            let (admin, method) = (admin.clone(), method.clone());
            let call = async move {
                let rest: Vec<_> = rest.iter().map(String::as_str).collect();
                let answer = match body {
                    Ok(body) => v1(&admin, &plan, &method, &rest, &parts.uri, &body).await,
                    Err(problem) => Err(problem),
                };
                let status = status(&answer).as_u16();
                info!(%method, path, %peer, status, "admin call");
                answer
            };
            // A task of its own: it is done whole, and told, though its caller leaves.
            match tokio::spawn(call).await {
                Ok(answer) => answer,
                Err(panicked) => resume_unwind(panicked.into_panic()),
            }
        }
        _ => Err(Problem::not_found(format!(
            "known here: /metrics /live /ready /health {V1}"
        ))),
    }
}

/// Counts the call of one who may not, and tells of it: it may be the first of many guesses.
fn refused(
    admin: &Admin,
    plan: &Plan,
    method: &Method,
    path: &str,
    peer: SocketAddr,
    problem: &Problem,
) {
    let status = problem.status.as_u16();
    plan.metrics.admin.refused(status);
    if let Some(left_out) = admin.refusals.0.lock().next(clock::mono()) {
        let left_out = (left_out > 0).then_some(left_out);
        // Of any length.
        let path: String = path.chars().take(LOGGED).collect();
        warn!(%method, path, %peer, status, left_out, "call refused at the admin port");
    }
}

async fn app_health(admin: &Admin, method: &Method, path: &str) -> Answer {
    if method != Method::GET {
        return Err(Problem::method("GET, HEAD"));
    }
    match admin.app_probes.ask(path).await {
        Some(Ok(())) => Ok(Reply::Json(json!({"status": "ok"}))),
        Some(Err(detail)) => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)),
        None => Err(Problem::not_found("no such probe in WEIR_APP_PROBES")),
    }
}

/// The body of the call of one who may.
async fn whole(parts: &Parts, body: Incoming) -> Result<Bytes, Problem> {
    let body = body::whole(body, MAX_BODY).await.map_err(|_| {
        Problem::bad(format!(
            "body is larger than {MAX_BODY} bytes, or cut short"
        ))
    })?;
    if !body.is_empty() && !is_json(parts.headers.get(CONTENT_TYPE)) {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send a body as \"Content-Type: application/json\"",
        ));
    }
    Ok(body)
}

async fn v1(
    admin: &Admin,
    plan: &Plan,
    method: &Method,
    path: &[&str],
    uri: &Uri,
    body: &[u8],
) -> Answer {
    let query = uri.query().unwrap_or_default();
    if let ["config", ..] | ["breakers", ..] | ["upstreams", ..] | ["drain", ..] = path {
        parameters(query, &[])?;
    }
    match path {
        ["config"] => match *method {
            Method::GET => Ok(Reply::Json(show::json(&plan.config))),
            _ => Err(Problem::method("GET, HEAD")),
        },
        ["limits", rest @ ..] => {
            limits::answer(plan, admin.redis.as_ref(), method, rest, query, body).await
        }
        ["breakers", rest @ ..] => breakers::answer(plan, admin.redis.as_ref(), method, rest).await,
        ["upstreams", rest @ ..] => upstreams::answer(plan, method, rest),
        ["sessions", rest @ ..] => {
            sessions::answer(plan, admin.redis.as_ref(), method, rest, query, body).await
        }
        ["audit", rest @ ..] => {
            audit::answer(plan, admin.postgres.as_ref(), method, rest, query).await
        }
        ["drain"] => drain::answer(admin.leave.as_ref(), method),
        _ => Err(Problem::not_found(format!("known here: {V1}"))),
    }
}

/// Refuses what a web page can make a browser send here: the browser reaches ports that the page's author does not.
fn refuse_pages(plan: &Plan, headers: &HeaderMap) -> Result<(), Problem> {
    let forbidden = |detail: &str| Err(Problem::new(StatusCode::FORBIDDEN, detail));
    let site = headers.get("sec-fetch-site");
    if headers.contains_key(ORIGIN) || site.is_some_and(|site| site != "none") {
        return forbidden(
            "web pages may not call this: send neither \"Origin\" nor \"Sec-Fetch-Site\"",
        );
    }
    // A page on a name that its owner has pointed here looks like this port's own; it does not have the token.
    let rebound = headers.get_all(HOST).iter().any(|host| !is_local(host));
    if plan.config.admin.token.is_none() && rebound {
        return forbidden(
            "without admin.token this port is called by address: use its IP address or localhost as Host",
        );
    }
    Ok(())
}

/// Whether a Host is an IP address or `localhost`, which no one can point elsewhere.
fn is_local(host: &HeaderValue) -> bool {
    let Ok(host) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let name = host.host();
    let address = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    name.eq_ignore_ascii_case("localhost") || address.unwrap_or(name).parse::<IpAddr>().is_ok()
}

fn is_json(content_type: Option<&HeaderValue>) -> bool {
    let text = content_type.and_then(|kind| kind.to_str().ok());
    let essence = text.and_then(|kind| kind.split(';').next());
    essence.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

fn authorise(plan: &Plan, given: Option<&HeaderValue>) -> Result<(), Problem> {
    let Some(token) = &plan.config.admin.token else {
        return Ok(());
    };
    let given = given
        .and_then(|value| bearer(value.as_bytes()))
        .unwrap_or_default();
    // Constant time, so that the token cannot be found byte by byte.
    if bool::from(given.ct_eq(token.0.as_bytes())) {
        return Ok(());
    }
    Err(Problem::new(
        StatusCode::UNAUTHORIZED,
        "send the token of admin.token as \"Authorization: Bearer TOKEN\"",
    ))
}

fn status(answer: &Answer) -> StatusCode {
    match answer {
        Ok(Reply::Json(_) | Reply::Written(_) | Reply::Text(..)) => StatusCode::OK,
        Ok(Reply::Status(status, _)) => *status,
        Ok(Reply::Nothing) => StatusCode::NO_CONTENT,
        Err(problem) => problem.status,
    }
}

fn render(answer: Answer) -> Response<Full<Bytes>> {
    let status = status(&answer);
    let mut allow = None;
    let (kind, body) = match answer {
        Ok(Reply::Json(value) | Reply::Status(_, value)) => ("application/json", value.to_string()),
        Ok(Reply::Written(json)) => ("application/json", json),
        Ok(Reply::Nothing) => ("application/json", String::new()),
        Ok(Reply::Text(kind, text)) => (kind, text),
        Err(problem) => {
            allow = problem.allow;
            let title = status.canonical_reason().unwrap_or_default();
            let body = json!({"type": "about:blank", "title": title, "status": status.as_u16(), "detail": problem.detail});
            ("application/problem+json", body.to_string())
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(allow) = allow {
        headers.insert(ALLOW, HeaderValue::from_static(allow));
    }
    response
}

fn decoded(part: &str) -> Result<String, Problem> {
    let text = percent_encoding::percent_decode_str(part).decode_utf8();
    let text = text.map_err(|_| Problem::bad(format!("\"{part}\" is not UTF-8")));
    Ok(text?.into_owned())
}

/// The parameters of a query, in the order sent, as forms write them: a `+` is a space. Each may be given once, but for the parts
/// of a key; and no one is `user=`, which is what a script sends whose variable is empty.
fn pairs(query: &str) -> Result<Vec<(String, String)>, Problem> {
    let spaced = |text: &str| decoded(&text.replace('+', " "));
    let mut pairs: Vec<(String, String)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (spaced(name)?, spaced(value)?);
        if name != "key" && pairs.iter().any(|(other, _)| *other == name) {
            return Err(Problem::bad(format!("{name}: given twice; give it once")));
        }
        if name == "user" && value.is_empty() {
            return Err(Problem::bad("user: is empty; say whose"));
        }
        pairs.push((name, value));
    }
    Ok(pairs)
}

/// The parameters of a query, of which these are known: one that is misspelt would ask for something else.
fn parameters(query: &str, known: &[&str]) -> Result<Vec<(String, String)>, Problem> {
    let pairs = pairs(query)?;
    let Some((name, _)) = pairs
        .iter()
        .find(|(name, _)| !known.contains(&name.as_str()))
    else {
        return Ok(pairs);
    };
    let known = match known {
        [] => "this path takes no parameters".to_owned(),
        [only] => format!("known is {only}"),
        [most @ .., last] => format!("known are {} and {last}", most.join(", ")),
    };
    Err(Problem::bad(format!(
        "unknown parameter \"{name}\": {known}"
    )))
}
