//! Traces, over sockets: what weir makes of what callers say, and what collectors get.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use harness::{Lane, Upstream};

const ID: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn lane(upstream: &Upstream, trusted: &str, traces: &str) -> Lane {
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', client_ip: {{trusted_proxies: [{trusted}]}}}}]\n\
         upstreams: {{app: {{endpoints: ['{}']}}}}\ntelemetry: {{{traces}}}\n",
        upstream.url()
    ))
}

/// The values of this field of the head that the upstream gets.
fn told(lane: &Lane, upstream: &Upstream, name: &str, fields: &[&str]) -> Vec<String> {
    assert_eq!(lane.connect().send("GET", "/", fields, "").status, 200);
    values(&upstream.wait_for_request(), name)
}

fn values(head: &str, name: &str) -> Vec<String> {
    let fields = head.lines().filter_map(|line| line.split_once(": "));
    fields
        .filter(|(other, _)| other.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.to_owned())
        .collect()
}

/// The one `traceparent` of these: its trace, parent and flags.
fn parts(mut values: Vec<String>) -> (String, String, String) {
    assert_eq!(values.len(), 1, "{values:?}");
    let value = values.remove(0);
    let parts: Vec<_> = value.split('-').collect();
    assert_eq!(
        (value.len(), parts.len(), parts[0]),
        (55, 4, "00"),
        "{value}"
    );
    (
        parts[1].to_owned(),
        parts[2].to_owned(),
        parts[3].to_owned(),
    )
}

#[test]
fn a_trusted_proxy_s_trace_goes_on_with_weir_s_call_as_the_parent() {
    let upstream = Upstream::answering("");
    let lane = lane(&upstream, "127.0.0.1", "traces: {sample: 100%}");
    for flags in ["00", "01"] {
        let given = format!("TraceParent: 00-{ID}-{PARENT}-{flags}");
        let fields = [given.as_str(), "tracestate: a=1", "Tracestate: b=2,c=3"];
        lane.connect().send("GET", "/", &fields, "");
        let head = upstream.wait_for_request();
        let (trace, parent, said) = parts(values(&head, "traceparent"));
        assert_eq!((trace.as_str(), said.as_str()), (ID, flags));
        assert!(parent != PARENT && parent != "0".repeat(16), "{parent}");
        assert_eq!(values(&head, "tracestate"), ["a=1", "b=2,c=3"]);
    }
    // A later version is told in the one that weir knows.
    let given = format!("traceparent: cc-{ID}-{PARENT}-03-more");
    let (trace, _, flags) = parts(told(&lane, &upstream, "traceparent", &[&given]));
    assert_eq!((trace.as_str(), flags.as_str()), (ID, "01"));
    // A state that no one could read goes no further; the trace does.
    let given = format!("traceparent: 00-{ID}-{PARENT}-01");
    let fields = [given.as_str(), "tracestate: A=1"];
    assert_eq!(told(&lane, &upstream, "tracestate", &fields), [""; 0]);
}

#[test]
fn every_other_request_begins_a_trace() {
    let upstream = Upstream::answering("");
    let trusting = lane(&upstream, "127.0.0.1", "traces: {sample: 100%}");
    let alone = lane(&upstream, "", "traces: {sample: 0%}");
    let valid = format!("traceparent: 00-{ID}-{PARENT}-01");
    let upper = format!("traceparent: 00-{}-{PARENT}-01", ID.to_uppercase());
    let zero = format!("traceparent: 00-{}-{PARENT}-01", "0".repeat(32));
    let mut traces = Vec::new();
    for (lane, fields, expected) in [
        (&alone, vec![valid.as_str(), "tracestate: a=1"], "00"),
        (&alone, vec![], "00"),
        (&trusting, vec![], "01"),
        (&trusting, vec!["tracestate: a=1"], "01"),
        (&trusting, vec![valid.as_str(), valid.as_str()], "01"),
        (&trusting, vec![upper.as_str(), "tracestate: a=1"], "01"),
        (&trusting, vec![zero.as_str()], "01"),
    ] {
        lane.connect().send("GET", "/", &fields, "");
        let head = upstream.wait_for_request();
        let (trace, _, flags) = parts(values(&head, "traceparent"));
        assert_eq!(flags, expected, "{fields:?}");
        assert_eq!(values(&head, "tracestate"), [""; 0], "{fields:?}");
        assert!(trace != ID && !traces.contains(&trace), "{fields:?}");
        traces.push(trace);
    }
}

#[test]
fn without_a_part_in_traces_weir_leaves_them_alone() {
    let upstream = Upstream::answering("");
    let lane = lane(&upstream, "", "log: {}");
    let given = format!("traceparent: 00-{ID}-{PARENT}-01");
    let fields = [given.as_str(), "tracestate: A"];
    lane.connect().send("GET", "/", &fields, "");
    let head = upstream.wait_for_request();
    assert!(
        head.contains(&given) && head.contains("tracestate: A\r\n"),
        "{head}"
    );
    assert_eq!(told(&lane, &upstream, "traceparent", &[]), [""; 0]);
}

#[test]
fn a_share_of_new_traces_is_kept() {
    let upstream = Upstream::answering("");
    let lane = lane(&upstream, "", "traces: {sample: 20%}");
    let mut client = lane.connect();
    let mut kept = 0;
    for _ in 0..1_000 {
        client.get("/");
        let (_, _, flags) = parts(values(&upstream.wait_for_request(), "traceparent"));
        kept += u32::from(flags == "01");
    }
    // Within ten standard deviations, some 13 each.
    assert!((70..=330).contains(&kept), "{kept}");
}
