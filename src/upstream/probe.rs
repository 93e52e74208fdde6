//! Active checks: an endpoint is asked how it is, over a connection of its own.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::connect::connect;
use super::endpoints::Endpoint;
use crate::config::upstreams::HealthCheck;
use crate::http1::head::HeadLimits;
use crate::http1::response::parse_response;

/// Whether the endpoint answers in time, with a status from 200 to 399, as Kubernetes' probes want it.
pub async fn passes(endpoint: &Endpoint, check: &HealthCheck) -> bool {
    let answered = timeout(check.timeout, ask(endpoint, check)).await;
    matches!(answered, Ok(Ok(Some(200..=399))))
}

/// The status of the answer; `None` for nonsense.
async fn ask(endpoint: &Endpoint, check: &HealthCheck) -> io::Result<Option<u16>> {
    let mut stream = connect(&endpoint.target, check.timeout).await?;
    let (path, host) = (&check.path, &endpoint.place);
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: weir-health\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(1024);
    loop {
        match parse_response(&answer, false, HeadLimits::default()) {
            Ok(Some(head)) if head.status < 200 => drop(answer.drain(..head.len)),
            Ok(Some(head)) => return Ok(Some(head.status)),
            Ok(None) => {
                if stream.read_buf(&mut answer).await? == 0 {
                    return Ok(None);
                }
            }
            Err(_) => return Ok(None),
        }
    }
}
