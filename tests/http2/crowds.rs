//! Many streams of one connection, most of which are not read: they hold no other up.

use std::io::{Read as _, Write as _};
use std::sync::mpsc;

use super::harness::frames::{self, DATA, END_STREAM, Raw, SETTINGS};
use super::harness::raw::scripted;
use super::harness::versions::{Client, Length, Origin, Outgoing, Version, is_quiet, run, soon};
use super::harness::{DEADLINE, Lane};

/// Streams that are not read, and bytes of each: more together than weir's windows once were, by few large ones and by many small ones.
const DOWN: [(usize, usize); 2] = [(6, 256 << 10), (126, 9 << 10)];
const UP: [(usize, usize); 2] = [(20, 64 << 10), (126, 9 << 10)];

/// What the others send.
const BODY: usize = 300_000;

/// A lane in front of two upstreams of HTTP/2. `/other` goes to the second.
fn lane(app: &Origin, other: &Origin) -> Lane {
    Lane::start(&format!(
        "listen: '127.0.0.1:0'\n\
         upstreams:\n  app: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2}}\n\
         \x20 other: {{endpoints: ['http://{}'], connect_timeout: 60s, protocol: http2}}\n\
         routes:\n  - {{match: {{path: /other}}, upstream: other}}\n  - {{upstream: app}}\n",
        app.address, other.address
    ))
}

/// A client, or an upstream, that takes no body.
const NOTHING: u32 = 0;

async fn client_that_takes_nothing(lane: &Lane) -> Client {
    let mut settings = h2::client::Builder::new();
    Client::with(settings.initial_window_size(NOTHING), lane.address).await
}

async fn origin_that_takes_nothing() -> Origin {
    let mut settings = h2::server::Builder::new();
    Origin::with(Version::Two, settings.initial_window_size(NOTHING)).await
}

#[test]
fn responses_that_are_not_read_hold_no_other_up() {
    for (streams, each) in DOWN {
        run(async {
            let mut origin = Origin::start(Version::Two).await;
            let lane = lane(&origin, &origin);
            let mut stalled = client_that_takes_nothing(&lane).await;
            let mut held = Vec::new();
            for _ in 0..streams {
                let call = stalled.get("/").await;
                let mut asked = origin.asked().await;
                let mut out = asked.reply(200, &[], Length::Unknown).await;
                soon(out.send(&vec![b'x'; each])).await.unwrap();
                held.push((call, asked, out));
            }
            for version in [Version::One, Version::Two] {
                let mut client = Client::connect(version, lane.address).await;
                let call = client.get("/").await;
                let mut asked = origin.asked().await;
                assert_eq!(asked.connection, held[0].1.connection);
                let mut out = asked.reply(200, &[], Length::Unknown).await;
                let send = async { soon(out.finish(&[b'x'; BODY])).await.unwrap() };
                let ((), (status, body)) = tokio::join!(send, call.whole());
                assert_eq!((status, body.len()), (200, BODY));
            }
        });
    }
}

#[test]
fn requests_that_are_not_read_hold_no_other_up() {
    for (streams, each) in UP {
        run(async {
            let mut stalled = origin_that_takes_nothing().await;
            let mut other = Origin::start(Version::Two).await;
            let lane = lane(&stalled, &other);
            let mut client = Client::connect(Version::Two, lane.address).await;
            let mut held = Vec::new();
            for _ in 0..streams {
                let mut call = client.call("POST", "/", &[], Length::Unknown).await;
                let asked = stalled.asked().await;
                soon(call.body.send(&vec![b'x'; each])).await.unwrap();
                held.push((call, asked));
            }
            let mut call = client.call("POST", "/other", &[], Length::Unknown).await;
            let mut asked = other.asked().await;
            let send = async { soon(call.body.finish(&[b'x'; BODY])).await.unwrap() };
            let ((), came) = tokio::join!(send, asked.body.rest());
            assert_eq!(came.unwrap().0.len(), BODY);
            asked.ok("").await;
            assert_eq!(call.whole().await.0, 200);
        });
    }
}

