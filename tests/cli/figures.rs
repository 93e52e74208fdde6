//! Figures of docs/ are those of the pages in benches/, rounded as the reader sees them, and its bounds those of the code.

use std::fs;
use std::path::Path;

const AUDIT: &str = include_str!("../../benches/AUDIT.md");
const LIMITS: &str = include_str!("../../benches/LIMITS.md");
const LANE: &str = include_str!("../../benches/LANE.md");
const RESULTS: &str = include_str!("../../benches/RESULTS.md");
const SCALE: &str = include_str!("../../benches/SCALE.md");
const SHARED: &str = include_str!("../../benches/SHARED.md");

const KUBERNETES: &str = include_str!("../../docs/kubernetes.md");
const OVERLOAD: &str = include_str!("../../docs/overload.md");
const SHARED_STATE: &str = include_str!("../../docs/shared-state.md");
const VALUES: &str = include_str!("../../charts/weir/values-production.yaml");

/// The figure in the first row of this name, of the first table of the `page` that has this column.
fn figure(page: &str, row: &str, column: &str) -> f64 {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let mut at = None;
    for line in page.lines() {
        let cells = cells(line);
        if let Some(found) = cells.iter().position(|cell| cell == column) {
            at = Some(found);
        } else if let Some(at) = at.filter(|_| cells[0] == row) {
            let figure = cells[at].split(' ').next().unwrap().replace(',', "");
            return figure.parse().unwrap();
        }
    }
    panic!("{row}, {column}");
}

#[test]
fn figures_of_the_docs_are_those_that_were_measured() {
    let says = |doc: &str, text: String| assert!(doc.contains(&text), "{text}");
    let (at_once, paced) = LANE.split_once("## At a pace").unwrap();
    let cpu = |page, row| figure(page, row, "weir proxy, CPU µs a request");
    let [plain, best, safe] =
        ["not audited", "best effort", "guaranteed"].map(|it| cpu(at_once, it));
    says(
        KUBERNETES,
        format!("| a request, not audited | {plain:.1} µs"),
    );
    says(KUBERNETES, format!("`best_effort` | {best:.1} µs"));
    says(
        KUBERNETES,
        format!(
            "`guaranteed` | {safe:.1} µs flat out, {:.0} at 12,000 a second",
            cpu(paced, "guaranteed")
        ),
    );
    says(
        VALUES,
        format!(
            "some {:.0} µs audited under best effort",
            cpu(paced, "best effort")
        ),
    );
    says(
        VALUES,
        format!(
            "guaranteed {:.0} where 12,000 a second",
            cpu(paced, "guaranteed")
        ),
    );

    let calls = figure(SHARED, "weir", "Redis calls per 100");
    says(
        KUBERNETES,
        format!("| {calls:.3} calls of Redis in 100 requests"),
    );
    let cold = |column| figure(SHARED, "weir, strict, 10,000 keys", column);
    let together = cold("with its Redis, CPU µs") - cold("CPU µs a request");
    says(
        SHARED_STATE,
        format!("costs one server some {together:.0} µs a request"),
    );
    let by_itself = figure(
        LIMITS,
        "strict, 10,000 keys, 64 callers",
        "Redis CPU µs a decision",
    );
    says(
        SHARED_STATE,
        format!("{by_itself:.0} µs over all its nodes"),
    );
    let idle = figure(RESULTS, "weir", "KiB a connection");
    let at_rest = figure(RESULTS, "weir", "RSS before any load, MiB");
    says(
        KUBERNETES,
        format!("a connection that is kept, idle | {idle:.2} KiB"),
    );
    says(
        VALUES,
        format!("{at_rest:.0} MiB, {idle:.2} KiB for each connection"),
    );
    let request = |section: &str| {
        let (_, behind) = RESULTS.split_once(section).unwrap();
        figure(behind, "weir", "CPU µs a request")
    };
    let (refused, served) = (request("\n## refusal\n"), request("\n## plain\n"));
    says(
        OVERLOAD,
        format!("({refused:.1} µs and {served:.1} in benches/RESULTS.md)"),
    );

    let kept =
        |row| ["bytes each of those", "bytes each in Redis"].map(|it| figure(SCALE, row, it));
    let [key, key_in_redis] = kept("keys of a token bucket");
    let [session, session_in_redis] = kept("sessions");
    let session = session / 1024.0;
    says(
        KUBERNETES,
        format!("| {key} bytes in the process, {key_in_redis} in Redis"),
    );
    says(
        KUBERNETES,
        format!(
            "| {session:.1} KiB in each process that remembers it, {session_in_redis} bytes in Redis"
        ),
    );
    says(VALUES, format!("{key} bytes for each key of a limit"));
    says(VALUES, format!("{session:.1} KiB for each session"));
    says(
        VALUES,
        format!("{session_in_redis} bytes a session and {key_in_redis} a counter"),
    );

    let rows = [
        "best effort, flat out",
        "guaranteed, 12,000/s",
        "guaranteed, 1,000/s",
    ];
    let [full, some, alone] = rows.map(|row| figure(AUDIT, row, "B in Postgres"));
    says(
        KUBERNETES,
        format!("| {full} bytes in batches of 186, {some} in batches of 13, {alone} where each"),
    );
    let [full, some, alone] = rows.map(|row| figure(AUDIT, row, "Postgres"));
    says(
        KUBERNETES,
        format!("{full:.1} to {some:.1} µs of CPU, {alone:.0} where 1,000 a second come"),
    );
    let ingested = (figure(AUDIT, "best effort, 150,000/s", "events/s") / 1_000.0).round();
    says(
        KUBERNETES,
        format!("| {ingested},000 events a second without falling behind"),
    );
    says(
        VALUES,
        format!("{ingested},000 events a second from one worker"),
    );
}

