//! What the spool costs: `cargo bench --bench spool [-- FOLDER]`; the folder is to be on the disk in question.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use weir::clock;
use weir::store::spool::Spool;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.find(|argument| !argument.starts_with("--"));
    let folder = folder.map_or_else(std::env::temp_dir, Into::into);
    // `cargo test` wants to know that it works, in seconds.
    let whole = std::env::args().any(|argument| argument == "--bench");
    let lasts = Duration::from_millis(if whole { 1_000 } else { 10 });
    let root = folder.join(format!("weir-spool-cost-{}", std::process::id()));
    let measured = measure(&root, lasts);
    std::fs::remove_dir_all(&root)?;
    measured
}

fn measure(root: &Path, lasts: Duration) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(
        out,
        "| payload | group | records/s | MB/s | append | sync, median | sync, 99 % |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for size in [64, 1_000, 20_000] {
        for group in [1, 10, 100, 1_000] {
            let row = row(root, size, group, lasts)?;
            writeln!(out, "{row}")?;
        }
    }
    Ok(())
}

/// Appends and syncs in groups for so long, and releases each group once it is synced.
fn row(root: &Path, size: usize, group: usize, lasts: Duration) -> anyhow::Result<String> {
    let (mut spool, _) = Spool::open(root, 256 << 20, clock::uuid(clock::wall()))?;
    let payload: Vec<u8> = (0..size).map(|at| at as u8).collect();
    let mut appending = Duration::ZERO;
    let mut syncs = Vec::new();
    let mut places = Vec::new();
    let start = clock::now();
    while start.elapsed() < lasts {
        let before = clock::now();
        for _ in 0..group {
            places.push(spool.append(&payload)?);
        }
        let appended = clock::now();
        appending += appended - before;
        spool.sync()?;
        syncs.push(since(appended));
        places
            .drain(..)
            .try_for_each(|place| spool.release(place))?;
    }
    let records = (syncs.len() * group) as f64;
    let rate = records / since(start).as_secs_f64();
    spool.remove()?;
    syncs.sort_unstable();
    Ok(format!(
        "| {size} B | {group} | {rate:.0} | {:.1} | {:.2} µs | {:?} | {:?} |",
        rate * size as f64 / 1e6,
        appending.as_secs_f64() * 1e6 / records,
        syncs[syncs.len() / 2],
        syncs[syncs.len() * 99 / 100],
    ))
}

fn since(start: Instant) -> Duration {
    clock::now() - start
}
