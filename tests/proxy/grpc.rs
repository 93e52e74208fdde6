//! gRPC through weir, with grpcio at both ends: what a client sees is what it sees without weir, and what weir refuses it sees as
//! gRPC's own.

use std::future::poll_fn;
use std::time::Duration;

use super::harness::peers::Peer;
use super::harness::process::{Running, file};
use super::harness::{Lane, eventually};
use bytes::Bytes;
use http::{HeaderMap, Request};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::net::TcpStream;

/// A server of grpcio, weir in front of it, and a client of grpcio.
struct World {
    _server: Peer,
    /// Where the server is.
    port: u16,
    weir: Running,
    client: Peer,
    _config: NamedTempFile,
}

impl World {
    fn new() -> World {
        World::with("", "")
    }

    /// With these keys beside those of the upstream, and these sections.
    fn with(upstream: &str, sections: &str) -> World {
        let (server, port) = server();
        let config = file(&format!(
            "{{listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 1GiB}}}}], \
             upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2, timeout: 30s{upstream}}}}}, \
             admin: {{address: '127.0.0.1:0'}}{sections}}}"
        ));
        let weir = Running::start(config.path());
        let client = client(&weir.address);
        World {
            _server: server,
            port,
            weir,
            client,
            _config: config,
        }
    }

    fn call(&mut self, method: &str, requests: Value) -> Value {
        self.client
            .ask(&json!({"method": method, "requests": requests}))
    }

    /// How many calls the server saw end before it had answered.
    fn cancelled(&mut self) -> u64 {
        let answer = self.call("Cancelled", json!([""]));
        answer["messages"][0].as_str().unwrap().parse().unwrap()
    }

    fn metrics(&self) -> String {
        self.weir.admin().get("/metrics").body
    }
}

fn server() -> (Peer, u16) {
    let mut server = Peer::start("grpc_server.py", &[]);
    let port = server.line().parse().unwrap();
    (server, port)
}

fn client(address: impl ToString) -> Peer {
    Peer::start("grpc_client.py", &[&address.to_string()])
}

#[track_caller]
fn is_ok(answer: &Value, messages: Value) {
    assert_eq!(
        (&answer["code"], &answer["messages"]),
        (&json!("OK"), &messages),
        "{answer}"
    );
}

#[test]
fn calls_of_all_four_kinds_are_what_they_are_without_weir() {
    let mut world = World::new();
    let mut direct = client(format!("127.0.0.1:{}", world.port));
    let metadata = json!([
        ["my-text", "a value, with \"marks\""],
        ["my-twice", "1"],
        ["my-twice", "2"],
        ["my-some-bin", "AAH/Cg=="],
        ["my-empty", ""],
    ]);
    for (method, requests) in [
        ("Unary", json!(["hello"])),
        ("Unary", json!([""])),
        ("Unary", json!([1_000_000])),
        ("Upload", json!(["a", "b", 70_000, ""])),
        ("Upload", json!([])),
        ("Download", json!(["5 10"])),
        ("Download", json!(["0 0"])),
        ("Download", json!(["3 200000"])),
        ("Talk", json!(["one", "", "three", 100_000])),
        ("Talk", json!([])),
        ("Fail", json!(["NOT_FOUND no such thing: 50% \"ü\"\n"])),
        ("FailLate", json!(["ABORTED gone"])),
        ("Nothing", json!([""])),
    ] {
        let call = json!({"method": method, "requests": requests, "metadata": metadata});
        let (mut through, mut without) = (world.client.ask(&call), direct.ask(&call));
        for answer in [&mut through, &mut without] {
            answer["took"].take();
        }
        // Every response that goes on has one (RFC 9110 section 6.6.1).
        let dates = ["initial", "trailing"].map(|part| {
            let fields = through[part].as_array_mut().unwrap();
            fields.extract_if(.., |field| field[0] == "date").count()
        });
        assert_eq!(dates.iter().sum::<usize>(), 1, "{call}");
        assert_eq!(through, without, "{call}");
    }
}

