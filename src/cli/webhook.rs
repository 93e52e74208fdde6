//! `weir webhook`: the API server asks it about pods that are made, and it puts weir into them. Owns the server; what is answered is
//! `inject::review`'s.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{Full, LengthLimitError};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::inject::Sidecar;
use super::run::bind;
use super::signals::Signals;
use super::watched_files::{LOOK_EVERY, TlsFiles};
use crate::blocking;
use crate::clock;
use crate::config::listeners::ListenerProtocol;
use crate::config::tls::{Certificate, ClientAuth, ListenerTls, Version};
use crate::config::units::TimeLength;
use crate::inject::review::{NoReview, OnUnfit, Reviewer, Verdict};
use crate::net::places::Places;
use crate::net::tls::{TlsError, server::ServerTls};
use crate::net::write_deadline::WriteDeadline;
use crate::net::{self, body};
use crate::telemetry::metrics::format;
use crate::telemetry::metrics::webhook::WebhookMetrics;

/// The API server's own bound on an object, and more than it.
const MAX_BODY: usize = 3 << 20;
/// For a handshake, a head, a body, and an answer to be taken, each: the API server waits for 10 s at most.
const WITHIN: Duration = Duration::from_secs(8);
/// API servers keep a few connections each.
const MAX_CONNECTIONS: usize = 1000;
/// Bodies that are here or come at a time: with one review of them made at a time, this bounds the memory.
const MAX_BODIES: usize = 8;
/// Before one of these that is not here yet makes room: of many pods that are made at once, each of some ten KB, none is slow.
const PATIENCE: Duration = Duration::from_secs(1);
/// For what is under way at the end.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Arguments {
    /// Where the API server asks, by HTTPS, under /inject.
    #[arg(long, value_name = "IP:PORT", default_value = "[::]:9443")]
    address: SocketAddr,
    /// The certificate, and those that it leads to (PEM); read again when it changes.
    #[arg(long, value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its private key.
    #[arg(long, value_name = "FILE")]
    tls_key: PathBuf,
    /// Where /live, /ready and /metrics are, by HTTP.
    #[arg(long, value_name = "IP:PORT", default_value = "[::]:9901")]
    admin: SocketAddr,
    /// What becomes of a pod that weir cannot be put into as it is asked to.
    #[arg(long, value_enum, default_value_t = OnUnfit::Admit)]
    on_unfit: OnUnfit,
    /// The webhook's own namespace, whose pods are left as they are.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    own_namespace: Option<String>,
    /// After SIGTERM, for how long connections are still taken: until all know that it goes.
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    propagation_delay: TimeLength,
    #[command(flatten)]
    sidecar: Sidecar,
}

struct Webhook {
    reviewer: Reviewer,
    metrics: WebhookMetrics,
    tls: watch::Receiver<Arc<ServerTls>>,
    stage: watch::Receiver<Stage>,
    places: Arc<Semaphore>,
    bodies: Places,
    reviews: Arc<Semaphore>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Serving,
    /// /ready says so, and each connection ends with its next answer; new ones are taken.
    Leaving,
    /// Connections end once nothing is under way on them.
    Ended,
}

