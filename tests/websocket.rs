//! WebSocket through weir, with `websockets` at the server's end: the same as without weir, by HTTP/1.1 and by HTTP/2, until weir
//! closes it with a word.

#![expect(
    clippy::unwrap_used,
    reason = "a broken step of a test is a failed test"
)]

mod harness;

use std::io::{Read, Write};
use std::net::SocketAddr;

use bytes::Bytes;
use h2::RecvStream;
use h2::ext::Protocol;
use h2::server::SendResponse;
use harness::peers::Peer;
use harness::process::{Running, audited, file};
use harness::raw::{read_head, scripted};
use harness::versions::run;
use harness::{DEADLINE, eventually};
use http::{Request, Response};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

const BY: [&str; 2] = ["http1", "http2"];

struct World {
    server: Peer,
    /// Where the server is.
    direct: String,
    weir: Running,
    _config: NamedTempFile,
}

impl World {
    /// With these keys of the listener and these sections beside.
    fn new(listener: &str, sections: &str) -> World {
        let mut server = Peer::start("ws_server.py", &[]);
        let direct = format!("127.0.0.1:{}", server.line());
        let (weir, config) = weir(&direct, listener, sections);
        World {
            server,
            direct,
            weir,
            _config: config,
        }
    }

    /// An open connection to `path`.
    fn open(&self, by: &str, path: &str, fields: Value) -> Socket {
        let (socket, answer) = Socket::open(&self.weir.address, by, path, fields);
        assert_eq!(answer["status"], 200, "{answer}");
        socket
    }
}

fn weir(upstream: &str, listener: &str, sections: &str) -> (Running, NamedTempFile) {
    let config = file(&format!(
        "{{listeners: [{{address: '127.0.0.1:0'{listener}}}], upstreams: {{app: {{endpoints: ['http://{upstream}']}}}}, \
         admin: {{address: '127.0.0.1:0'}}{sections}}}"
    ));
    (Running::start(config.path()), config)
}

/// A client with one connection.
struct Socket(Peer);

impl Socket {
    fn open(address: &str, by: &str, path: &str, fields: Value) -> (Socket, Value) {
        let mut client = Peer::start("ws_client.py", &[]);
        let task =
            json!({"do": "open", "address": address, "by": by, "path": path, "fields": fields});
        let answer = client.ask(&task);
        (Socket(client), answer)
    }

    #[track_caller]
    fn echoes(&mut self, text: &str) {
        self.echoes_with(text, "");
    }

    /// With these bytes in hex behind it, which weir has read by then, too.
    #[track_caller]
    fn echoes_with(&mut self, text: &str, then: &str) {
        let echo = json!({"do": "echo", "text": text, "then": then});
        assert_eq!(self.0.ask(&echo), text);
    }

    /// Waits for the end, and says what frames come until then.
    fn wait(&mut self) {
        self.0.tell(&json!({"do": "rest"}));
    }
}

#[test]
fn every_case_ends_as_it_does_without_weir() {
    let world = World::new("", "");
    let mut client = Peer::start("ws_client.py", &[]);
    let mut run = |address: &str, by: &str| {
        let results = client.ask(&json!({"do": "cases", "by": by, "address": address}));
        results.as_object().unwrap().clone()
    };
    let direct = run(&world.direct, "http1");
    assert!(direct.len() > 180);
    assert_eq!(
        direct["1.1 text 0"],
        json!([200, "81 0 e3b0c44298fc1c14", "88 03e8"])
    );
    for by in BY {
        let through = run(&world.weir.address, by);
        assert_eq!(through.len(), direct.len());
        for (name, result) in &direct {
            assert_eq!(&through[name], result, "{name} by {by}");
        }
    }
}

