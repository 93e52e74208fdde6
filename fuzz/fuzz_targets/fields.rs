//! Fields that clients and upstreams fill as they like, a line each: trace context that is taken is written as it came, and a session's
//! token comes from one place alone.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use weir::config::sessions::{CookieAttributes, Forward, OnMax, SameSite, Settings, TokenSource};
use weir::http1::trace_context::{TraceParent, is_tracestate};
use weir::policy::session::{SessionStart, token_from};

fuzz_target!(|bytes: &[u8]| {
    let fields: Vec<_> = bytes.split(|byte| *byte == b'\n').map(field).collect();
    for (_, value) in &fields {
        if let Some(parent) = TraceParent::parse(value) {
            let written = parent.value();
            assert_eq!(written[3..53], value[3..53]);
            assert_eq!(TraceParent::parse(&written), Some(parent));
        }
        if let Ok(start) = SessionStart::parse(value) {
            assert!(!start.user.is_empty());
        }
    }
    // Several fields are one list.
    let values = fields.iter().map(|(_, value)| *value);
    let joined = values.clone().collect::<Vec<_>>().join(&b',');
    assert_eq!(
        is_tracestate(values),
        is_tracestate([&joined[..]].into_iter())
    );
    let settings = settings();
    if let Some(token) = token_from(&settings, fields.iter().copied()) {
        assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
        let stands_in = |value: &[u8]| {
            value
                .windows(token.len())
                .any(|part| part == token.as_bytes())
        };
        assert!(fields.iter().any(|(_, value)| stands_in(value)));
    }
    let twice = fields.iter().chain(&fields).copied();
    assert_eq!(token_from(&settings, twice), None);
});

fn field(line: &[u8]) -> (&[u8], &[u8]) {
    let colon = line.iter().position(|byte| *byte == b':');
    let (name, value) = line.split_at(colon.unwrap_or(line.len()));
    (name, value.strip_prefix(b":").unwrap_or_default())
}

fn settings() -> Settings {
    Settings {
        sources: vec![
            TokenSource::Cookie("sid".to_owned()),
            TokenSource::Bearer,
            TokenSource::Header("x-session".to_owned()),
        ],
        idle_timeout: Duration::from_secs(1),
        absolute_timeout: Duration::from_secs(1),
        max_per_user: None,
        on_max: OnMax::EvictOldest,
        forward: Forward::default(),
        cookie: CookieAttributes {
            secure: true,
            http_only: true,
            same_site: SameSite::Lax,
            path: "/".to_owned(),
        },
    }
}
