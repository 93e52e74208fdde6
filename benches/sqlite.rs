//! What a row of the audit costs in SQLite: `cargo bench --bench sqlite`.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use weir::clock;
use weir::event::{AuditEvent, Encoded, Micros};
use weir::store::audit::Filter;
use weir::store::audit::chain::Keys;
use weir::store::audit::days::{self, Day};
use weir::store::sqlite::{Reader, Writer};

const BATCH: u32 = 500;

fn main() -> anyhow::Result<()> {
    // `cargo test` wants to know that it works, in seconds.
    let whole = std::env::args().any(|argument| argument == "--bench");
    let count = if whole { 1_000 } else { 100 };
    let mut out = std::io::stdout();
    for key in [None, Some(b"a key of thirty-two bytes, or so".as_slice())] {
        let path = std::env::temp_dir().join(format!("weir-audit-cost-{}.db", std::process::id()));
        let now = clock::wall();
        let file = days::file(&path, Day::of(now));
        let mut writer = Writer::open(&path, "cost", key, now)?;
        let mut batches = (0..100).map(batch).collect::<Vec<_>>();
        let start = clock::now();
        for batch in (0..batches.len()).cycle().take(count as usize) {
            writer.append(&mut batches[batch..=batch], now)?;
        }
        let row = start.elapsed() / (count * BATCH);
        let size = std::fs::metadata(&file)?.len() / u64::from(count * BATCH);
        let start = clock::now();
        let report = Reader::open(&path)?.verify(&Keys::new(key.as_slice()))?;
        let verified = start.elapsed() / (count * BATCH);
        let user = || -> anyhow::Result<Duration> {
            let start = clock::now();
            let filter = Filter {
                user: Some("user-7-9".to_owned()),
                ..Filter::default()
            };
            let found = Reader::open(&file)?.query(&filter)?.len();
            anyhow::ensure!(found == count as usize / 100, "{found} events of the user");
            Ok(start.elapsed())
        };
        let scanned = user()?;
        let start = clock::now();
        let filter = Filter {
            path_prefix: Some("/v2/".to_owned()),
            ..Filter::default()
        };
        let found = Reader::open(&file)?.query(&filter)?.len();
        anyhow::ensure!(found == 0, "{found} events of another path");
        let by_path = start.elapsed();
        let tomorrow = now + Duration::from_secs(86_400);
        writer.append(&mut batches[..1], tomorrow)?;
        let start = clock::now();
        writer.files().close_days(|_| {})?;
        let closed = start.elapsed();
        let indexed = user()?;
        let closed_size = std::fs::metadata(&file)?.len() / u64::from(count * BATCH);
        // What docs/kubernetes.md and the chart's notes go by.
        anyhow::ensure!((380..=420).contains(&closed_size), "{closed_size} B a row");
        let keyed = key.is_some();
        writeln!(
            out,
            "keyed {keyed}: append {row:?} a row of {size} B; verify {verified:?}; faults {}; \
             day closed in {closed:?}, {closed_size} B a row; one user's events {scanned:?} before and {indexed:?} after; \
             a path's {by_path:?}",
            report.faults.len()
        )?;
        drop(writer);
        std::fs::remove_file(file)?;
        std::fs::remove_file(days::file(&path, Day::of(tomorrow)))?;
    }
    Ok(())
}

fn batch(number: u32) -> Encoded {
    let mut batch = Encoded::default();
    for n in 0..BATCH {
        batch.push(&event(number, n));
    }
    batch
}

fn event(batch: u32, n: u32) -> AuditEvent {
    AuditEvent {
        time: Micros::from(clock::wall()),
        id: [7; 16],
        seq: 0,
        route: Some("payments".into()),
        upstream: Some("app".into()),
        endpoint: Some("http://127.0.0.1:3000".into()),
        client: IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n)),
        user: Some(format!("user-{batch}-{n}")),
        method: "GET".into(),
        host: "api.example.com".into(),
        path: format!("/v1/payments/{n}"),
        query: Some("page=1&token=***".into()),
        status: 200,
        label: None,
        limits: ["per_user: ok".into()].into_iter().collect(),
        breaker: Some("closed".into()),
        bytes_in: 120,
        bytes_out: 1024,
        duration: Micros(1500),
        upstream_duration: Some(Micros(1300)),
        request_id: Some("0198b1e2-7c00-7000-8000-000000000000".into()),
        trace_id: Some([9; 16]),
        headers: vec![("user-agent".into(), "curl/8.5.0".into())],
    }
}
