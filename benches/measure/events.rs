//! Audited requests as an API has them: no captured headers, ids of their own.

use std::net::Ipv4Addr;
use std::time::Duration;

use weir::clock;
use weir::event::{AuditEvent, Micros};

/// The `n`th: of 30,000 clients, 20,000 users and 24 routes; one in twenty refused, one in three with a query.
pub fn event(n: usize) -> AuditEvent {
    let mut random = fastrand::Rng::with_seed(n as u64);
    let mut one_in = |count: u32| random.u32(..count) == 0;
    let (is_refused, has_query, is_traced) = (one_in(20), one_in(3), one_in(2));
    let (is_post, is_anonymous) = (one_in(4), one_in(5));
    let resource = ["payments", "users", "orders", "carts", "items", "search"][random.usize(..6)];
    let version = random.u8(1..5);
    let path = match random.u8(..3) {
        0 => format!("/v{version}/{resource}"),
        1 => format!("/v{version}/{resource}/{}", random.u32(..10_000_000)),
        _ => {
            let id = clock::uuid(Duration::from_millis(
                random.u64(1_600_000_000_000..1_700_000_000_000),
            ));
            format!("/v{version}/{resource}/{id}/lines")
        }
    };
    let duration = random.u64(800..60_000);
    AuditEvent {
        seq: 0,
        time: Micros(1_700_000_000_000_000 + n as u64 * 50 + random.u64(..50)),
        client: Ipv4Addr::from_bits(0x0a00_0000 + random.u32(..30_000) * 131).into(),
        user: (!is_anonymous).then(|| format!("user-{}@example.com", random.u32(..20_000))),
        label: is_refused.then(|| "rate_limited".to_owned()),
        route: Some(format!("/v{version}/{resource}/*")),
        method: if is_post { "POST" } else { "GET" }.to_owned(),
        path,
        status: if is_refused {
            429
        } else {
            [200, 200, 200, 201, 404][random.usize(..5)]
        },
        id: clock::uuid(Duration::from_millis(1_700_000_000_000 + n as u64 / 20)).into_bytes(),
        upstream: Some(resource.to_owned()),
        endpoint: (!is_refused).then(|| format!("http://10.1.0.{}:8080", random.u8(1..9))),
        host: "api.example.com".to_owned(),
        query: has_query.then(|| format!("page={}&size=50&token=***", random.u8(..))),
        limits: ["per_user: ok".to_owned()].into_iter().collect(),
        breaker: (!is_refused).then(|| "closed".to_owned()),
        bytes_in: if is_post { random.u64(50..4_000) } else { 0 },
        bytes_out: random.u64(100..20_000),
        duration: Micros(duration),
        upstream_duration: (!is_refused).then(|| Micros(duration - random.u64(100..700))),
        request_id: None,
        trace_id: is_traced.then(|| random.u128(..).to_le_bytes()),
        headers: Vec::new(),
    }
}
