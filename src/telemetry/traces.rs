//! Spans on their way to a collector (OTLP over gRPC). They come in batches over a bounded queue to a thread that alone talks to
//! it: whoever has spans never waits, and what does not fit, or what the collector does not take, is counted. No module but
//! this and `spans` names the crates of OpenTelemetry.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::{Array, Key, KeyValue, Value};
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;
use tracing::{error, info, warn};

use super::metrics::outlets::Outlet;
use super::spans::{self, Traced};
use crate::blocking;

/// Requests of a batch, at most.
pub const BATCH: usize = 64;
/// How the targets of OpenTelemetry's own lines begin.
pub(super) const CRATES: &str = "opentelemetry";
/// Batches that wait, at most.
const QUEUE: usize = 64;
/// Bytes of all that wait or are on their way, at most: as many as those batches have, where a request has 4 KiB.
const WAITING_BYTES: usize = 16 << 20;
/// Spans that are gathered for a call of the collector, at most, but for the last batch.
const EXPORT: usize = 512;
/// How long the first of them waits for others.
const GATHER: Duration = Duration::from_millis(500);
/// Bytes of one call of the collector, some at most: collectors take 4 MiB.
const EXPORT_BYTES: usize = 2 << 20;
/// Between two exporters: each has a connection to make, by TLS with all authorities of the machine to read.
const ANEW_EVERY: Duration = Duration::from_secs(2);
/// For all calls of the collector with what was gathered, tries again included.
const EXPORT_WITHIN: Duration = Duration::from_secs(10);

/// The queue of one collector; its thread ends when this is dropped, once what waits is out.
#[derive(Debug)]
pub struct Traces {
    /// Its URL.
    pub otlp: String,
    sender: Sender<Message>,
    /// What is left of [`WAITING_BYTES`].
    room: Arc<Semaphore>,
    told: Outlet,
}

#[derive(Debug)]
enum Message {
    Requests(Vec<Traced>, OwnedSemaphorePermit),
    /// Told once all before it is out.
    Stop(SyncSender<()>),
}

impl Traces {
    /// Begins the thread.
    pub fn start(otlp: &str, told: Outlet) -> Arc<Traces> {
        let (sender, messages) = mpsc::channel(QUEUE);
        let (endpoint, counted) = (otlp.to_owned(), told.clone());
        let begun = thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || {
                if let Err(error) = run(&endpoint, messages, &counted) {
                    error!(
                        error = format!("{error:#}"),
                        "traces cannot be sent: all spans are dropped"
                    );
                }
            });
        if let Err(error) = begun {
            error!(%error, "traces have no thread: all spans are dropped");
        }
        Arc::new(Traces {
            otlp: otlp.to_owned(),
            sender,
            room: Arc::new(Semaphore::new(WAITING_BYTES)),
            told,
        })
    }

    /// Hands on requests, or drops their spans where too many wait.
    pub fn hand_on(&self, requests: Vec<Traced>) {
        let spans = requests.iter().map(Traced::spans).sum();
        let bytes = requests.iter().map(Traced::bytes).sum::<usize>();
        let room = u32::try_from(bytes).ok();
        let room = room.and_then(|bytes| self.room.clone().try_acquire_many_owned(bytes).ok());
        let message = room.map(|room| Message::Requests(requests, room));
        if message.is_none_or(|message| self.sender.try_send(message).is_err()) {
            self.told.dropped.inc_by(spans);
        }
    }

    /// Waits until all spans are out, for at most `within`.
    pub fn stop(&self, within: Duration) {
        let (done, is_done) = sync_channel(1);
        let sent = || {
            let sent = self.sender.try_send(Message::Stop(done.clone()));
            sent.is_ok() || self.sender.is_closed()
        };
        let Some(left) = until_sent(within, sent) else {
            return;
        };
        drop(done);
        // Whatever is not out by then is lost; it was best effort.
        let _ = is_done.recv_timeout(left);
    }
}

/// Tries every 10 ms whether a queue takes what `sent` has for it, for at most `within`; what of that is left, `None` where it did not.
fn until_sent(within: Duration, mut sent: impl FnMut() -> bool) -> Option<Duration> {
    const EVERY: Duration = Duration::from_millis(10);
    let mut left = within;
    while !sent() {
        left = left.checked_sub(EVERY)?;
        thread::sleep(EVERY);
    }
    Some(left)
}

fn run(otlp: &str, messages: Receiver<Message>, told: &Outlet) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        send(messages, exporter(otlp)?, || exporter(otlp), told).await;
        Ok(())
    })
}

/// Connects at the first call. OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES in the environment
/// are heeded.
fn exporter(otlp: &str) -> anyhow::Result<impl SpanExporter> {
    let mut builder = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(otlp)
        .with_timeout(EXPORT_WITHIN);
    if otlp.starts_with("https:") {
        builder = builder.with_tls_config(ClientTlsConfig::new().with_native_roots());
    }
    let mut exporter = builder.build().context("telemetry.traces.otlp")?;
    exporter.set_resource(&resource());
    Ok(exporter)
}

/// What the environment says of this process, and weir's name where it says none.
fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let told = Resource::builder().with_attribute(version.clone()).build();
    let name = told.get(&Key::from_static_str("service.name"));
    // The SDK's word where it was told none, or an empty one.
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    match is_named {
        true => told,
        false => Resource::builder()
            .with_service_name("weir")
            .with_attribute(version)
            .build(),
    }
}