#[test]
fn the_server_gets_the_metadata_of_the_client() {
    let mut world = World::new();
    let call = json!({"method": "Metadata", "requests": [""], "metadata": [
        ["my-some-bin", "AAH/Cg=="], ["authorization", "Bearer abc"], ["x-forwarded-for", "6.6.6.6"], ["dotted.key_name", "v"],
    ]});
    let answer = world.client.ask(&call);
    let came = answer["messages"][0].as_str().unwrap();
    for line in [
        "my-some-bin: b'\\x00\\x01\\xff\\n'",
        "authorization: Bearer abc",
        "dotted.key_name: v",
        "x-forwarded-for: 127.0.0.1",
    ] {
        assert!(came.lines().any(|came| came == line), "{line} in {came}");
    }
    assert!(came.contains("user-agent: grpc-python"), "{came}");
}

#[test]
fn calls_of_one_channel_go_on_beside_each_other() {
    let mut world = World::new();
    let mut other = client(&world.weir.address);
    other.tell(&json!({"method": "Download", "requests": ["3 5 0.3"]}));
    for n in 0..20 {
        let text = format!("call {n}");
        is_ok(&world.call("Unary", json!([text])), json!([text]));
    }
    is_ok(
        &other.answer(),
        json!(["\0\0\0\0\0", "\0\0\0\0\0", "\0\0\0\0\0"]),
    );
}

#[test]
fn a_message_of_a_stream_is_answered_before_the_next_is_sent() {
    let mut world = World::new();
    let call = json!({"method": "Talk", "requests": ["1", "2"], "open": true, "cancel_after": 2});
    let answer = world.client.ask(&call);
    assert_eq!(answer["messages"], json!(["1", "2"]));
    assert_eq!(answer["code"], "CANCELLED");
}

