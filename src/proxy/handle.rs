//! The life of a client's connection: heads are read, checked and handed to `forward`; what is refused is answered by
//! `reply`. The one place that decides whether the connection lives on.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::forward::{self, Outbound};
use super::headers;
use super::lane::Lane;
use super::reply::Rejection;
use crate::config::{Config, Listener, Route};
use crate::http1::head::{self, BodyLength, RequestHead};
use crate::http1::path;
use crate::policy::routes;

/// Whether a client's connection can carry another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    KeepAlive,
    Close,
}

/// How an exchange failed: before the response's head went out there can be a reply, afterwards only an abort.
#[derive(Debug)]
pub(super) enum Failure {
    Reply(Rejection),
    Abort,
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Failure {
        Failure::Reply(rejection)
    }
}

/// Serves `client` until it closes, breaks, is refused or stays idle too long.
pub(super) async fn connection(
    lane: &Lane,
    listener_index: usize,
    mut client: TcpStream,
    peer: SocketAddr,
) {
    if client.set_nodelay(true).is_err() {
        return;
    }
    let mut buffer = Vec::new();
    loop {
        let plan = lane.plan.current();
        let listener = &plan.shared.config.listeners[listener_index];
        let served = match read_head(lane, listener, &client, &mut buffer).await {
            // The plan may be another by the time that a request comes.
            Ok(Some(head)) => {
                one(lane, listener_index, &mut client, peer, &mut buffer, &head).await
            }
            Ok(None) => return,
            Err(rejection) => Err(rejection.into()),
        };
        match served {
            Ok(Next::KeepAlive) => {}
            Ok(Next::Close) | Err(Failure::Abort) => return,
            Err(Failure::Reply(rejection)) => {
                // What stands behind a refused request cannot be trusted to be a request, so the connection ends.
                let written = client.write_all(&rejection.to_bytes(false)).await;
                if written.is_ok() && client.shutdown().await.is_ok() {
                    linger(&client).await;
                }
                return;
            }
        }
    }
}

async fn one(
    lane: &Lane,
    listener_index: usize,
    client: &mut TcpStream,
    peer: SocketAddr,
    buffer: &mut Vec<u8>,
    head: &RequestHead,
) -> Result<Next, Failure> {
    let plan = lane.plan.current();
    let listener = &plan.shared.config.listeners[listener_index];
    let target = &buffer[head.target.clone()];
    let (path, query) = match target.iter().position(|byte| *byte == b'?') {
        Some(at) => target.split_at(at),
        None => (target, &[][..]),
    };
    if path.first() != Some(&b'/') {
        return Err(Rejection::BadTarget.into());
    }
    let path = path::normalise(path).map_err(Rejection::BadPath)?;
    if let BodyLength::Fixed(bytes) = head.body
        && bytes > listener.max_body
    {
        return Err(Rejection::BodyTooLarge.into());
    }
    let route = route(&plan.shared.config, buffer, head, &path).ok_or(Rejection::NoRoute)?;
    let target = [&path, query].concat();
    let is = headers::client(buffer, head, peer, &listener.trusted_proxies);
    forward::send(
        lane,
        &plan,
        Outbound {
            route,
            target,
            max_body: listener.max_body,
            peer,
            client: is,
            stream_idle: listener.stream_idle,
        },
        client,
        buffer,
        head,
    )
    .await
}

fn route<'a>(
    config: &'a Config,
    buffer: &[u8],
    head: &RequestHead,
    path: &[u8],
) -> Option<&'a Route> {
    // Fields that are not UTF-8 match no pattern, since patterns are text.
    let text =
        |place: &Range<usize>| std::str::from_utf8(&buffer[place.clone()]).unwrap_or_default();
    let fields: Vec<_> = head
        .fields
        .iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect();
    let host = fields
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case("host"))
        .map_or("", |(_, value)| value);
    let path = std::str::from_utf8(path).ok()?;
    let request = routes::Request {
        host,
        path,
        method: text(&head.method),
        fields: &fields,
    };
    routes::find(config.routes.iter().map(|route| &route.matches), &request)
        .map(|index| &config.routes[index])
}

/// Reads until a head is whole; `None` when the client closed or stayed idle, which is no fault.
async fn read_head(
    lane: &Lane,
    listener: &Listener,
    client: &TcpStream,
    buffer: &mut Vec<u8>,
) -> Result<Option<RequestHead>, Rejection> {
    if buffer.is_empty() {
        let mut draining = lane.draining.clone();
        // A request that is here already is served, even when the drain has begun.
        tokio::select! {
            biased;
            read = timeout(listener.keep_alive, read_some(client, buffer)) => match read {
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) | Err(_) => return Ok(None),
            },
            _ = draining.wait_for(|draining| *draining) => return Ok(None),
        }
    }
    let whole = async {
        loop {
            if let Some(head) =
                head::parse_request(buffer, listener.head_limits).map_err(Rejection::BadHead)?
            {
                return Ok(Some(head));
            }
            match read_some(client, buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Ok(None),
            }
        }
    };
    timeout(listener.header_read, whole)
        .await
        .unwrap_or(Err(Rejection::HeadTimeout))
}

/// Appends what can be read at once to `buffer`; 0 at the stream's end.
pub(super) async fn read_some(stream: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        buffer.reserve(8 * 1024);
        match stream.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// Writes by a shared reference, so that one connection is read and written at a time.
pub(super) async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads away what the client still sends, for a bounded time: closing on unread bytes would reset the connection and
/// could take the reply with it (RFC 9112 section 9.6).
async fn linger(client: &TcpStream) {
    let mut rest = Vec::new();
    let drain = async {
        while let Ok(1..) = read_some(client, &mut rest).await {
            rest.clear();
        }
    };
    let _ = timeout(std::time::Duration::from_secs(1), drain).await;
}
