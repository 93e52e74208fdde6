//! What an audited event costs by the format it travels in: bytes and CPU time of who packs and who opens it, and of Redis.
//!
//! `cargo bench --bench formats`. Formats are compared with events as an API has them: no captured headers, ids of their own.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a broken step of a bench ends it; what it measures is printed"
)]

#[path = "../tests/harness/mod.rs"]
mod harness;
mod measure;

use std::hint::black_box;
use std::time::Duration;

use harness::redis::Server;
use measure::events::event;
use measure::link::Link;
use measure::{Options, median, process_cpu, thread_cpu};
use serde_json::Value;
use uuid::Uuid;
use weir::clock;
use weir::event::{AuditEvent, Encoded, Micros};
use weir::store::audit::batch::{self, Batch, Boot};
use weir::store::audit::chain::Hasher;

const BATCHES: [usize; 6] = [1, 10, 50, 100, 200, 500];
/// Commands that are sent before the answers are read.
const PIPELINE: usize = 16;
const STREAM: &str = "weir:a:{audit.0}";

/// What becomes of the events' encodings.
struct Format {
    name: &'static str,
    press: fn(&[u8]) -> Vec<u8>,
    open: fn(&[u8]) -> usize,
}

const FORMATS: &[Format] = &[
    Format {
        name: "postcard",
        press: <[u8]>::to_vec,
        open: <[u8]>::len,
    },
    Format {
        name: "postcard, LZ4",
        press: lz4_flex::compress_prepend_size,
        open: |pressed| lz4_flex::decompress_size_prepended(pressed).unwrap().len(),
    },
];

fn main() {
    let options = Options::read();
    let (count, rounds) = if options.whole {
        (200_000, 3)
    } else {
        (2_000, 1)
    };
    let events: Vec<_> = (0..count).map(event).collect();
    println!(
        "| format | events | B an event | press, ns | open, ns | Redis in, ns | Redis out, ns | Redis, B |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|"
    );
    let row = |format: &str, size: usize, pack: &dyn Fn() -> Packed| {
        let rounds = (0..rounds).map(|_| round(&pack())).collect::<Vec<_>>();
        let figures = (0..rounds[0].len()).map(|column| {
            let figure = median(rounds.iter().map(|round| round[column])) / count as f64;
            format!("{figure:.0}")
        });
        let figures = figures.collect::<Vec<_>>().join(" | ");
        println!("| {format} | {size} | {figures} |");
    };
    let values: Vec<_> = events.iter().map(json).collect();
    row("JSON", 1, &|| {
        packed(
            || {
                values
                    .iter()
                    .map(|value| serde_json::to_vec(value).unwrap())
                    .collect()
            },
            |line| _ = black_box(serde_json::from_slice::<Value>(line).unwrap()),
        )
    });
    for size in BATCHES {
        let bodies: Vec<_> = events.chunks(size).map(body).collect();
        for format in FORMATS {
            row(format.name, size, &|| {
                packed(
                    || bodies.iter().map(|body| (format.press)(body)).collect(),
                    |pressed| _ = black_box((format.open)(pressed)),
                )
            });
        }
        row("batch", size, &|| batches(&events, size));
    }
    let start = thread_cpu();
    let encoded = encode(&events);
    let encoding = thread_cpu() - start;
    let start = thread_cpu();
    for encoding in encoded.iter() {
        black_box(AuditEvent::<&str>::decode(encoding).unwrap());
    }
    let decoding = thread_cpu() - start;
    let nanos = |time: Duration| time.as_nanos() / count as u128;
    println!(
        "\nBefore that, encoding: {} ns; after it, decoding: {} ns.",
        nanos(encoding),
        nanos(decoding)
    );
}

/// Entries of a stream, and what it took to make and to open them.
struct Packed {
    entries: Vec<Vec<u8>>,
    pressing: Duration,
    opening: Duration,
}

fn packed(press: impl FnOnce() -> Vec<Vec<u8>>, open: impl Fn(&[u8])) -> Packed {
    let start = thread_cpu();
    let entries = press();
    let pressing = thread_cpu() - start;
    let start = thread_cpu();
    entries.iter().for_each(|entry| open(entry));
    Packed {
        entries,
        pressing,
        opening: thread_cpu() - start,
    }
}

