//! `/app-health/CONTAINER/KIND`: an app's probes, which the kubelet cannot ask itself where the kernel redirects what comes in to weir. `weir inject`
//! writes them into `WEIR_APP_PROBES`; what is asked, and where, is in no one else's hands. The app is asked at the pod's own address, as the kubelet asks
//! it: an app may listen on that alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{
    ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION,
    USER_AGENT,
};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::{Position, Url};

const VARIABLE: &str = "WEIR_APP_PROBES";
/// The pod's address; without it, the loopback's stands for that.
const POD: &str = "WEIR_POD_IP";

/// Followed for one probe, at most, as by the kubelet.
const REDIRECTS: usize = 10;

/// The largest answer to a gRPC health check that is looked at: it is 7 bytes long.
const MAX_ANSWER: usize = 1024;

/// The app's probes.
#[derive(Debug)]
pub struct AppProbes {
    by_path: BTreeMap<String, Probe>,
    /// Where the app is asked.
    at: IpAddr,
}

/// As Kubernetes writes it, its port a number.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Probe {
    #[serde(default = "one")]
    timeout_seconds: u64,
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
}

fn one() -> u64 {
    1
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpGet {
    port: u16,
    #[serde(default)]
    path: String,
    #[serde(default)]
    http_headers: Vec<Field>,
    /// `HTTP`; `weir inject` takes no other.
    #[serde(rename = "scheme")]
    _scheme: Option<String>,
    #[serde(rename = "host")]
    _host: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Field {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
struct TcpSocket {
    port: u16,
}

#[derive(Debug, Deserialize)]
struct Grpc {
    port: u16,
    service: Option<String>,
}

impl Default for AppProbes {
    fn default() -> AppProbes {
        AppProbes {
            by_path: BTreeMap::new(),
            at: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

impl AppProbes {
    /// Those of the environment; none where it says nothing.
    pub fn of_environment() -> Result<AppProbes, String> {
        let wrong =
            |name: &str, error: &dyn Display| format!("{name}: {error}; weir inject writes it");
        let mut probes = AppProbes::default();
        if let Ok(text) = std::env::var(VARIABLE) {
            probes.by_path =
                serde_json::from_str(&text).map_err(|error| wrong(VARIABLE, &error))?;
        }
        if let Ok(text) = std::env::var(POD) {
            probes.at = text.parse().map_err(|error| wrong(POD, &error))?;
        }
        Ok(probes)
    }

    /// What the app answers to the probe of that path, its mistake in words; `None` where there is no such probe.
    pub(super) async fn ask(&self, path: &str) -> Option<Result<(), String>> {
        let probe = self.by_path.get(path)?;
        let within = Duration::from_secs(probe.timeout_seconds.max(1));
        Some(match timeout(within, asked(probe, self.at)).await {
            Ok(answered) => answered,
            Err(_) => Err(format!("no answer within {} s", within.as_secs())),
        })
    }
}

async fn asked(probe: &Probe, at: IpAddr) -> Result<(), String> {
    let Probe {
        http_get,
        tcp_socket,
        grpc,
        ..
    } = probe;
    match (http_get, tcp_socket, grpc) {
        (Some(get), _, _) => http(get, at).await,
        (None, Some(socket), _) => connect((at, socket.port).into()).await.map(drop),
        (None, None, Some(grpc)) => serving(grpc, at).await,
        (None, None, None) => Err("nothing to ask".to_owned()),
    }
}

async fn connect(address: SocketAddr) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(address).await;
    stream.map_err(|error| format!("port {}: {error}", address.port()))
}

/// As the kubelet: from 200 to 399 is well, and redirects are followed while they stay with the app.
async fn http(get: &HttpGet, at: IpAddr) -> Result<(), String> {
    let address = SocketAddr::from((at, get.port));
    let slash = if get.path.starts_with('/') { "" } else { "/" };
    let mut place = Url::parse(&format!("http://{address}{slash}{}", get.path)).map_err(said)?;
    for _ in 0..=REDIRECTS {
        let answered = http_once(get, at, &place).await?;
        match answered.status().as_u16() {
            301 | 302 | 303 | 307 | 308 => match redirected(&place, answered.headers()) {
                Some(next) => place = next,
                None => return Ok(()),
            },
            200..=399 => return Ok(()),
            status => return Err(format!("status {status}")),
        }
    }
    Err(format!("more than {REDIRECTS} redirects"))
}

/// Where to go on; `None` where that is not with the app.
fn redirected(place: &Url, fields: &HeaderMap) -> Option<Url> {
    let location = fields.get(LOCATION)?.to_str().ok()?;
    let next = place.join(location).ok()?;
    (next.scheme() == "http" && next.host() == place.host()).then_some(next)
}

async fn http_once(get: &HttpGet, at: IpAddr, place: &Url) -> Result<Response<Incoming>, String> {
    let port = place.port_or_known_default().unwrap_or(get.port);
    let address = SocketAddr::from((at, port));
    let stream = TokioIo::new(connect(address).await?);
    let (mut sender, connection) = http1::handshake(stream).await.map_err(said)?;
    let mut request = Request::get(&place[Position::BeforePath..Position::AfterQuery])
        .body(Empty::<Bytes>::new())
        .map_err(said)?;
    let headers = request.headers_mut();
    let host = HeaderValue::from_str(&address.to_string());
    headers.insert(HOST, host.map_err(said)?);
    headers.insert(USER_AGENT, HeaderValue::from_static("kube-probe/weir"));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    let mut given = BTreeSet::new();
    for Field { name, value } in &get.http_headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(said)?;
        let value = HeaderValue::from_str(value).map_err(said)?;
        // The first takes the place of weir's own.
        match given.insert(name.to_string()) {
            true => drop(headers.insert(name, value)),
            false => drop(headers.append(name, value)),
        }
    }
    let mut asking = pin!(sender.send_request(request));
    let answered = tokio::select! {
        answered = &mut asking => answered,
        // It may end with the answer.
        _ = connection => asking.await,
    };
    answered.map_err(said)
}

/// gRPC's health checking protocol: `grpc.health.v1.Health/Check` must say SERVING.
async fn serving(grpc: &Grpc, at: IpAddr) -> Result<(), String> {
    let address = SocketAddr::from((at, grpc.port));
    let stream = connect(address).await?;
    let (requests, connection) = h2::client::handshake(stream).await.map_err(said)?;
    let uri = format!("http://{address}/grpc.health.v1.Health/Check");
    let request = Request::post(uri)
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .header(USER_AGENT, "kube-probe/weir")
        .body(())
        .map_err(said)?;
    let mut asking = pin!(async {
        let mut requests = requests.ready().await.map_err(said)?;
        let (response, mut body) = requests.send_request(request, false).map_err(said)?;
        body.send_data(
            check_request(grpc.service.as_deref().unwrap_or_default()),
            true,
        )
        .map_err(said)?;
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