#[test]
fn a_call_that_the_client_cancels_ends_at_the_server() {
    let mut world = World::new();
    for (count, method) in ["Hang", "HangLate", "HangHearing"].into_iter().enumerate() {
        let after = u64::from(method == "HangLate");
        let call =
            json!({"method": method, "requests": ["a"], "open": true, "cancel_after": after});
        let answer = match method {
            // Its answers would be waited for before it could be cancelled.
            "HangHearing" => world
                .client
                .ask(&json!({"method": method, "requests": ["a"], "open": true, "timeout": 3})),
            _ => world.client.ask(&call),
        };
        assert!(
            answer["code"] == "CANCELLED" || answer["code"] == "DEADLINE_EXCEEDED",
            "{answer}"
        );
        eventually(|| world.cancelled() == count as u64 + 1);
    }
    let metrics = world.metrics();
    assert!(
        metrics.contains(r#"weir_rejections_total{reason="client_left"}"#),
        "{metrics}"
    );
}

#[test]
fn a_hundred_megabytes_of_messages_pass_in_bounded_memory() {
    let mut world = World::new();
    is_ok(&world.call("Unary", json!(["warm"])), json!(["warm"]));
    let before = world.weir.memory("VmHWM");
    let megabytes = vec![1 << 20; 100];
    let answer = world.call("Upload", json!(megabytes));
    is_ok(&answer, json!(["100 104857600"]));
    let answer = world.call("Talk", json!(megabytes));
    assert_eq!(
        (&answer["code"], &answer["bytes"]),
        (&json!("OK"), &json!(100 << 20))
    );
    // The server could be done long before the client begins to read.
    let call = json!({"method": "Download", "requests": ["100 1048576"], "read_pause": 1});
    let answer = world.client.ask(&call);
    assert_eq!(
        (&answer["code"], &answer["bytes"]),
        (&json!("OK"), &json!(100 << 20))
    );
    let answer = world.call("Unary", json!([64 << 20]));
    assert_eq!(
        (&answer["code"], &answer["bytes"]),
        (&json!("OK"), &json!(64 << 20))
    );
    let grown = world.weir.memory("VmHWM") - before;
    assert!(grown < 16 * 1024, "{grown} KiB more than for a small call");
}

#[test]
fn what_weir_refuses_is_a_status_of_grpc() {
    let (_server, port) = server();
    let config = file(&format!(
        "{{listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 100KiB}}}}], \
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2, timeout: 60s}}, \
                      hasty: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2, timeout: 300ms}}, \
                      gone: {{endpoints: ['http://127.0.0.1:9'], protocol: http2}}}}, \
         routes: [{{match: {{path: /test.Peer/Unary}}, upstream: app, rate_limits: [one]}}, \
                  {{match: {{path: /test.Peer/Fail}}, upstream: app, session: {{use: web}}}}, \
                  {{match: {{path: /test.Peer/Hang}}, upstream: app, session: {{use: web, claims: {{role: admin}}}}}}, \
                  {{match: {{path: /test.Peer/Download}}, upstream: gone}}, \
                  {{match: {{path: /test.Peer/Upload}}, upstream: app}}, \
                  {{match: {{path: /test.Peer/Talk}}, upstream: app}}, \
                  {{match: {{path: /test.Peer/HangHearing}}, upstream: hasty}}], \
         rate_limits: {{one: {{limit: 1/month, algorithm: fixed_window, by: constant}}}}, \
         sessions: {{web: {{token: [{{bearer: true}}]}}}}, \
         admin: {{address: '127.0.0.1:0'}}}}"
    ));
    let weir = Running::start(config.path());
    let mut client = client(&weir.address);
    let created = weir.admin().send(
        "POST",
        "/v1/sessions",
        &["Host: localhost", "Content-Type: application/json"],
        r#"{"sessions": "web", "user": "ann"}"#,
    );
    let created: Value = serde_json::from_str(&created.body).unwrap();
    let bearer = format!("Bearer {}", created["token"].as_str().unwrap());
    let answer = client.ask(&json!({"method": "Fail", "requests": ["ABORTED x"]}));
    assert_eq!(answer["code"], "UNAUTHENTICATED", "{answer}");
    assert_eq!(
        answer["details"],
        "this needs a session, and the request has none"
    );
    let mut check = |method: &str, requests: Value, code: &str, details: &str, field: &str| {
        let call = json!({"method": method, "requests": requests, "metadata": [["authorization", bearer]]});
        let answer = client.ask(&call);
        assert_eq!(
            (&answer["code"], &answer["details"]),
            (&json!(code), &json!(details)),
            "{answer}"
        );
        let said = |fields: &Value| {
            fields
                .as_array()
                .unwrap()
                .iter()
                .any(|pair| pair[0] == field)
        };
        assert!(
            field.is_empty() || said(&answer["initial"]) || said(&answer["trailing"]),
            "{answer}"
        );
    };
    check("Unary", json!(["a"]), "OK", "", "");
    check(
        "Unary",
        json!(["a"]),
        "RESOURCE_EXHAUSTED",
        "request is over the limits named",
        "ratelimit",
    );
    check("Fail", json!(["ABORTED x"]), "ABORTED", "x", "why-bin");
    check(
        "Hang",
        json!(["a"]),
        "PERMISSION_DENIED",
        "the session has not the \"role\" that this needs",
        "proxy-status",
    );
    check(
        "Download",
        json!(["1 1"]),
        "UNAVAILABLE",
        "upstream cannot be reached",
        "proxy-status",
    );
    check(
        "Nothing",
        json!([]),
        "UNIMPLEMENTED",
        "no route serves this request",
        "proxy-status",
    );
    let too_large = "request body is larger than the limit";
    check(
        "Upload",
        json!([60_000, 60_000]),
        "RESOURCE_EXHAUSTED",
        too_large,
        "",
    );
    check(
        "Talk",
        json!([60_000, 60_000]),
        "RESOURCE_EXHAUSTED",
        too_large,
        "",
    );
    check(
        "HangHearing",
        json!(["a"]),
        "DEADLINE_EXCEEDED",
        "upstream took too long",
        "proxy-status",
    );
}

#[test]
fn a_breaker_counts_the_status_of_a_call() {
    let breaker = "{consecutive_failures: 4, failure_on: ['grpc:UNAVAILABLE']}";
    let sections = format!(", circuit_breakers: {{b: {breaker}}}");
    let mut world = World::with(", circuit_breaker: b", &sections);
    for _ in 0..5 {
        assert_eq!(
            world.call("Fail", json!(["NOT_FOUND x"]))["code"],
            "NOT_FOUND"
        );
    }
    let is_open = |world: &World| world.metrics().contains("state=\"open\"} 1");
    assert!(!is_open(&world));
    for method in ["Fail", "FailLate", "Fail", "FailLate"] {
        let answer = world.call(method, json!(["UNAVAILABLE not now"]));
        assert_eq!(
            (&answer["code"], &answer["details"]),
            (&json!("UNAVAILABLE"), &json!("not now"))
        );
    }
    let answer = world.call("Unary", json!(["a"]));
    assert_eq!(answer["code"], "UNAVAILABLE", "{answer}");
    assert_eq!(
        answer["details"],
        "upstream is failing, and is given time to recover"
    );
    assert!(is_open(&world));
}

/// What becomes of one call by HTTP/2 alone, whose client keeps no time and never ends its requests unless `ended`.
async fn bare_call(
    weir: std::net::SocketAddr,
    timeout: &str,
    ended: bool,
) -> (HeaderMap, HeaderMap) {
    let stream = TcpStream::connect(weir).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://{weir}/test.Peer/Any"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())
        .unwrap();
    let (response, mut stream) = requests.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::from_static(&[0; 5]), ended)
        .unwrap();
    let (head, mut body) = response.await.unwrap().into_parts();
    while let Some(data) = body.data().await {
        data.unwrap();
    }
    let trailers = body.trailers().await.unwrap().unwrap_or_default();
    (head.headers, trailers)
}