/// Messages of gRPC's: each a frame of 30 bytes, of which a window has room for thousands.
const MESSAGE: [u8; 30] = [b'm'; 30];

/// Streams and messages of each, as many as a window takes: together more than `h2` keeps of small frames.
const SMALL_DOWN: (usize, usize) = (20, 8_000);
const SMALL_UP: (usize, usize) = (20, 2_100);

#[test]
fn small_messages_that_are_not_read_end_no_connection() {
    run(async {
        let mut origin = Origin::start(Version::Two).await;
        let lane = lane(&origin, &origin);
        let mut stalled = client_that_takes_nothing(&lane).await;
        let mut held = Vec::new();
        for _ in 0..SMALL_DOWN.0 {
            let call = stalled.get("/").await;
            let mut asked = origin.asked().await;
            let mut out = asked.reply(200, &[], Length::Unknown).await;
            send_small(&mut out, SMALL_DOWN.1).await;
            held.push((call, asked, out));
        }
        let mut client = Client::connect(Version::Two, lane.address).await;
        let call = client.get("/").await;
        origin.asked().await.ok("others").await;
        assert_eq!(call.whole().await, (200, "others".to_owned()));
        let (_, asked, out) = &mut held[0];
        assert!(is_quiet(asked.taken_back(out)).await);
        assert_eq!(origin.opened(), 1);
    });
}

#[test]
fn small_messages_that_no_upstream_reads_end_no_connection() {
    run(async {
        let mut stalled = origin_that_takes_nothing().await;
        let mut other = Origin::start(Version::Two).await;
        let lane = lane(&stalled, &other);
        let mut client = Client::connect(Version::Two, lane.address).await;
        let mut held = Vec::new();
        for _ in 0..SMALL_UP.0 {
            let mut call = client.call("POST", "/", &[], Length::Unknown).await;
            let asked = stalled.asked().await;
            send_small(&mut call.body, SMALL_UP.1).await;
            held.push((call, asked));
        }
        let call = client.get("/other").await;
        other.asked().await.ok("others").await;
        assert_eq!(call.whole().await, (200, "others".to_owned()));
        let (_, asked) = &mut held[0];
        assert!(is_quiet(asked.taken_back(&mut Outgoing::Ended)).await);
    });
}

async fn send_small(out: &mut Outgoing, messages: usize) {
    for _ in 0..messages {
        soon(out.send(&MESSAGE)).await.unwrap();
    }
}

/// A write and a segment for each byte would be a flood of weir's own.
#[test]
fn small_frames_that_came_together_go_on_together() {
    const BYTES: usize = 5_000;
    let (told, seen) = mpsc::channel();
    let upstream = scripted(move |mut stream| {
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while !text.ends_with(b"\r\n0\r\n\r\n") {
            match stream.read(&mut piece) {
                Ok(read @ 1..) => text.extend_from_slice(&piece[..read]),
                Ok(0) | Err(_) => return,
            }
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        let _ = told.send(String::from_utf8(text).unwrap());
    });
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\nupstream: http://{upstream}\n"
    ));
    let mut client = Raw::client(lane.address, &[]);
    client.until(|frame| frame.kind == SETTINGS && frame.flags == frames::ACK);
    let mut sent = frames::request(1, 0, "POST", "/", &[]);
    sent.extend(frames::frame(DATA, 0, 1, b"b").repeat(BYTES));
    sent.extend(frames::frame(DATA, END_STREAM, 1, b""));
    client.send(&sent);
    assert_eq!(client.answer(1).status, Some(200));
    let text = seen.recv_timeout(DEADLINE).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let data = body.split("\r\n").skip(1).step_by(2);
    let data: Vec<_> = data.take_while(|data| !data.is_empty()).collect();
    assert_eq!(data.concat().len(), BYTES);
    println!("{BYTES} frames became {} chunks", data.len());
    assert!(data.len() < BYTES / 20, "{}", data.len());
}