/// Serves until SIGTERM, SIGQUIT or SIGINT, and then what is under way.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(arguments))
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let settings = ListenerTls {
        certificates: vec![Certificate {
            cert: arguments.tls_cert,
            key: arguments.tls_key,
        }],
        client_auth: ClientAuth::None,
        min_version: Version::Tls12,
    };
    let files = TlsFiles::at(settings.files().cloned());
    let first = read(&settings, None).context("cannot serve by TLS")?;
    let metrics = WebhookMetrics::default();
    metrics.certificates.note_lifetimes(first.certificates());
    let (reread, tls) = watch::channel(Arc::new(first));
    let (told, stage) = watch::channel(Stage::Serving);
    let (listener, admin) = (bind(arguments.address)?, bind(arguments.admin)?);
    let webhook = Arc::new(Webhook {
        reviewer: Reviewer {
            settings: arguments.sidecar.into(),
            on_unfit: arguments.on_unfit,
            own_namespace: arguments.own_namespace,
        },
        metrics,
        tls,
        stage,
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        bodies: Places::new(MAX_BODIES).patient(PATIENCE),
        reviews: Arc::new(Semaphore::new(1)),
    });
    info!(address = %listener.local_addr()?, admin = %admin.local_addr()?, "reviewing pods");
    tokio::spawn(follow(settings, files, reread, webhook.clone()));
    let of_admin = webhook.clone();
    tokio::spawn(net::serve(admin, net::unbounded(), move |stream, _| {
        admin_connection(stream, of_admin.clone())
    }));
    let TimeLength(delay) = arguments.propagation_delay;
    tokio::select! {
        never = net::serve(listener, webhook.places.clone(), |stream, _| greet(stream, webhook.clone())) => match never {},
        stopped = async {
            let stopped = signals.stopped().await;
            told.send_replace(Stage::Leaving);
            sleep(delay).await;
            stopped
        } => stopped?,
    }
    told.send_replace(Stage::Ended);
    info!("draining");
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    if timeout(DRAIN, webhook.places.acquire_many(all))
        .await
        .is_err()
    {
        warn!(within = ?DRAIN, "connections were cut off");
    }
    Ok(())
}

fn read(settings: &ListenerTls, old: Option<&ServerTls>) -> Result<ServerTls, TlsError> {
    ServerTls::read(settings, ListenerProtocol::Http1, old)
}

/// Reads the certificate again for ever, when its files change. Bad files change nothing.
async fn follow(
    settings: ListenerTls,
    mut files: TlsFiles,
    reread: watch::Sender<Arc<ServerTls>>,
    webhook: Arc<Webhook>,
) {
    let mut look = interval(LOOK_EVERY);
    loop {
        look.tick().await;
        if !files.look() {
            continue;
        }
        let read = read(&settings, Some(&reread.borrow()));
        match read {
            Ok(tls) => {
                webhook
                    .metrics
                    .certificates
                    .note_lifetimes(tls.certificates());
                reread.send_replace(Arc::new(tls));
                webhook.metrics.reloaded.inc();
                info!("the certificate was read again");
            }
            Err(error) => {
                webhook.metrics.refused.inc();
                warn!(%error, "the certificate has changed and cannot be used; going on with the one before");
            }
        }
    }
}