/// An upstream that ends no call, and answers it with a head at most; it says with what each was taken back.
async fn endless(begins: bool) -> (u16, tokio::sync::mpsc::UnboundedReceiver<h2::Reason>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, ends) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let told = told.clone();
            tokio::spawn(async move {
                let head = http::Response::builder().header("content-type", "application/grpc");
                let mut begun = begins.then(|| {
                    respond
                        .send_response(head.body(()).unwrap(), false)
                        .unwrap()
                });
                let reason = match &mut begun {
                    Some(stream) => poll_fn(|cx| stream.poll_reset(cx)).await,
                    None => poll_fn(|cx| respond.poll_reset(cx)).await,
                };
                drop(request);
                let _ = told.send(reason.unwrap());
            });
        }
    });
    (port, ends)
}

#[tokio::test]
async fn a_call_whose_time_is_over_is_ended_by_weir_on_both_sides() {
    for (begins, ended) in [(false, true), (false, false), (true, true), (true, false)] {
        let (port, mut ends) = endless(begins).await;
        let lane = Lane::start(&format!(
            "{{listen: '127.0.0.1:0', upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2}}}}}}"
        ));
        let began = weir::clock::now();
        let (head, trailers) = bare_call(lane.address, "300m", ended).await;
        let took = began.elapsed();
        let told = if begins { &trailers } else { &head };
        let case = format!("begins {begins}, ended {ended}: {head:?} {trailers:?}");
        assert_eq!(told.get("grpc-status").unwrap(), "4", "{case}");
        assert!(
            took >= Duration::from_millis(290) && took < Duration::from_secs(5),
            "{took:?}: {case}"
        );
        assert_eq!(ends.recv().await, Some(h2::Reason::CANCEL), "{case}");
    }
}

#[test]
fn a_server_that_dies_within_a_call_is_unavailable() {
    let (mut server, port) = server();
    let lane = Lane::start(&format!(
        "{{listen: '127.0.0.1:0', upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2}}}}}}"
    ));
    let mut client = client(lane.address);
    client.tell(&json!({"method": "HangLate", "requests": ["a"], "say": true}));
    assert_eq!(client.line(), "begun");
    server.kill();
    let answer = client.answer();
    assert_eq!(
        (&answer["code"], &answer["messages"]),
        (&json!("UNAVAILABLE"), &json!(["first"])),
        "{answer}"
    );
}

