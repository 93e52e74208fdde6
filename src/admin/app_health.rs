//! `/app-health/CONTAINER/KIND`: an app's probes, which the kubelet cannot ask itself where the kernel redirects what comes in to weir. `weir inject`
//! writes them into `WEIR_APP_PROBES`; what is asked, and where, is in no one else's hands. The app is asked at the pod's own address, as the kubelet asks
//! it: an app may listen on that alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{
    ACCEPT, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, USER_AGENT,
};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::{Position, Url};

use crate::upstream::grpc_health;

const VARIABLE: &str = "WEIR_APP_PROBES";
/// The pod's address; without it, the loopback's stands for that.
const POD: &str = "WEIR_POD_IP";

/// Followed for one probe, at most, as by the kubelet.
const REDIRECTS: usize = 10;

/// What a probe says that it is.
const AGENT: &str = "kube-probe/weir";

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
    headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
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

/// gRPC's health checking protocol: the app must say SERVING.
async fn serving(grpc: &Grpc, at: IpAddr) -> Result<(), String> {
    let address = SocketAddr::from((at, grpc.port));
    let stream = connect(address).await?;
    let service = grpc.service.as_deref().unwrap_or_default();
    grpc_health::check(stream, "http", &address.to_string(), service, AGENT).await
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