async fn greet(stream: TcpStream, webhook: Arc<Webhook>) {
    let acceptor = TlsAcceptor::from(webhook.tls.borrow().config.clone());
    match timeout(WITHIN, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => connection(stream, webhook).await,
        Ok(Err(error)) => debug!(%error, "no TLS"),
        Err(_) => debug!("no TLS in time"),
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, webhook: Arc<Webhook>) {
    let mut stage = webhook.stage.clone();
    let service = service_fn(|request| {
        let webhook = webhook.clone();
        async move { Ok::<_, Infallible>(webhook.answer(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(WITHIN)
        .serve_connection(TokioIo::new(WriteDeadline::within(WITHIN, stream)), service);
    let mut served = std::pin::pin!(served);
    let ended = async { drop(stage.wait_for(|stage| *stage == Stage::Ended).await) };
    tokio::select! {
        // A caller that breaks off is its own affair.
        _ = served.as_mut() => {}
        () = ended => {
            served.as_mut().graceful_shutdown();
            let _ = served.await;
        }
    }
}

impl Webhook {
    async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let began = clock::now();
        match (request.method(), request.uri().path()) {
            (&Method::POST, "/inject") => {}
            (_, "/inject") => {
                let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "this path knows POST");
                let headers = response.headers_mut();
                headers.insert(ALLOW, HeaderValue::from_static("POST"));
                return response;
            }
            (_, _) => return text(StatusCode::NOT_FOUND, "reviews are made at /inject"),
        }
        let mut response = match self.review(request).await {
            Ok(answer) => response(StatusCode::OK, "application/json", answer),
            Err((status, why)) => {
                self.metrics.error.inc();
                warn!(status = status.as_u16(), %why, "no review");
                text(status, &why)
            }
        };
        if *self.stage.borrow() >= Stage::Leaving {
            let headers = response.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        self.metrics.took(began.elapsed());
        response
    }

    async fn review(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Bytes, (StatusCode, String)> {
        let unavailable = |why: &str| (StatusCode::SERVICE_UNAVAILABLE, why.to_owned());
        let came = async {
            let taken = self.bodies.take().await;
            let (place, left) = taken.map_err(|_| unavailable("no reviews are made any more"))?;
            let body = tokio::select! {
                body = body::whole(request.into_body(), MAX_BODY) => body,
                Ok(()) = left => return Err(unavailable("the review made room for others before it was here")),
            };
            match body {
                Ok(body) => {
                    place.heard();
                    Ok((body, place))
                }
                Err(error) if error.is::<LengthLimitError>() => {
                    let why = format!("the review is larger than {MAX_BODY} bytes");
                    Err((StatusCode::PAYLOAD_TOO_LARGE, why))
                }
                Err(error) => Err((StatusCode::BAD_REQUEST, error.to_string())),
            }
        };
        let (body, place) = timeout(WITHIN, came).await.map_err(|_| {
            let why = format!("the review was not here within {WITHIN:?}");
            (StatusCode::REQUEST_TIMEOUT, why)
        })??;
        let turn = timeout(WITHIN, self.reviews.clone().acquire_owned()).await;
        let turn = turn.map_err(|_| unavailable("others' reviews take too long"))?;
        // Apart, since a review takes as long as what it reads has it take.
        let webhook = self.clone();
        let reviewed = blocking::done(move || {
            // A caller that goes does not end it.
            let _held = (place, turn);
            let reviewed = webhook.reviewer.review(&body)?;
            let answer = Bytes::from(reviewed.answer.to_string());
            Ok::<_, NoReview>((answer, reviewed.verdict, reviewed.pod))
        });
        let reviewed = reviewed.await.map_err(|error| {
            let why = format!("the review came to nothing: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, why)
        })?;
        let (answer, verdict, pod) = reviewed.map_err(|error| {
            let status = match error {
                NoReview::TooMuch => StatusCode::PAYLOAD_TOO_LARGE,
                NoReview::Other(_) => StatusCode::BAD_REQUEST,
            };
            (status, error.to_string())
        })?;
        match verdict {
            Verdict::Injected => {
                self.metrics.injected.inc();
                info!(pod, "injected");
            }
            Verdict::Skipped(reason) => {
                self.metrics.skipped.inc();
                info!(pod, reason, "skipped");
            }
            Verdict::Unfit(reason) => {
                self.metrics.unfit.inc();
                warn!(pod, reason, "unfit");
            }
        }
        Ok(answer)
    }

    fn admin(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/live") => text(StatusCode::OK, "live"),
            (&Method::GET, "/ready") if *self.stage.borrow() >= Stage::Leaving => {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining")
            }
            (&Method::GET, "/ready") => text(StatusCode::OK, "ready"),
            (&Method::GET, "/metrics") => {
                let (kind, text) = format::as_asked(request.headers(), self.metrics.text());
                response(StatusCode::OK, kind, text.into())
            }
            (_, _) => text(
                StatusCode::NOT_FOUND,
                "GET /live, /ready and /metrics are here",
            ),
        }
    }
}

async fn admin_connection(stream: TcpStream, webhook: Arc<Webhook>) {
    let service = service_fn(|request: Request<Incoming>| {
        let webhook = webhook.clone();
        async move { Ok::<_, Infallible>(webhook.admin(&request)) }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(WITHIN)
        .serve_connection(TokioIo::new(WriteDeadline::within(WITHIN, stream)), service)
        .await;
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    response(status, "text/plain", format!("{text}\n").into())
}

fn response(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