/// `anew`: an exporter with connections of its own.
async fn send<E: SpanExporter>(
    mut messages: Receiver<Message>,
    mut exporter: E,
    anew: impl Fn() -> anyhow::Result<E>,
    told: &Outlet,
) {
    let (mut fails, mut made) = (false, tokio::time::Instant::now());
    while let Some(message) = messages.recv().await {
        let (mut spans, mut held) = (Vec::new(), Vec::new());
        let mut stop = take(message, &mut spans, &mut held);
        let gathered = tokio::time::Instant::now() + GATHER;
        while stop.is_none() && spans.len() < EXPORT {
            match timeout_at(gathered, messages.recv()).await {
                Ok(Some(message)) => stop = take(message, &mut spans, &mut held),
                Ok(None) | Err(_) => break,
            }
        }
        let until = tokio::time::Instant::now() + EXPORT_WITHIN;
        for spans in parts(spans) {
            let count = spans.len() as u64;
            let sent = match timeout_at(until, exporter.export(spans)).await {
                Ok(sent) => sent.map_err(|error| error.to_string()),
                Err(_) => Err("it does not answer in time".to_owned()),
            };
            match (sent, fails) {
                (Ok(()), _) => {
                    told.out.inc_by(count);
                    if fails {
                        info!("the collector takes spans again");
                    }
                    fails = false;
                }
                (Err(error), already) => {
                    told.dropped.inc_by(count);
                    if !already {
                        warn!(
                            error,
                            "the collector takes no spans; they are dropped until it does"
                        );
                    }
                    fails = true;
                }
            }
        }
        // Its connection may lead to a machine that is gone, which the kernel takes a quarter of an hour to say. It may have none any more, since no
        // thread could be begun to look the collector's name up, which ended what connects.
        if fails && made.elapsed() >= ANEW_EVERY && blocking::hand_on(|| ()).is_ok() {
            exporter = anew().unwrap_or(exporter);
            made = tokio::time::Instant::now();
        }
        if let Some(done) = stop {
            let _ = done.send(());
            return;
        }
    }
}

/// The room of what is taken is to be `held` until that is out.
fn take(
    message: Message,
    spans: &mut Vec<SpanData>,
    held: &mut Vec<OwnedSemaphorePermit>,
) -> Option<SyncSender<()>> {
    match message {
        Message::Requests(requests, room) => {
            held.push(room);
            spans.extend(requests.iter().flat_map(spans::of));
            None
        }
        Message::Stop(done) => Some(done),
    }
}

/// In their order, so many at a time as may go by one call.
fn parts(spans: Vec<SpanData>) -> Vec<Vec<SpanData>> {
    let mut parts = Vec::<Vec<SpanData>>::new();
    let mut left = 0;
    for span in spans {
        let size = size(&span);
        match parts.last_mut().filter(|_| size <= left) {
            Some(part) => part.push(span),
            None => {
                parts.push(vec![span]);
                left = EXPORT_BYTES;
            }
        }
        left = left.saturating_sub(size);
    }
    parts
}

/// Some more bytes than it takes on the wire.
fn size(span: &SpanData) -> usize {
    const REST: usize = 200;
    const OF_ATTRIBUTE: usize = 16;
    let of_value = |value: &Value| match value {
        Value::String(text) => text.as_str().len(),
        Value::Array(Array::String(texts)) => texts
            .iter()
            .map(|text| OF_ATTRIBUTE + text.as_str().len())
            .sum(),
        _ => size_of::<u64>(),
    };
    let attributes = span.attributes.iter();
    let of_attributes = attributes
        .map(|it| OF_ATTRIBUTE + it.key.as_str().len() + of_value(&it.value))
        .sum::<usize>();
    let state = span.span_context.trace_state().header().len();
    REST + span.name.len() + state + of_attributes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn so_many_bytes_wait_at_most_and_what_does_not_fit_is_counted() {
        let told = Metrics::default().traces;
        let (sender, mut messages) = mpsc::channel(QUEUE);
        let traces = Traces {
            otlp: String::new(),
            sender,
            room: Arc::new(Semaphore::new(WAITING_BYTES)),
            told: told.clone(),
        };
        let hand_on = |path: usize| {
            let mut traced = spans::tests::traced();
            traced.event.path = "x".repeat(path);
            let spans = traced.spans();
            let before = told.dropped.get();
            traces.hand_on(vec![traced]);
            let dropped = told.dropped.get() - before;
            assert!([0, spans].contains(&dropped), "{dropped}");
            dropped == 0
        };
        let third = WAITING_BYTES / 3;
        assert_eq!([third; 4].map(hand_on), [true, true, false, false]);
        assert!(hand_on(1_000));
        let (mut taken, mut held) = (Vec::new(), Vec::new());
        assert!(take(messages.try_recv().unwrap(), &mut taken, &mut held).is_none());
        assert!(!hand_on(third), "it is not out yet");
        held.clear();
        assert!(hand_on(third));
        assert!(!hand_on(WAITING_BYTES));
    }

    #[test]
    fn a_call_of_the_collector_has_so_many_bytes_at_most() {
        let check = |lengths: &[usize], expected: &[usize]| {
            let spans = lengths.iter().map(|length| {
                let mut span = spans::tests::span();
                let text = "x".repeat(*length);
                span.attributes = vec![KeyValue::new("url.full", text)];
                span
            });
            let parts = parts(spans.collect());
            let found: Vec<_> = parts.iter().map(Vec::len).collect();
            assert_eq!(found, expected, "{lengths:?}");
            for part in parts.iter().filter(|part| part.len() > 1) {
                assert!(part.iter().map(size).sum::<usize>() <= EXPORT_BYTES);
            }
        };
        check(&[], &[]);
        check(&[100; 512], &[512]);
        check(&[900_000; 5], &[2, 2, 1]);
        check(&[10, 3_000_000, 10, 10], &[1, 1, 2]);
    }
}