#[test]
fn a_drain_closes_both_ends_as_going_away() {
    let mut world = World::new("", "");
    let mut sockets = BY.map(|by| world.open(by, "/watched", json!([])));
    for socket in &mut sockets {
        socket.echoes("hello");
        socket.wait();
    }
    world.weir.signal("TERM");
    for socket in &mut sockets {
        let rest = socket.0.answer();
        assert_eq!(rest["frames"], json!(["88 03e9"]));
        // It would wait for 2 s for an answer that does not come.
        assert!(
            rest["took"].as_f64().unwrap() < 1.5,
            "it takes no time to close: {rest}"
        );
        assert_eq!(world.server.line(), "1001");
    }
    // Nothing else is in flight, so that nothing holds the drain up.
    eventually(|| {
        world
            .weir
            .child
            .try_wait()
            .unwrap()
            .is_some_and(|status| status.success())
    });
}

#[test]
fn a_close_frame_never_goes_into_another_frame() {
    for by in BY {
        let mut world = World::new("", "");
        let mut socket = world.open(by, "/watched", json!([]));
        // The head of a frame of 20 bytes, its mask, and 5 of them.
        let part = format!("8194{}{}", "00000000", "2a".repeat(5));
        socket.echoes_with("hello", &part);
        socket.wait();
        world.weir.signal("TERM");
        let rest = socket.0.answer();
        assert_eq!(rest["frames"], json!(["88 03e9"]), "{by}");
        // What the client sent in answer was within its frame, so the server heard of no close.
        assert_eq!(world.server.line(), "null", "{by}");
    }
}

#[test]
fn a_frame_under_way_goes_to_its_end_before_the_close() {
    let mut world = World::new("", "");
    let mut socket = world.open("http1", "/watched", json!([]));
    let part = format!("8188{}{}", "00000000", "2a".repeat(5));
    socket.echoes_with("hello", &part);
    world.weir.signal("TERM");
    world.weir.log_until("draining");
    // The rest, and one that comes too late.
    socket
        .0
        .ask(&json!({"do": "send", "hex": format!("{}81810000000041", "2a".repeat(3))}));
    socket.wait();
    socket.0.answer();
    assert_eq!(world.server.line(), "1001");
}

#[test]
fn a_connection_on_which_nothing_moves_is_closed_as_going_away() {
    let mut world = World::new(", timeouts: {stream_idle: 4s}", "");
    for by in BY {
        let mut socket = world.open(by, "/watched", json!([]));
        for _ in 0..4 {
            let echo = json!({"do": "echo", "text": "still here", "after": 1.2});
            assert_eq!(socket.0.ask(&echo), "still here", "{by}");
        }
        socket.wait();
        assert_eq!(socket.0.answer()["frames"], json!(["88 03e9"]), "{by}");
        assert_eq!(world.server.line(), "1001", "{by}");
    }
}

#[test]
fn a_session_that_ends_closes_its_connections_as_against_policy() {
    let routes = "routes: [{upstream: app, session: {use: web}, revalidate_every: 200ms}]";
    let sessions = "sessions: {web: {token: [{bearer: true}], idle_timeout: 2s, touch_every: 1s}}";
    let mut world = World::new("", &format!(", {routes}, {sessions}"));
    let fields = ["Host: localhost", "Content-Type: application/json"];
    for (by, revoked) in [("http1", true), ("http2", true), ("http2", false)] {
        let body = r#"{"sessions": "web", "user": "ann"}"#;
        let created = world
            .weir
            .admin()
            .send("POST", "/v1/sessions", &fields, body)
            .body;
        let created: Value = serde_json::from_str(&created).unwrap();
        let bearer = format!("Bearer {}", created["token"].as_str().unwrap());
        let mut socket = world.open(by, "/watched", json!([["Authorization", bearer]]));
        socket.echoes("hello");
        socket.wait();
        if revoked {
            let ended = world
                .weir
                .admin()
                .send("DELETE", "/v1/sessions?user=ann", &fields, "");
            assert_eq!(ended.status, 200, "{ended:?}");
        }
        assert_eq!(socket.0.answer()["frames"], json!(["88 03f0"]), "{by}");
        assert_eq!(world.server.line(), "1008", "{by}");
    }
    let (_, answer) = Socket::open(&world.weir.address, "http2", "/watched", json!([]));
    assert_eq!(answer["status"], 401, "{answer}");
}

