//! gRPC's health checks (github.com/grpc/grpc, doc/health-checking.md), as who asks: for upstreams, and for the probes of
//! apps that `admin::app_health` asks.

use std::future::poll_fn;
use std::pin::pin;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, USER_AGENT};
use http::{Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};

/// The largest answer that is looked at: it is 7 bytes long.
const MAX_ANSWER: usize = 1024;

/// Asks over this connection how the service is, or the server where it is empty: it must say SERVING. Waits for ever.
pub async fn check(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    scheme: &str,
    host: &str,
    service: &str,
    agent: &str,
) -> Result<(), String> {
    let (requests, connection) = h2::client::handshake(stream).await.map_err(said)?;
    let uri = format!("{scheme}://{host}/grpc.health.v1.Health/Check");
    let request = Request::post(uri)
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .header(USER_AGENT, agent)
        .body(())
        .map_err(said)?;
    let mut asking = pin!(async {
        let mut requests = requests.ready().await.map_err(said)?;
        let (response, mut body) = requests.send_request(request, false).map_err(said)?;
        body.send_data(check_request(service), true).map_err(said)?;
        let response = response.await.map_err(said)?;
        if response.status() != StatusCode::OK {
            return Err(format!("status {}", response.status().as_u16()));
        }
        is_ok(response.headers())?;
        let mut body = response.into_body();
        let mut answer = BytesMut::new();
        while let Some(piece) = poll_fn(|context| body.poll_data(context)).await {
            let piece = piece.map_err(said)?;
            let _ = body.flow_control().release_capacity(piece.len());
            answer.extend_from_slice(&piece);
            if answer.len() > MAX_ANSWER {
                return Err("no answer of a health check".to_owned());
            }
        }
        if let Some(trailers) = poll_fn(|context| body.poll_trailers(context))
            .await
            .map_err(said)?
        {
            is_ok(&trailers)?;
        }
        is_serving(&answer)
    });
    tokio::select! {
        answered = &mut asking => answered,
        _ = connection => asking.await,
    }
}

/// gRPC's own status stands in the trailers, or in the head of an answer without a message.
fn is_ok(fields: &HeaderMap) -> Result<(), String> {
    match fields.get("grpc-status").map(HeaderValue::as_bytes) {
        None | Some(b"0") => Ok(()),
        Some(status) => Err(format!("grpc-status {}", String::from_utf8_lossy(status))),
    }
}

/// A message of gRPC with `HealthCheckRequest { service = 1 }`.
fn check_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(&message);
    framed.freeze()
}

/// Of `HealthCheckResponse { status = 1 }`: SERVING is 1.
fn is_serving(mut answer: &[u8]) -> Result<(), String> {
    if answer.len() < 5 {
        return Err("no answer of a health check".to_owned());
    }
    answer.advance(5);
    match answer {
        [0x08, 1] => Ok(()),
        [] | [0x08, 0] => Err("UNKNOWN".to_owned()),
        [0x08, 2] => Err("NOT_SERVING".to_owned()),
        [0x08, 3] => Err("SERVICE_UNKNOWN".to_owned()),
        _ => Err("no answer of a health check".to_owned()),
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
