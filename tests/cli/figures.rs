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

/// A file, what stands there, a page, and what that says by it.
const BOUNDS: &str = "
src/admin/mod.rs | const MAX_BODY: usize = 64 * 1024; | reference | JSON of at most 64 KiB
src/admin/audit.rs | const PAGE: u32 = 100; | audit | 1 to 1000; default 100
src/admin/audit.rs | const LARGEST_PAGE: u32 = 1_000; | audit | 1 to 1000; default 100
src/admin/audit.rs | const SEARCH: Duration = Duration::from_secs(25); | audit | 25s by default, and at most
src/admin/sessions.rs | const PAGE: usize = 100; | reference | `limit` is 100 by default, 1,000 at most
src/admin/sessions.rs | const LARGEST_PAGE: usize = 1_000; | reference | `limit` is 100 by default, 1,000 at most
src/audit/mod.rs | const BYTES: u64 = 32 << 20; | audit | up to 50,000 events or 32 MiB of them
src/cli/run/stores.rs | const AUDIT_QUEUE: usize = 50_000; | audit | up to 50,000 events or 32 MiB of them
src/audit/ship.rs | const MEMORY: usize = 32 << 20; | audit | up to 32 MiB of packed events
src/audit/ship.rs | const PAUSE: Duration = Duration::from_millis(1); | audit | the next begins a millisecond or more after it began
src/audit/ship.rs | const SIBLINGS: usize = 3; | audit | three or more share a sync
src/audit/upkeep.rs | const DOUBT: Duration = Duration::from_secs(600); | configuration | waits ten minutes before it removes anything
src/background/ingest/beyond.rs | const EVERY: Duration = Duration::from_secs(15); | configuration | within some 15 s
src/background/supervise.rs | const MOST: u32 = 12; | health | fails twelve times in a row
src/cli/client.rs | const WITHIN: Duration = Duration::from_secs(5); | health | exits 0 or 1 within 5 s
src/cli/watched_files.rs | const LOOK_EVERY: Duration = Duration::from_secs(1); | configuration | the same at two looks, a second apart
src/cli/watched_files.rs | const WRITTEN_AGO: Duration = Duration::from_secs(1); | configuration | written more than a second ago
src/cli/watched_files.rs | const GONE_FOR: u32 = 3; | tls | or missing for 3 s
src/cli/run.rs | const AUDIT_WITHIN: Duration = Duration::from_secs(5); | audit | then an end mark, for up to 5 s
src/cli/webhook.rs | const MAX_BODY: usize = 3 << 20; | inject | A review is at most 3 MiB
src/cli/webhook.rs | const WITHIN: Duration = Duration::from_secs(8); | inject | has 8 s to come
src/cli/webhook.rs | const MAX_BODIES: usize = 8; | inject | 8 are taken in at a time
src/cli/webhook.rs | const MAX_CONNECTIONS: usize = 1000; | security | 8 at a time, and 1,000 connections
src/clock.rs | const JITTER: f64 = 0.1; | protocols | less up to a tenth by chance
src/http1/hygiene.rs | const MAX_CONNECTION_OPTIONS: usize = 32; | security | name more than 32 options is refused
src/http1/proxy_protocol.rs | const MAX_BLOCK: usize = 8192; | ways-in | a header is at most 8 KiB
src/inject/given.rs | const MAX_TEXT: usize = 64 << 10; | inject | It is at most 64 KiB
src/inject/review.rs | const MAX_VALUES: usize = 20_000; | inject | 3 MiB and 20,000 JSON values
src/net/any.rs | const BESIDE_AFTER: Duration = Duration::from_millis(250); | upstreams | the next one after 250 ms or a failure
src/net/descriptors.rs | const LEFT: u64 = 64; | runbook | The last 64, or a sixteenth of what there are
src/net/descriptors.rs | const PART: u64 = 16; | runbook | The last 64, or a sixteenth of what there are
src/net/names.rs | const LONGEST: Duration = Duration::from_secs(10); | upstreams | its TTL, of 1 to 10 s
src/net/names.rs | const PATIENCE: Duration = Duration::from_millis(250); | upstreams | takes more than 250 ms
src/net/resolve.rs | const SOONEST: Duration = Duration::from_secs(1); | upstreams | their TTL, of a second at least
src/net/resolve.rs | const GONE_AFTER: u32 = 3; | upstreams | say three times in a row
src/net/turn.rs | const PAUSE: Duration = Duration::from_millis(2); | tls | once 2 ms are over since the last
src/net/window.rs | const MOST: u32 = 2 * 1024 * 1024; | protocols | up to 2 MiB
src/net/window.rs | const FAR: Duration = Duration::from_millis(5); | protocols | a round trip of 5 ms or more
src/plan/make.rs | const SERIES_OF_A_ROUTE: usize = 26; | configuration | some 26 each
src/policy/breaker/shared.rs | const REPORT_EVERY: Duration = Duration::from_millis(100); | shared-breakers | every 100 ms, and at once
src/policy/breaker/shared.rs | const IDLE_REPORT_EVERY: Duration = Duration::from_secs(1); | shared-breakers | within 1 s where it had no call for 2 s
src/policy/breaker/shared.rs | const IDLE_AFTER: Duration = Duration::from_secs(2); | shared-breakers | within 1 s where it had no call for 2 s
src/policy/breaker/shared.rs | const LOST_AFTER: Duration = Duration::from_secs(1); | shared-breakers | A second without an answer
src/policy/lease.rs | const REMEMBERED: Duration = Duration::from_secs(1); | shared-state | and for a second at most
src/policy/outlier.rs | const MAX_EJECTION: Duration = Duration::from_secs(300); | upstreams | up to 5 minutes
src/policy/peers.rs | const FEWER_FOR: Duration = Duration::from_secs(5); | shared-state | once Redis has told it for five seconds
src/policy/shed.rs | const WINDOW: Duration = Duration::from_millis(100); | overload | the least of each 100 ms
src/policy/shed.rs | const FEWEST: u32 = 3; | overload | of three measures at least
src/policy/shed.rs | const MOST: f64 = 0.9; | overload | a growing share, 90 % at most
src/policy/shed.rs | const MEMORY_RAMP: f64 = 0.05; | overload | all from 5 % above it on
src/proxy/any_version/kept.rs | const UNSEEN: usize = 16 * 1024; | upstreams | Up to 16 KiB of a body
src/proxy/exchange.rs | const MOST_SKIPPED: u32 = 64 * 1024; | configuration | body of up to 64 KiB
src/proxy/greet.rs | const TURN: Duration = Duration::from_secs(1); | tls | loses it after a second
src/proxy/http1.rs | const LINGER: Duration = Duration::from_secs(30); | protocols | for up to 30 s with pauses of up to 5 s
src/proxy/http1.rs | const LINGER_PAUSE: Duration = Duration::from_secs(5); | protocols | for up to 30 s with pauses of up to 5 s
src/proxy/http1.rs | const SKIPPED_WITHIN: Duration = Duration::from_secs(5); | configuration | within that time and 5 s at most
src/proxy/http2.rs | const STREAM_WINDOW: u32 = 64 * 1024; | protocols | 256 KiB of a response and 64 KiB of a request
src/upstream/http2.rs | const STREAM_WINDOW: u32 = 256 * 1024; | protocols | 256 KiB of a response and 64 KiB of a request
src/proxy/http2.rs | const SMALL_FRAMES: usize = 8 * 1024 * 1024; | protocols | 32 MiB of an upstream's or 8 MiB of a client's
src/upstream/http2.rs | const SMALL_FRAMES: usize = 32 * 1024 * 1024; | protocols | 32 MiB of an upstream's or 8 MiB of a client's
src/upstream/http2.rs | const PINGS: u8 = 2; | protocols | no more than twice between two answers
src/proxy/http2.rs | const RESETS: usize = 100; | protocols | more than 100 times
src/proxy/http2.rs | const REST_WITHIN: Duration = Duration::from_secs(5); | protocols | up to 64 KiB in 5 s
src/proxy/idle_closing.rs | const LAST_CALL: Duration = Duration::from_secs(1); | restarts | are idle close a second after the drain's beginning
src/proxy/interim.rs | const MAX_TOLD: usize = 16; | protocols | up to 16 of them
src/proxy/interim.rs | const MAX_BYTES: usize = 16 * 1024; | protocols | up to 16 KiB of them all
src/proxy/outbox.rs | const SAFE_WITHIN: Duration = Duration::from_secs(5); | audit | cannot be made safe within 5 s
src/proxy/sessions.rs | const TOKENS: usize = 16; | sessions | more than 16 tokens
src/proxy/upgrade.rs | const CLOSE_WITHIN: Duration = Duration::from_secs(2); | configuration | After two seconds it is cut off
src/proxy/wire.rs | const SHARE: usize = 128 * 1024; | overload | a body of more than 128 KiB
src/store/fleet.rs | const DEAD_AFTER: Duration = Duration::from_secs(5); | shared-state | once a second and counts as dead after five
src/store/limits/mod.rs | const SHARED_BYTES: u64 = 400; | configuration | 500 bytes a key with `redis` and 100 without
src/store/limits/mod.rs | const COUNTER_BYTES: u64 = 100; | configuration | 500 bytes a key with `redis` and 100 without
src/store/redis/joined.rs | const MOST: usize = 32; | shared-state | one call for up to 32 keys
src/store/spool/folder.rs | const PATIENCE: Duration = Duration::from_secs(600); | audit | for ten minutes from when it is missed
src/admin/health/machine.rs | free < share(2) && free < GIB || free < 16 * MIB | health | less than 2 % and 1 GiB, or less than 16 MiB
src/admin/health/machine.rs | free < share(10) && free < 10 * GIB || free < GIB.min(total / 2) | health | less than 10 % and 10 GiB are free, or less than 1 GiB (than half, of a disk below 2 GiB)
src/background/supervise.rs | first: Duration::from_millis(100), longest: Duration::from_secs(30), | health | 100 ms at first and up to 30 s later
src/proxy/lane.rs | before < max + max.div_ceil(8) | overload | An eighth more than `max_connections` may be open
src/admin/mod.rs | LogRateLimit::new(5) | reference | five in ten seconds
src/config/check/limits.rs | const SHORT_LIMIT: &str = \"rate_limit\"; | configuration | one limit on every request (its name is `rate_limit`)
lua/breaker_force.lua | redis.call('PEXPIRE', KEYS[1], 30 * DAY) | shared-breakers | for 30 days if none lives
lua/breaker_sync.lua | DEAD_AFTER, DOUBT_FOR, WANTED_FOR, OTHERS_WITHIN = 86400000, 5000, 3000, 1000, 3000 | shared-breakers | 5 s past the last report
lua/breaker_sync.lua | DEAD_AFTER, DOUBT_FOR, WANTED_FOR, OTHERS_WITHIN = 86400000, 5000, 3000, 1000, 3000 | shared-breakers | 3 s past the last that does
lua/breaker_sync.lua | DEAD_AFTER, DOUBT_FOR, WANTED_FOR, OTHERS_WITHIN = 86400000, 5000, 3000, 1000, 3000 | shared-breakers | 3 s after half-open began
src/event.rs | pub const LONGEST: usize = 4 * 1024; | audit | the first 4 KiB are kept
src/cli/audit.rs | default_value_t = 100)] limit: u32 | audit | shows the newest 100 events
src/cli/audit.rs | default_value_t = 10)] lines: u32 | audit | `tail` the newest 10
src/audit/send.rs | const LOOK: Duration = Duration::from_secs(1); | audit | weir asks the streams each second
src/background/ingest/gather.rs | self.worker.claim_after / 4 | audit | within a quarter of `worker.claim_after`
src/store/postgres/verify.rs | now() - interval '5 minutes' | audit | made in the last 5 minutes
src/store/redis/node.rs | const SUSPECT_AFTER: u32 = 4; | shared-state | After four calls in a row without an answer
src/store/redis/node.rs | const PING_EVERY: Duration = Duration::from_secs(1); | shared-state | it is pinged each second while it works
src/store/redis/push.rs | const PING_EVERY: Duration = Duration::from_millis(500); | sessions | notices within half a second
src/store/redis/refusals.rs | const COUNTS_FOR: Duration = Duration::from_secs(10); | health | refused within the last ten seconds
src/store/limits/overrides.rs | const KEPT: Duration = Duration::from_secs(30 * 86_400); | shared-state | 30 days after the last look
src/store/limits/leases.rs | const SHARED_AFTER: Duration = Duration::from_secs(1); | shared-state | at least a second after the last failure
src/store/limits/leases.rs | const TOLD_FOR: Duration = Duration::from_secs(60); | shared-state | after a minute without a further failure
lua/slots.lua | local LATE = 2000 | shared-state | or 2 s once none is taken
lua/process_beat.lua | redis.call('PEXPIRE', KEYS[1], 60000) | shared-state | a minute past the last beat
src/store/fleet.rs | const READY_WITHIN: Duration = Duration::from_millis(500); | shared-breakers | half a second at most
src/policy/breaker/shared.rs | pub const HOLD: Duration = Duration::from_secs(3); | shared-breakers | `probe_timeout` and 4 s after it was last heard
src/policy/breaker/shared.rs | pub const SLOT_GRACE: Duration = Duration::from_secs(1); | shared-breakers | `probe_timeout` and 4 s after it was last heard
src/admin/sessions.rs | const WITHIN: Duration = Duration::from_secs(1); | sessions | answers 503 once Redis has not answered for a second
src/proxy/sessions.rs | const LOOK_AGAIN: Duration = Duration::from_secs(1); | sessions | They are looked at each second then
src/proxy/shed.rs | const TICK: Duration = Duration::from_millis(20); | overload | measures 50 times a second
src/proxy/shed.rs | const MEMORY_EVERY: Duration = Duration::from_millis(250); | overload | four times a second
src/policy/gradient.rs | const DIP: f64 = 0.7; | upstreams | 70 % of those under way
src/policy/gradient.rs | const DIP_EVERY: u32 = 50; | upstreams | About every 5 s
src/policy/gradient.rs | f64::from(20_u32.clamp | upstreams | beginning with 20
src/upstream/adaptive.rs | const WINDOW: Duration = Duration::from_millis(100); | upstreams | fewer requests through for 100 ms
src/config/check/runtime.rs | NonZeroUsize::new(4096) | configuration | Threads that serve, up to 4096
src/cli/await.rs | default_value = \"2m\" | health | after 2 min
src/main.rs | default_missing_value = \"2m\" | kubernetes | and after 2 min
src/cli/webhook.rs | const PATIENCE: Duration = Duration::from_secs(1); | inject | that has waited for 1 s
deploy/prometheus/rules.yaml | time() < 14 * 86400 | runbook | less than 14 days left, and less than a quarter of its time
deploy/prometheus/rules.yaml | not_before_timestamp_seconds) < 0.25 | runbook | less than 14 days left, and less than a quarter of its time
deploy/prometheus/rules.yaml | time() < 2 * 86400 | runbook | less than 2 days, and a tenth
deploy/prometheus/rules.yaml | not_before_timestamp_seconds) < 0.1 | runbook | less than 2 days, and a tenth
deploy/prometheus/rules.yaml | weir_audit_disk_free_bytes < 10737418240 and weir_audit_disk_free_bytes / weir_audit_disk_bytes < 0.1 | runbook | has less than 10 % and 10 GiB left
deploy/prometheus/rules.yaml | process_resident_memory_bytes / (weir_memory_limit_bytes > 0) > 0.9 | runbook | The process has 90 % of what its control group allows
deploy/prometheus/rules.yaml | 3600 * rate(weir_limit_keys_evicted_total[5m]) > weir_limit_keys_max | runbook | make room for others within an hour
deploy/prometheus/rules.yaml | max by (namespace, job) (weir_ingest_lag_seconds) > 300 | runbook | the oldest event is more than 5 minutes behind
";

/// What a bound does is for the tests of its place; here, that the page names the one that there is. Whoever writes either in another way
/// writes its row so, too.
#[test]
fn bounds_that_the_docs_name_are_those_of_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: String| {
        let text = fs::read_to_string(root.join(&path)).unwrap();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let mut wrong = Vec::new();
    for line in BOUNDS.trim().lines() {
        let [source, bound, page, says] = line.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let code = read(source.to_owned());
        let page = read(format!("docs/{page}.md"));
        let (in_code, on_page) = (code.contains(bound), page.contains(says));
        if !in_code || !on_page {
            wrong.push(format!(
                "{line}: in the code {in_code}, on the page {on_page}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