#[test]
fn an_upstream_that_refuses_is_heard_by_the_client() {
    let world = World::new("", "");
    for by in BY {
        let (_, answer) = Socket::open(&world.weir.address, by, "/refused", json!([]));
        assert_eq!(
            (&answer["status"], &answer["refusal"]),
            (&json!(403), &json!("not you\n")),
            "{by}: {answer}"
        );
    }
    // A 200 would be taken for the WebSocket.
    let (_, answer) = Socket::open(&world.weir.address, "http2", "/plain", json!([]));
    assert_eq!(answer["status"], 502, "{answer}");
    assert!(
        answer["fields"]["proxy-status"]
            .as_str()
            .unwrap()
            .contains("not_switched"),
        "{answer}"
    );
}

#[test]
fn what_the_client_asks_for_is_agreed_with_the_upstream() {
    let world = World::new("", "");
    for by in BY {
        let fields = json!([
            ["Sec-WebSocket-Protocol", "superchat, chat"],
            ["Origin", "http://x.example"]
        ]);
        let (_, answer) = Socket::open(&world.weir.address, by, "/echo", fields);
        assert_eq!(
            answer["fields"]["sec-websocket-protocol"], "chat",
            "{answer}"
        );
        // By HTTP/2 the key is between weir and the upstream.
        let accept = &answer["fields"]["sec-websocket-accept"];
        assert_eq!(accept.is_null(), by == "http2", "{answer}");
    }
    let version = json!([["Sec-WebSocket-Version", "12"]]);
    let (_, answer) = Socket::open(&world.weir.address, "http2", "/echo", version);
    assert!(answer["status"].as_u64().unwrap() >= 400, "{answer}");
}

#[test]
fn an_upstream_that_does_not_answer_the_key_opens_nothing() {
    for reply in [
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
    ] {
        let upstream = scripted(move |mut stream| {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(reply.as_bytes());
            let _ = stream.read(&mut request);
        });
        let (weir, _config) = weir(&upstream.to_string(), "", "");
        let (_, answer) = Socket::open(&weir.address, "http2", "/echo", json!([]));
        assert_eq!(answer["status"], 502, "{answer}");
    }
}

#[test]
fn another_protocol_by_connect_is_not_implemented() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.db");
    let audit = format!(", audit: {{sqlite: {{path: '{}'}}}}", file.display());
    let world = World::new("", &audit);
    let mut client = Peer::start("ws_client.py", &[]);
    let address = &world.weir.address;
    let answer = client.ask(&json!({"do": "open", "address": address, "by": "http2", "path": "/echo", "protocol": "connect-udp"}));
    assert_eq!(answer["status"], 501, "{answer}");
    let refused = r#"weir_rejections_total{reason="other_protocol"}"#;
    assert_eq!(world.weir.metric(refused), 1);
    // On record as what it asked for.
    let mut events = Vec::new();
    eventually(|| {
        events = audited(world._config.path(), &[]);
        !events.is_empty()
    });
    let told = ["method", "host", "path", "status", "label"].map(|key| events[0][key].clone());
    let expected = json!(["GET", address, "/echo", 501, "other_protocol"]);
    assert_eq!(json!(told), expected, "{events:?}");

    // One that does not say that it takes them.
    let upstream = echo_by_http2(false);
    let (weir, _config) = before_http2(upstream);
    let (_, answer) = Socket::open(&weir.address, "http2", "/echo", json!([]));
    assert_eq!(answer["status"], 501, "{answer}");
}

