//! `weir healthcheck`: asks the admin port of a weir on this machine.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// All of it, from the connection to the answer's last byte.
const WITHIN: Duration = Duration::from_secs(5);

/// Prints what `/health` says; an error unless it says 200 in time.
pub fn run(address: SocketAddr) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let asked = runtime.block_on(async { timeout(WITHIN, ask(address)).await });
    let (status, body) =
        asked.with_context(|| format!("{address} did not answer within {WITHIN:?}"))??;
    writeln!(std::io::stdout(), "{body}")?;
    if status != 200 {
        bail!("{address} says {status}");
    }
    Ok(())
}

async fn ask(address: SocketAddr) -> anyhow::Result<(u16, String)> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot reach {address}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/health")
        .header(HOST, address.to_string())
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