#[test]
fn a_call_is_idle_only_while_neither_side_speaks() {
    let (_server, port) = server();
    let lane = Lane::start(&format!(
        "{{listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 2s}}}}], \
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2}}}}}}"
    ));
    let mut client = client(lane.address);
    let six = json!(["a", "b", "c", "d", "e", "f"]);
    let answer = client.ask(&json!({"method": "HearsLate", "requests": six, "pause": 0.5}));
    is_ok(&answer, json!(["6"]));
    let answer = client.ask(&json!({"method": "SpeaksFirst", "requests": ["abc"], "pause": 3.3}));
    is_ok(&answer, json!([".", ".", ".", ".", ".", ".", "3"]));
    let answer = client.ask(&json!({"method": "HangLate", "requests": ["a"]}));
    assert_eq!(
        (&answer["code"], &answer["messages"]),
        (&json!("UNAVAILABLE"), &json!(["first"]))
    );
}

#[test]
fn a_body_over_the_limit_ends_a_call_that_is_answered_already() {
    let (_server, port) = server();
    let lane = Lane::start(&format!(
        "{{listeners: [{{address: '127.0.0.1:0', limits: {{max_body: 100KiB}}}}], circuit_breakers: {{b: {{consecutive_failures: 1}}}}, \
         upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2, circuit_breaker: b}}}}}}"
    ));
    let mut client = client(lane.address);
    let call = json!({"method": "Talk", "requests": [60_000, 60_000, 60_000], "pause": 0.3});
    for _ in 0..2 {
        let answer = client.ask(&call);
        assert_eq!(
            (&answer["code"], &answer["details"], &answer["messages"]),
            (
                &json!("RESOURCE_EXHAUSTED"),
                &json!("request body is larger than the limit"),
                &json!([60_000])
            ),
        );
    }
    for series in [
        r#"weir_rejections_total{reason="body_too_large"}"#,
        r#"weir_grpc_responses_total{status="RESOURCE_EXHAUSTED"}"#,
    ] {
        assert_eq!(lane.told(series), Some(2.0), "{series}");
    }
}

/// An upstream that answers at once, reads nothing for `pause`, and then says how many bytes came in all.
async fn reads_late(pause: Duration) -> (u16, tokio::sync::oneshot::Receiver<usize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let head = http::Response::builder().header("content-type", "application/grpc");
        let mut response = respond
            .send_response(head.body(()).unwrap(), false)
            .unwrap();
        tokio::time::sleep(pause).await;
        let mut body = request.into_body();
        let mut came = 0;
        while let Some(data) = body.data().await {
            let bytes = data.unwrap().len();
            came += bytes;
            body.flow_control().release_capacity(bytes).unwrap();
        }
        let _ = tell.send(came);
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        response.send_trailers(trailers).unwrap();
    });
    (port, told)
}

#[tokio::test]
async fn an_upstream_that_has_answered_may_be_slow_to_read() {
    let (port, came) = reads_late(Duration::from_secs(3)).await;
    let lane = Lane::start(&format!(
        "{{listen: '127.0.0.1:0', upstreams: {{app: {{endpoints: ['http://127.0.0.1:{port}'], connect_timeout: 60s, protocol: http2, timeout: 2s}}}}}}"
    ));
    let stream = TcpStream::connect(lane.address).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://{}/test.Peer/Any", lane.address))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut stream) = requests.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::from(vec![0; 200_000]), true)
        .unwrap();
    let mut body = response.await.unwrap().into_body();
    let came = tokio::time::timeout(Duration::from_secs(10), came).await;
    assert_eq!(came.unwrap().unwrap(), 200_000);
    assert!(body.data().await.is_none());
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers.get("grpc-status").unwrap(), "0");
}