fn before_http2(upstream: SocketAddr) -> (Running, NamedTempFile) {
    let config = file(&format!(
        "{{listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: 2s}}}}], \
         upstreams: {{app: {{endpoints: ['http://{upstream}'], connect_timeout: 60s, protocol: http2}}}}, admin: {{address: '127.0.0.1:0'}}}}"
    ));
    (Running::start(config.path()), config)
}

/// An upstream of HTTP/2 that echoes WebSockets' short frames, but at `/refused`, and answers their Close frames; with whether it says
/// that it takes them.
fn echo_by_http2(takes: bool) -> SocketAddr {
    scripted(move |stream| {
        stream.set_nonblocking(true).unwrap();
        run(async {
            let stream = tokio::net::TcpStream::from_std(stream).unwrap();
            let mut settings = h2::server::Builder::new();
            if takes {
                settings.enable_connect_protocol();
            }
            let mut connection = settings.handshake::<_, Bytes>(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(echo(request, respond));
            }
        });
    })
}

async fn echo(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let protocol = request.extensions().get::<Protocol>();
    assert_eq!(protocol.map(Protocol::as_str), Some("websocket"));
    assert_eq!(request.method(), "CONNECT");
    let fields = request.headers();
    assert!(fields.contains_key("sec-websocket-version"));
    for gone in ["sec-websocket-key", "upgrade", "connection"] {
        assert!(!fields.contains_key(gone), "{gone}");
    }
    let answer = |status: u16| Response::builder().status(status);
    if request.uri().path() == "/refused" {
        let answer = answer(403).body(()).unwrap();
        let mut body = respond.send_response(answer, false).unwrap();
        body.send_data(Bytes::from_static(b"not you\n"), true)
            .unwrap();
        return;
    }
    let agreed = answer(200).header("sec-websocket-protocol", "chat");
    let mut writes = respond
        .send_response(agreed.body(()).unwrap(), false)
        .unwrap();
    let (mut reads, mut came) = (request.into_body(), Vec::new());
    while let Some(Ok(data)) = reads.data().await {
        reads.flow_control().release_capacity(data.len()).unwrap();
        came.extend_from_slice(&data);
        // A head of two bytes, a mask of four, and what they say the length is.
        while let [first, second, rest @ ..] = &came[..]
            && let length = usize::from(second & 127)
            && let Some((mask, rest)) = rest.split_at_checked(4)
            && rest.len() >= length
        {
            let text = rest[..length].iter().zip(mask.iter().cycle());
            let text: Vec<_> = text.map(|(byte, mask)| byte ^ mask).collect();
            let is_close = first & 15 == 8;
            let frame = [&[*first, second & 127], &text[..]].concat();
            came.drain(..6 + length);
            writes.send_data(frame.into(), is_close).unwrap();
            if is_close {
                return;
            }
        }
    }
}

#[test]
fn a_websocket_goes_on_by_http2() {
    let (weir, _config) = before_http2(echo_by_http2(true));
    let protocols = json!([["Sec-WebSocket-Protocol", "superchat, chat"]]);
    let open = |path| Socket::open(&weir.address, "http2", path, protocols.clone());
    let mut sockets = [0, 1, 2].map(|_| {
        let (socket, answer) = open("/echo");
        assert_eq!(answer["status"], 200, "{answer}");
        assert_eq!(answer["fields"]["sec-websocket-protocol"], "chat");
        socket
    });
    for text in ["hello", "once more"] {
        sockets.iter_mut().for_each(|socket| socket.echoes(text));
    }
    let (_, answer) = open("/refused");
    assert_eq!(
        (&answer["status"], &answer["refusal"]),
        (&json!(403), &json!("not you\n")),
        "{answer}"
    );
    // What ends it by HTTP/1.1 ends it here.
    let [mut idle, mut drained, _] = sockets;
    idle.wait();
    assert_eq!(idle.0.answer()["frames"], json!(["88 03e9"]));
    drop(drained);
    drained = open("/echo").0;
    drained.echoes("hello");
    drained.wait();
    weir.signal("TERM");
    assert_eq!(drained.0.answer()["frames"], json!(["88 03e9"]));
}

