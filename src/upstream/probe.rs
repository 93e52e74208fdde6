//! Active checks: an endpoint is asked how it is, over a connection of its own, by what it speaks. Must not know
//! what follows.

use std::io;
use std::pin::pin;

use http::Request;
use http::header::USER_AGENT;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::connect::{Purpose, Way, connect};
use super::endpoint::Endpoint;
use super::grpc_health;
use super::live::LiveUpstream;
use super::reach::{Cause, Unreached};
use crate::config::Protocol;
use crate::config::upstreams::{Asks, HealthCheck};
use crate::http1::head::HeadLimits;
use crate::http1::response::parse_response;
use crate::net::stream::Stream;
use crate::net::tls::client::Offer;

/// What a check says that it is.
const NAME: &str = "weir-health";

/// Whether the endpoint answers in time that it is well, or why that is not so; `None` where weir lacks what it takes to ask, which says
/// nothing of the endpoint.
pub async fn passes(
    live: &LiveUpstream,
    endpoint: &Endpoint,
    check: &HealthCheck,
) -> Option<Result<(), String>> {
    match timeout(check.timeout, ask(live, endpoint, check)).await {
        Ok(answered) => answered,
        Err(_) => Some(Err(format!("no answer within {:?}", check.timeout))),
    }
}

async fn ask(
    live: &LiveUpstream,
    endpoint: &Endpoint,
    check: &HealthCheck,
) -> Option<Result<(), String>> {
    let (settings, tls) = (&live.settings, live.tls.as_deref());
    let is_secure = settings.tls.is_some();
    let way = Way::new(is_secure, tls, &endpoint.name, Offer::All);
    match connect(&endpoint.target, way, Purpose::Check, check.timeout).await {
        Ok(stream) => Some(ask_by(stream, live, endpoint, check).await),
        Err(error) => match Unreached::from(&error) {
            Unreached::Failed(Cause::Own) => None,
            Unreached::Failed(_)
            | Unreached::TimedOut(_)
            | Unreached::Insecure(_)
            | Unreached::Full => Some(Err(error.to_string())),
        },
    }
}

async fn ask_by(
    stream: Stream,
    live: &LiveUpstream,
    endpoint: &Endpoint,
    check: &HealthCheck,
) -> Result<(), String> {
    let settings = &live.settings;
    let host = check.host.as_ref().unwrap_or(&endpoint.authority);
    let scheme = if settings.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let path = match &check.asks {
        Asks::Get(path) => path,
        Asks::Grpc(service) => {
            return grpc_health::check(stream, scheme, host, service, NAME).await;
        }
    };
    let status = match settings.protocol == Protocol::Http2 || stream.is_http2() {
        true => by_http2(stream, &format!("{scheme}://{host}{path}")).await,
        false => by_http1(stream, path, host).await,
    };
    // As Kubernetes' probes want it.
    match status {
        Ok(200..=399) => Ok(()),
        Ok(status) => Err(format!("status {status}")),
        Err(error) => Err(error.to_string()),
    }
}

async fn by_http2(stream: Stream, uri: &str) -> io::Result<u16> {
    let request = Request::get(uri).header(USER_AGENT, NAME).body(());
    let request = request.map_err(io::Error::other)?;
    let handshake = h2::client::Builder::new()
        .enable_push(false)
        .handshake::<_, bytes::Bytes>(stream);
    let (requests, connection) = handshake.await.map_err(io::Error::other)?;
    let mut asking = pin!(async {
        let (response, _) = requests.ready().await?.send_request(request, true)?;
        Ok(response.await?.status().as_u16())
    });
    let answered = tokio::select! {
        answered = &mut asking => answered,
        // It may end with the answer.
        _ = connection => asking.await,
    };
    answered.map_err(|error: h2::Error| io::Error::other(error))
}

async fn by_http1(mut stream: Stream, path: &str, host: &str) -> io::Result<u16> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {NAME}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::with_capacity(1024);
    loop {
        match parse_response(&answer, false, HeadLimits::default()) {
            Ok(Some(head)) if head.status < 200 => drop(answer.drain(..head.len)),
            Ok(Some(head)) => return Ok(head.status),
            Ok(None) => {
                if stream.read_buf(&mut answer).await? == 0 {
                    return Err(io::Error::other("the connection ended without an answer"));
                }
            }
            Err(_) => return Err(io::Error::other("an answer that is not HTTP")),
        }
    }
}