/// A file of the source, a constant of it as it stands there, a page, and what that says by it.
const BOUNDS: &str = "
admin/mod.rs | MAX_BODY: usize = 64 * 1024 | reference | JSON of at most 64 KiB
admin/audit.rs | PAGE: u32 = 100 | audit | 1 to 1000; default 100
admin/audit.rs | LARGEST_PAGE: u32 = 1_000 | audit | 1 to 1000; default 100
admin/audit.rs | SEARCH: Duration = Duration::from_secs(25) | audit | 25s by default, and at most
admin/sessions.rs | PAGE: usize = 100 | reference | `limit` is 100 by default, 1,000 at most
admin/sessions.rs | LARGEST_PAGE: usize = 1_000 | reference | `limit` is 100 by default, 1,000 at most
audit/mod.rs | BYTES: u64 = 32 << 20 | audit | up to 50,000 events or 32 MiB of them
cli/run/stores.rs | AUDIT_QUEUE: usize = 50_000 | audit | up to 50,000 events or 32 MiB of them
audit/ship.rs | MEMORY: usize = 32 << 20 | audit | up to 32 MiB of packed events
audit/ship.rs | PAUSE: Duration = Duration::from_millis(1) | audit | the next begins a millisecond or more after it began
audit/ship.rs | SIBLINGS: usize = 3 | audit | three or more share a sync
audit/upkeep.rs | DOUBT: Duration = Duration::from_secs(600) | configuration | waits ten minutes before it removes anything
background/ingest/beyond.rs | EVERY: Duration = Duration::from_secs(15) | configuration | within some 15 s
background/supervise.rs | MOST: u32 = 12 | health | fails twelve times in a row
cli/client.rs | WITHIN: Duration = Duration::from_secs(5) | health | exits 0 or 1 within 5 s
cli/reload.rs | LOOK_EVERY: Duration = Duration::from_secs(1) | configuration | the same at two looks, a second apart
cli/reload.rs | WRITTEN_AGO: Duration = Duration::from_secs(1) | configuration | written more than a second ago
cli/reload.rs | GONE_FOR: u32 = 3 | tls | or missing for 3 s
cli/run.rs | AUDIT_WITHIN: Duration = Duration::from_secs(5) | audit | then an end mark, for up to 5 s
cli/webhook.rs | MAX_BODY: usize = 3 << 20 | inject | A review is at most 3 MiB
cli/webhook.rs | WITHIN: Duration = Duration::from_secs(8) | inject | has 8 s to come
cli/webhook.rs | MAX_BODIES: usize = 8 | inject | 8 are taken in at a time
cli/webhook.rs | MAX_CONNECTIONS: usize = 1000 | security | 8 at a time, and 1,000 connections
clock.rs | JITTER: f64 = 0.1 | protocols | less up to a tenth by chance
http1/hygiene.rs | MAX_CONNECTION_OPTIONS: usize = 32 | security | name more than 32 options is refused
http1/proxy_protocol.rs | MAX_BLOCK: usize = 8192 | ways-in | a header is at most 8 KiB
inject/given.rs | MAX_TEXT: usize = 64 << 10 | inject | It is at most 64 KiB
inject/review.rs | MAX_VALUES: usize = 20_000 | inject | 3 MiB and 20,000 JSON values
net/any.rs | BESIDE_AFTER: Duration = Duration::from_millis(250) | upstreams | the next one after 250 ms or a failure
net/descriptors.rs | LEFT: u64 = 64 | runbook | The last 64, or a sixteenth of what there are
net/descriptors.rs | PART: u64 = 16 | runbook | The last 64, or a sixteenth of what there are
net/names.rs | LONGEST: Duration = Duration::from_secs(10) | upstreams | its TTL, of 1 to 10 s
net/names.rs | PATIENCE: Duration = Duration::from_millis(250) | upstreams | takes more than 250 ms
net/resolve.rs | SOONEST: Duration = Duration::from_secs(1) | upstreams | their TTL, of a second at least
net/resolve.rs | GONE_AFTER: u32 = 3 | upstreams | say three times in a row
net/turn.rs | PAUSE: Duration = Duration::from_millis(2) | tls | once 2 ms are over since the last
net/window.rs | MOST: u32 = 2 * 1024 * 1024 | protocols | up to 2 MiB
net/window.rs | FAR: Duration = Duration::from_millis(5) | protocols | a round trip of 5 ms or more
plan/make.rs | SERIES_OF_A_ROUTE: usize = 26 | configuration | some 26 each
policy/breaker/shared.rs | REPORT_EVERY: Duration = Duration::from_millis(100) | shared-breakers | every 100 ms, and at once
policy/breaker/shared.rs | IDLE_REPORT_EVERY: Duration = Duration::from_secs(1) | shared-breakers | within 1 s where it had no call for 2 s
policy/breaker/shared.rs | IDLE_AFTER: Duration = Duration::from_secs(2) | shared-breakers | within 1 s where it had no call for 2 s
policy/breaker/shared.rs | LOST_AFTER: Duration = Duration::from_secs(1) | shared-breakers | A second without an answer
policy/lease.rs | REMEMBERED: Duration = Duration::from_secs(1) | shared-state | and for a second at most
policy/outlier.rs | MAX_EJECTION: Duration = Duration::from_secs(300) | upstreams | up to 5 minutes
policy/peers.rs | FEWER_FOR: Duration = Duration::from_secs(5) | shared-state | once Redis has told it for five seconds
policy/shed.rs | WINDOW: Duration = Duration::from_millis(100) | overload | the least of each 100 ms
policy/shed.rs | FEWEST: u32 = 3 | overload | of three measures at least
policy/shed.rs | MOST: f64 = 0.9 | overload | a growing share, 90 % at most
policy/shed.rs | MEMORY_RAMP: f64 = 0.05 | overload | all from 5 % above it on
proxy/any_version/kept.rs | UNSEEN: usize = 16 * 1024 | upstreams | Up to 16 KiB of a body
proxy/exchange.rs | MOST_SKIPPED: u32 = 64 * 1024 | configuration | body of up to 64 KiB
proxy/greet.rs | TURN: Duration = Duration::from_secs(1) | tls | loses it after a second
proxy/http1.rs | LINGER: Duration = Duration::from_secs(30) | protocols | for up to 30 s with pauses of up to 5 s
proxy/http1.rs | LINGER_PAUSE: Duration = Duration::from_secs(5) | protocols | for up to 30 s with pauses of up to 5 s
proxy/http1.rs | SKIPPED_WITHIN: Duration = Duration::from_secs(5) | configuration | within that time and 5 s at most
proxy/http2.rs | STREAM_WINDOW: u32 = 64 * 1024 | protocols | 256 KiB of a response and 64 KiB of a request
upstream/http2.rs | STREAM_WINDOW: u32 = 256 * 1024 | protocols | 256 KiB of a response and 64 KiB of a request
proxy/http2.rs | SMALL_FRAMES: usize = 8 * 1024 * 1024 | protocols | 32 MiB of an upstream's or 8 MiB of a client's
upstream/http2.rs | SMALL_FRAMES: usize = 32 * 1024 * 1024 | protocols | 32 MiB of an upstream's or 8 MiB of a client's
upstream/http2.rs | PINGS: u8 = 2 | protocols | no more than twice between two answers
proxy/http2.rs | RESETS: usize = 100 | protocols | more than 100 times
proxy/http2.rs | REST_WITHIN: Duration = Duration::from_secs(5) | protocols | up to 64 KiB in 5 s
proxy/idle_closing.rs | LAST_CALL: Duration = Duration::from_secs(1) | restarts | are idle close a second after its beginning
proxy/interim.rs | MAX_TOLD: usize = 16 | protocols | up to 16 of them
proxy/interim.rs | MAX_BYTES: usize = 16 * 1024 | protocols | up to 16 KiB of them all
proxy/outbox.rs | SAFE_WITHIN: Duration = Duration::from_secs(5) | audit | cannot be made safe within 5 s
proxy/sessions.rs | TOKENS: usize = 16 | sessions | more than 16 tokens
proxy/upgrade.rs | CLOSE_WITHIN: Duration = Duration::from_secs(2) | configuration | After two seconds it is cut off
proxy/wire.rs | SHARE: usize = 128 * 1024 | overload | a body of more than 128 KiB
store/fleet.rs | DEAD_AFTER: Duration = Duration::from_secs(5) | shared-state | once a second and counts as dead after five
store/limits/mod.rs | SHARED_BYTES: u64 = 400 | configuration | 500 bytes a key with `redis` and 100 without
store/redis/joined.rs | MOST: usize = 32 | shared-state | one call for up to 32 keys
store/spool/folder.rs | PATIENCE: Duration = Duration::from_secs(600) | audit | for ten minutes from when it is missed
";

/// What a bound does is for the tests of its place; here, that the page names the one that there is.
#[test]
fn bounds_that_the_docs_name_are_those_of_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: String| {
        let text = fs::read_to_string(root.join(&path)).unwrap();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let (mut held, mut wrong) = (0, Vec::new());
    for line in BOUNDS.trim().lines() {
        let [source, constant, page, says] = line.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let code = read(format!("src/{source}"));
        let page = read(format!("docs/{page}.md"));
        if code.contains(&format!("const {constant};")) && page.contains(says) {
            held += 1;
        } else {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(held > 70);
}