#[test]
fn limits_hold_for_a_websocket_by_http2() {
    let routes = "routes: [{upstream: app, match: {methods: [GET]}, rate_limits: [two]}]";
    let limits = "rate_limits: {two: {limit: 2/month, algorithm: fixed_window, by: constant}}";
    let world = World::new("", &format!(", {routes}, {limits}"));
    let mut sockets = [0, 1].map(|_| world.open("http2", "/echo", json!([])));
    for socket in &mut sockets {
        socket.echoes("hello");
    }
    let (_, answer) = Socket::open(&world.weir.address, "http2", "/echo", json!([]));
    assert_eq!(answer["status"], 429, "{answer}");
}

/// As in Envoy, whose `max_requests` counts an upgraded connection until it ends.
#[test]
fn a_websocket_is_a_request_for_as_long_as_it_is_open() {
    let mut server = Peer::start("ws_server.py", &[]);
    let server = format!("127.0.0.1:{}", server.line());
    let config = file(&format!(
        "{{listen: '127.0.0.1:0', admin: {{address: '127.0.0.1:0'}}, rate_limits: {{one: {{limit: 1, algorithm: concurrency, by: constant}}}}, \
         upstreams: {{capped: {{endpoints: ['http://{server}'], concurrency: {{max: 1, pending: 0}}}}, app: {{endpoints: ['http://{server}']}}}}, \
         routes: [{{match: {{path: /watched}}, upstream: capped}}, {{match: {{path: /echo}}, upstream: app, rate_limits: [one]}}]}}"
    ));
    let weir = Running::start(config.path());
    for by in BY {
        for (path, refused) in [("/watched", 503), ("/echo", 429)] {
            let open = || Socket::open(&weir.address, by, path, json!([]));
            let (mut socket, answer) = open();
            assert_eq!(answer["status"], 200, "{by} {path}: {answer}");
            socket.echoes("hello");
            for _ in 0..2 {
                assert_eq!(open().1["status"], refused, "{by} {path}");
            }
            socket.echoes("still here");
            drop(socket);
            eventually(|| open().1["status"] == 200);
            // The last one has ended, too.
            eventually(|| open().1["status"] == 200);
        }
    }
}

#[test]
fn another_protocol_lives_on_during_the_drain() {
    let upstream = scripted(|mut stream| {
        let mut bytes = [0; 4096];
        let _ = stream.read(&mut bytes);
        let _ = stream.write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        );
        while let Ok(some @ 1..) = stream.read(&mut bytes) {
            let _ = stream.write_all(&bytes[..some]);
        }
    });
    let (weir, _config) = weir(&upstream.to_string(), "", "");
    let mut client = weir.connect();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    client.write_all(request).unwrap();
    let head = read_head(&mut client).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    weir.signal("TERM");
    weir.log_until("draining");
    let mut echoed = [0; 5];
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"hello");
}

#[test]
fn the_audit_counts_the_bytes_of_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.db");
    let audit = format!(", audit: {{sqlite: {{path: '{}'}}}}", file.display());
    let world = World::new("", &audit);
    for by in BY {
        let mut socket = world.open(by, "/echo", json!([]));
        socket.echoes(&"x".repeat(1000));
    }
    let mut events = Vec::new();
    eventually(|| {
        events = audited(world._config.path(), &[]);
        events.len() == BY.len()
    });
    for event in events {
        // A frame of 1,000 bytes has 4 before them, and 4 more to the server.
        let (up, down) = (&event["bytes_in"], &event["bytes_out"]);
        let (up, down) = (up.as_u64().unwrap(), down.as_u64().unwrap());
        assert!((1008..1100).contains(&up), "{event}");
        assert!((1004..1100).contains(&down), "{event}");
    }
}
