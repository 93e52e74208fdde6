//! `weir echo`: a small upstream that answers with what reached it, for demos and tests. Not for the open network: it does
//! what any caller asks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tracing::info;

use super::signals::Signals;
use crate::config::units::TimeLength;
use crate::net::{self, listen};
use crate::policy::session::{END_HEADER, START_HEADER};

/// Serves on `address` until SIGTERM, SIGQUIT or SIGINT.
pub fn run(address: SocketAddr) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let listener = listen::alone(address)
            .and_then(TcpListener::from_std)
            .with_context(|| format!("cannot listen on {address}; --address names another"))?;
        info!(address = %listener.local_addr()?, "echoing");
        tokio::select! {
            stopped = signals.stopped() => stopped,
            never = net::serve(listener, net::unbounded(), |stream, _| connection(stream)) => match never {},
        }
    })
}

async fn connection(stream: TcpStream) {
    // A caller that breaks off is its own affair. Without a timer an idle connection stays, as a proxy's pool likes it.
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await;
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, mut body) = request.into_parts();
    let mut body_bytes = 0;
    while let Some(frame) = body.frame().await {
        body_bytes += frame?.data_ref().map_or(0, Bytes::len);
    }
    Ok(match Asked::of(&parts) {
        Ok(asked) => {
            tokio::time::sleep(asked.delay).await;
            response(asked.status, asked.field, &describe(&parts, body_bytes))
        }
        Err(mend) => response(StatusCode::BAD_REQUEST, None, &json!({ "error": mend })),
    })
}

/// What a path asks for beyond the echo.
struct Asked {
    status: StatusCode,
    delay: Duration,
    field: Option<(&'static str, HeaderValue)>,
}

impl Asked {
    /// An error says the mend.
    fn of(parts: &Parts) -> Result<Asked, String> {
        let mut asked = Asked {
            status: StatusCode::OK,
            delay: Duration::ZERO,
            field: None,
        };
        let path = parts.uri.path();
        if let Some(status) = path.strip_prefix("/status/") {
            asked.status = match status.parse() {
                Ok(status @ 200..=599) => StatusCode::from_u16(status).ok(),
                Ok(_) | Err(_) => None,
            }
            .ok_or("use a status from 200 to 599, for example /status/503")?;
        } else if let Some(delay) = path.strip_prefix("/delay/") {
            asked.delay = delay.parse::<TimeLength>()?.0;
        } else if path == "/login" {
            asked.field = Some((START_HEADER, session_start(parts)?));
        } else if path == "/logout" {
            asked.field = Some((END_HEADER, HeaderValue::from_static("true")));
        }
        Ok(asked)
    }
}

/// The user of the query, and its other parameters as claims.
fn session_start(parts: &Parts) -> Result<HeaderValue, String> {
    let mend = "use, for example, /login?user=ann&role=customer";
    let pairs = parts.uri.query().unwrap_or_default().split('&');
    let mut claims: BTreeMap<_, _> = pairs
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (decoded(name), decoded(value)))
        .collect();
    let user = claims
        .remove("user")
        .filter(|user| !user.is_empty())
        .ok_or(mend)?;
    let start = json!({ "user": user, "claims": claims });
    HeaderValue::try_from(start.to_string()).map_err(|_| mend.to_owned())
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn describe(parts: &Parts, body_bytes: usize) -> Value {
    json!({
        "method": parts.method.as_str(),
        "path": parts.uri.path(),
        "query": parts.uri.query(),
        "headers": fields(&parts.headers),
        "body_bytes": body_bytes,
    })
}

/// By lower-case name; the values of a repeated field are joined by a comma (RFC 9110 section 5.3).
fn fields(headers: &HeaderMap) -> BTreeMap<&str, String> {
    let value = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let joined = |name| {
        let values = headers.get_all(name).iter().map(value);
        values.collect::<Vec<_>>().join(", ")
    };
    headers
        .keys()
        .map(|name| (name.as_str(), joined(name)))
        .collect()
}

fn response(
    status: StatusCode,
    field: Option<(&'static str, HeaderValue)>,
    body: &Value,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{body:#}\n")));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    if let Some((name, value)) = field {
        response.headers_mut().insert(name, value);
    }
    response
}