/// The figures of a row, for all events together.
fn round(packed: &Packed) -> [f64; 6] {
    let redis = through_redis(&packed.entries);
    let nanos = |time: Duration| time.as_nanos() as f64;
    [
        packed.entries.iter().map(Vec::len).sum::<usize>() as f64,
        nanos(packed.pressing),
        nanos(packed.opening),
        nanos(redis.adding),
        nanos(redis.taking),
        redis.bytes as f64,
    ]
}

/// What weir sends: numbered, chained, pressed, with a header and a checksum.
fn batches(events: &[AuditEvent], size: usize) -> Packed {
    let hasher = Hasher::new(Some(b"a key of thirty-two bytes, or so"));
    let now = Micros::from(clock::wall());
    let mut boot = Boot::new("weir-0".to_owned(), clock::uuid(clock::wall()), now, hasher);
    let mut encoded: Vec<_> = events.chunks(size).map(encode).collect();
    packed(
        || {
            let batches = encoded.chunks_mut(1);
            batches.map(|events| boot.pack(events, now, 0).1).collect()
        },
        |batch| _ = black_box(Batch::open(batch).unwrap()),
    )
}

fn encode(events: &[AuditEvent]) -> Encoded {
    let mut encoded = Encoded::default();
    events.iter().for_each(|event| encoded.push(event));
    encoded
}

/// As one would write it by hand: ids as text, and no field without a value.
fn json(event: &AuditEvent) -> Value {
    let mut value = serde_json::to_value(event).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.insert(
        "id".to_owned(),
        Uuid::from_bytes(event.id).to_string().into(),
    );
    let trace = event
        .trace_id
        .map(|id| Uuid::from_bytes(id).simple().to_string());
    fields.insert("trace_id".to_owned(), trace.into());
    fields.retain(|_, value| !value.is_null() && *value != Value::Array(Vec::new()));
    value
}

/// As a batch has it.
fn body(events: &[AuditEvent]) -> Vec<u8> {
    let mut encoded = encode(events);
    encoded.number(1);
    let mut body = Vec::new();
    encoded
        .iter()
        .for_each(|encoding| batch::put(&mut body, encoding));
    body
}

/// What a server spends on entries.
struct Spent {
    adding: Duration,
    /// To give them to a consumer of a group, take its word that they are stored, and delete them.
    taking: Duration,
    bytes: usize,
}

fn through_redis(entries: &[Vec<u8>]) -> Spent {
    let server = Server::single();
    let mut link = Link::to(&server);
    link.send(&[&[
        b"XGROUP",
        b"CREATE",
        STREAM.as_bytes(),
        b"g",
        b"0",
        b"MKSTREAM",
    ]]);
    let used = || {
        let info = server.cli(&["INFO", "memory"]);
        let line = info
            .text()
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"));
        line.unwrap().parse::<usize>().unwrap()
    };
    let (before, start) = (used(), process_cpu(server.pid()));
    let ids: Vec<_> = (1..=entries.len())
        .map(|n| format!("{n}-1").into_bytes())
        .collect();
    for (ids, entries) in ids.chunks(PIPELINE).zip(entries.chunks(PIPELINE)) {
        let commands = ids.iter().zip(entries);
        let commands = commands.map(|(id, entry)| [b"XADD", STREAM.as_bytes(), id, b"b", entry]);
        let commands: Vec<_> = commands.collect();
        let commands: Vec<&[&[u8]]> = commands.iter().map(|command| &command[..]).collect();
        link.send(&commands);
    }
    let added = process_cpu(server.pid());
    let bytes = used() - before;
    let (took, many) = (process_cpu(server.pid()), PIPELINE.to_string());
    for ids in ids.chunks(PIPELINE) {
        link.send(&[&[
            b"XREADGROUP",
            b"GROUP",
            b"g",
            b"c",
            b"COUNT",
            many.as_bytes(),
            b"STREAMS",
            STREAM.as_bytes(),
            b">",
        ]]);
        let mut ack: Vec<&[u8]> = vec![b"XACK", STREAM.as_bytes(), b"g"];
        let mut delete: Vec<&[u8]> = vec![b"XDEL", STREAM.as_bytes()];
        ack.extend(ids.iter().map(Vec::as_slice));
        delete.extend(ids.iter().map(Vec::as_slice));
        link.send(&[&ack, &delete]);
    }
    assert_eq!(server.cli(&["XLEN", STREAM]).int(), 0);
    Spent {
        adding: added - start,
        taking: process_cpu(server.pid()) - took,
        bytes,
    }
}
