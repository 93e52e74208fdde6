//! What clients are told of limits, as the file's defaults have it.

use super::harness::{Lane, Reply, Upstream};

/// The answers to so many requests to a limit of one an hour, with these `rate_limit_defaults`.
fn answers(defaults: &str, count: usize) -> Vec<Reply> {
    let app = Upstream::answering("");
    let lane = Lane::start(&format!(
        "listen: 127.0.0.1:0\nupstream: {}\nrate_limit_defaults: {{{defaults}}}\n\
         rate_limits:\n  wide: {{limit: 100/d, by: client.ip, algorithm: fixed_window}}\n  one: {{limit: 1/h, by: client.ip}}\n\
         routes: [{{upstream: upstream, rate_limits: [wide, one]}}]\n",
        app.url()
    ));
    let mut client = lane.connect();
    (0..count).map(|_| client.get("/")).collect()
}

#[test]
fn no_header_is_told_where_the_file_names_none() {
    let told = answers("headers: []", 2);
    assert_eq!([told[0].status, told[1].status], [200, 429]);
    for reply in told {
        let mut names = reply.fields.iter().map(|(name, _)| name);
        assert!(!names.any(|name| name.contains("ratelimit")), "{reply:?}");
    }
}

#[test]
fn waits_are_longer_by_up_to_the_jitter() {
    let waits = |jitter: &str| -> Vec<u32> {
        let told = answers(&format!("retry_after: {{jitter: {jitter}}}"), 100);
        let waits = told[1..].iter().map(|it| it.field("retry-after").unwrap());
        waits.map(|wait| wait.parse().unwrap()).collect()
    };
    let plain = waits("0%");
    assert!(
        plain.iter().all(|wait| (3_500..=3_600).contains(wait)),
        "{plain:?}"
    );
    let spread = waits("50%");
    assert!(
        spread.iter().all(|wait| (3_500..=5_400).contains(wait)),
        "{spread:?}"
    );
    // That none of 99 falls into a half of them comes about once in 2^99.
    assert!(spread.iter().any(|wait| *wait <= 4_500), "{spread:?}");
    assert!(spread.iter().any(|wait| *wait > 4_500), "{spread:?}");
}
