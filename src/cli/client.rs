//! Calls to the admin port of a running weir.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// All of a call, from the connection to the answer's last byte.
const WITHIN: Duration = Duration::from_secs(5);

/// One call.
pub(super) struct Call<'a> {
    pub address: SocketAddr,
    pub method: Method,
    /// With its query.
    pub path: &'a str,
    pub token: Option<&'a str>,
    /// JSON, or empty.
    pub body: String,
}

/// The status and the body of the answer.
pub(super) fn call(call: Call<'_>) -> anyhow::Result<(u16, String)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let address = call.address;
    let asked = runtime.block_on(async { timeout(WITHIN, ask(call)).await });
    asked.with_context(|| format!("{address} did not answer within {WITHIN:?}"))?
}

async fn ask(call: Call<'_>) -> anyhow::Result<(u16, String)> {
    let address = call.address;
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot reach the admin port {address}: is weir running?"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(call.method)
        .uri(call.path)
        .header(HOST, address.to_string());
    if let Some(token) = call.token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    if !call.body.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::<Bytes>::from(call.body))?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
