//! Frames that no peer sends (RFC 9113 sections 3.4, 4, 5.1, 6 and RFC 7541).

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use super::harness::frames::{
    self as h2, ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Ended, FLOW_CONTROL_ERROR,
    GOAWAY, HEADERS, PADDED, PING, PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, RST_STREAM, Raw,
    SETTINGS,
};
use super::harness::raw::scripted;
use super::harness::{Lane, eventually};
use super::{Parted, Refused, Reset, Verdict, World, assert_verdict};

const BAD: Verdict = Parted(PROTOCOL_ERROR);
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE: Verdict = Parted(6);
const COMPRESSION: Verdict = Parted(9);

/// A whole request on stream 1, and its answer is not read before what follows is sent.
fn get() -> Vec<u8> {
    h2::get(1, "/fine")
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    h2::frame(kind, flags, stream, payload)
}

fn settings(name: u16, value: u32) -> Vec<u8> {
    h2::settings(&[(name, value)])
}

/// A head of this block.
fn block(block: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, 1, block)
}

#[test]
fn a_frame_out_of_place_ends_the_connection() {
    let mut world = World::new();
    let usual = h2::block(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", "/p"),
    ]);
    let zeros = [0; 16];
    let open = h2::request(1, 0, "POST", "/p", &[]);
    let large = vec![0; 16_385];
    for (name, frames, verdict) in [
        // Section 5.1.1.
        (
            "HEADERS on stream 0",
            frame(HEADERS, END_HEADERS | END_STREAM, 0, &usual),
            BAD,
        ),
        (
            "HEADERS on an even stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 2, &usual),
            BAD,
        ),
        (
            "HEADERS on a lower stream",
            [h2::get(3, "/fine"), h2::get(1, "/p")].concat(),
            BAD,
        ),
        // Section 6.1.
        ("DATA on stream 0", frame(DATA, 0, 0, b"abc"), BAD),
        ("DATA on an idle stream", frame(DATA, 0, 1, b"abc"), BAD),
        ("DATA on an even stream", frame(DATA, 0, 2, b"abc"), BAD),
        (
            "DATA padded beyond its end",
            [open.clone(), frame(DATA, PADDED, 1, &[5, 0, 0])].concat(),
            BAD,
        ),
        (
            "DATA padded without a length",
            [open.clone(), frame(DATA, PADDED, 1, &[])].concat(),
            BAD,
        ),
        // Section 6.2.
        (
            "HEADERS padded beyond their end",
            frame(HEADERS, PADDED | END_HEADERS | END_STREAM, 1, &[200, 0x82]),
            BAD,
        ),
        (
            "HEADERS that depend on themselves",
            frame(
                HEADERS,
                0x20 | END_HEADERS | END_STREAM,
                1,
                &[&[0, 0, 0, 1, 0], &*usual].concat(),
            ),
            Reset(PROTOCOL_ERROR),
        ),
        // Sections 6.3 to 6.5.
        (
            "PRIORITY on stream 0",
            frame(PRIORITY, 0, 0, &zeros[..5]),
            BAD,
        ),
        ("RST_STREAM on stream 0", h2::reset(0, 0), BAD),
        ("RST_STREAM on an idle stream", h2::reset(1, 0), BAD),
        (
            "RST_STREAM of 3 bytes",
            [open.clone(), frame(RST_STREAM, 0, 1, &zeros[..3])].concat(),
            FRAME_SIZE,
        ),
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[]), BAD),
        (
            "SETTINGS of 5 bytes",
            frame(SETTINGS, 0, 0, &zeros[..5]),
            FRAME_SIZE,
        ),
        (
            "SETTINGS acknowledged with settings",
            frame(SETTINGS, ACK, 0, &zeros[..6]),
            FRAME_SIZE,
        ),
        ("ENABLE_PUSH of 2", settings(2, 2), BAD),
        (
            "INITIAL_WINDOW_SIZE of 2^31",
            settings(4, 1 << 31),
            Parted(FLOW_CONTROL_ERROR),
        ),
        ("MAX_FRAME_SIZE of 16383", settings(5, 16_383), BAD),
        ("MAX_FRAME_SIZE of 2^24", settings(5, 1 << 24), BAD),
        ("ENABLE_CONNECT_PROTOCOL of 2", settings(8, 2), BAD),
        // Sections 6.6 to 6.8.
        (
            "PUSH_PROMISE",
            frame(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 2], &*usual].concat(),
            ),
            BAD,
        ),
        (
            "PING of 7 bytes",
            frame(PING, 0, 0, &zeros[..7]),
            FRAME_SIZE,
        ),
        ("PING on a stream", frame(PING, 0, 1, &zeros[..8]), BAD),
        ("GOAWAY on a stream", frame(GOAWAY, 0, 1, &zeros[..8]), BAD),
        (
            "GOAWAY of 7 bytes",
            frame(GOAWAY, 0, 0, &zeros[..7]),
            FRAME_SIZE,
        ),
        // Section 6.9.
        ("WINDOW_UPDATE of 0", h2::window_update(0, 0), BAD),
        (
            "WINDOW_UPDATE over 2^31-1",
            h2::window_update(0, i32::MAX.unsigned_abs()),
            Parted(FLOW_CONTROL_ERROR),
        ),
        (
            "WINDOW_UPDATE on an idle stream",
            h2::window_update(1, 1),
            BAD,
        ),
        (
            "WINDOW_UPDATE of 3 bytes",
            frame(h2::WINDOW_UPDATE, 0, 0, &zeros[..3]),
            FRAME_SIZE,
        ),
        (
            "WINDOW_UPDATE of 0 on a stream",
            [open.clone(), h2::window_update(1, 0)].concat(),
            Reset(PROTOCOL_ERROR),
        ),
        (
            "WINDOW_UPDATE over 2^31-1 on a stream",
            [open.clone(), h2::window_update(1, i32::MAX.unsigned_abs())].concat(),
            Reset(FLOW_CONTROL_ERROR),
        ),
        // Section 6.10.
        (
            "CONTINUATION of nothing",
            frame(CONTINUATION, END_HEADERS, 1, &usual),
            BAD,
        ),
        (
            "CONTINUATION behind a whole head",
            [open.clone(), frame(CONTINUATION, END_HEADERS, 1, &usual)].concat(),
            BAD,
        ),
        (
            "DATA within a head",
            [frame(HEADERS, 0, 1, &usual), frame(DATA, 0, 1, b"abc")].concat(),
            BAD,
        ),
        (
            "PING within a head",
            [frame(HEADERS, 0, 1, &usual), frame(PING, 0, 0, &zeros[..8])].concat(),
            BAD,
        ),
        (
            "an unknown frame within a head",
            [frame(HEADERS, 0, 1, &usual), frame(200, 0, 1, &[])].concat(),
            BAD,
        ),
        (
            "CONTINUATION of another stream",
            [
                frame(HEADERS, 0, 1, &usual),
                frame(CONTINUATION, END_HEADERS, 3, &[]),
            ]
            .concat(),
            BAD,
        ),
        // Section 4.2.
        (
            "DATA over MAX_FRAME_SIZE",
            [open.clone(), frame(DATA, 0, 1, &large)].concat(),
            FRAME_SIZE,
        ),
        (
            "an unknown frame over MAX_FRAME_SIZE",
            frame(200, 0, 0, &large),
            FRAME_SIZE,
        ),
        (
            "HEADERS over MAX_FRAME_SIZE",
            frame(HEADERS, END_HEADERS, 1, &large),
            FRAME_SIZE,
        ),
        // Section 4.3; RFC 7541.
        ("index 0", block(&[0x80]), COMPRESSION),
        (
            "index beyond the tables",
            block(&[0xff, 0x80, 0x01]),
            COMPRESSION,
        ),
        (
            "name beyond the tables",
            block(&[0x7f, 0x80, 0x01, 1, b'a']),
            COMPRESSION,
        ),
        ("integer without end", block(&[0xff; 20]), COMPRESSION),
        ("text beyond the block", block(&[0, 100, b'a']), COMPRESSION),
        (
            "bad padding of Huffman's code",
            block(&[0, 0x81, 0, 0x81, 0]),
            COMPRESSION,
        ),
        (
            "end of Huffman's code within",
            block(&[0, 0x84, 0xff, 0xff, 0xff, 0xff, 1, b'a']),
            COMPRESSION,
        ),
        (
            "table over its bound",
            block(&[&[0x3f, 0xe1, 0x7f], &*usual].concat()),
            COMPRESSION,
        ),
        (
            "table changed behind a field",
            block(&[&*usual, &[0x20]].concat()),
            COMPRESSION,
        ),
    ] {
        assert_verdict(name, &world.send(&frames), verdict);
        world.has_sent_no_more(name);
    }
}

/// Section 5.1: the stream is closed, and says so; the connection may live.
#[test]
fn a_frame_behind_the_end_of_its_stream_is_an_error_of_it() {
    let mut world = World::new();
    for (name, more) in [
        ("DATA", frame(DATA, 0, 1, b"abc")),
        ("DATA that ends", frame(DATA, END_STREAM, 1, b"")),
        (
            "trailers",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                &h2::block(&[("a", "1")]),
            ),
        ),
        ("a second head", h2::get(1, "/smuggled")),
    ] {
        let mut raw = Raw::client(world.lane.address, &[]);
        raw.send(&[get(), more].concat());
        let answer = raw.answer(1);
        let of_stream = answer
            .reset
            .is_none_or(|code| [STREAM_CLOSED, PROTOCOL_ERROR].contains(&code));
        let of_connection = answer
            .farewell
            .is_none_or(|code| [STREAM_CLOSED, PROTOCOL_ERROR].contains(&code));
        assert!(of_stream && of_connection, "{name}: {answer:?}");
        assert_ne!(answer.ended, Some(Ended::Hung), "{name}");
        assert!(!world.upstream.bytes().contains("smuggled"), "{name}");
        assert_eq!(world.lane.connect().get("/fine").status, 200, "{name}");
    }
    world.fine = world.upstream.whole().len();
    world.is_fine("last");
}

/// Section 4.1: what no one knows is passed over.
#[test]
fn unknown_frames_and_settings_are_passed_over() {
    let world = World::new();
    let frames = [
        settings(0xfff, 7),
        frame(200, 0xff, 0, b"abc"),
        frame(200, 0xff, 9, b"abc"),
        frame(PRIORITY, 0, 7, &[0, 0, 0, 3, 9]),
        get(),
    ];
    assert_verdict("unknown", &world.send(&frames.concat()), Refused(200));
}

/// Section 3.4.
#[test]
fn a_connection_begins_with_the_preface_and_settings() {
    let world = World::new();
    let begin = |bytes: &[u8]| {
        let mut raw = Raw::of(TcpStream::connect(world.lane.address).unwrap());
        raw.send(bytes);
        raw.farewell()
    };
    let preface = h2::PREFACE;
    for (name, bytes) in [
        (
            "another preface",
            b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec(),
        ),
        ("an older one", b"PRI * HTTP/2.0\r\n\r\nST\r\n\r\n".to_vec()),
        (
            "HTTP/1.1 behind it",
            [preface, b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"].concat(),
        ),
        (
            "no settings first",
            [preface, &h2::get(1, "/fine")].concat(),
        ),
        (
            "settings that are none",
            [preface, &frame(SETTINGS, ACK, 0, &[]), &h2::get(1, "/fine")].concat(),
        ),
        ("twice", [preface, &h2::settings(&[]), preface].concat()),
    ] {
        let (_, ended) = begin(&bytes);
        assert_eq!(ended, Ended::Closed, "{name}");
        assert!(!world.upstream.bytes().contains("smuggled"), "{name}");
    }
    assert_eq!(world.lane.connect().get("/fine").status, 200);
}

/// Section 6.9: a sender that heeds no window is cut off, however little is read behind it.
#[test]
fn data_over_the_window_ends_its_stream() {
    let upstream = scripted(|stream| {
        thread::sleep(Duration::from_secs(20));
        drop(stream);
    });
    let lane = Lane::start(&format!(
        "listen: '127.0.0.1:0'\nupstream: http://{upstream}\n"
    ));
    let mut raw = Raw::client(lane.address, &[]);
    let mut other = Raw::of(raw.stream.try_clone().unwrap());
    let sending = thread::spawn(move || {
        other.send(&h2::request(1, 0, "POST", "/p", &[]));
        let part = frame(DATA, 0, 1, &[b'x'; 16_384]);
        (0..550).all(|_| other.send(&part))
    });
    let answer = raw.answer(1);
    assert_verdict("over", &answer, Reset(FLOW_CONTROL_ERROR));
    drop(raw);
    sending.join().unwrap();
}

/// The value of `weir_http2_connection_errors_total` for each code, in their order.
fn counted(world: &World) -> Vec<(String, u64)> {
    let text = world.lane.plan.borrow().metrics.text();
    let lines = text.lines();
    let counts = lines.filter_map(|line| line.strip_prefix("weir_http2_connection_errors_total{"));
    let mut counts: Vec<_> = counts
        .map(|line| {
            let (labels, count) = line.split_once("} ").unwrap();
            let (_, code) = labels.split_once("code=\"").unwrap();
            (
                code.trim_end_matches('"').to_owned(),
                count.parse().unwrap(),
            )
        })
        .collect();
    counts.sort();
    counts
}

#[test]
fn a_connection_that_ends_by_an_error_is_counted() {
    let mut world = World::new();
    world.is_fine("at first");
    // Streams that are reset are no connections that end.
    let malformed = world.send(&h2::request(1, END_STREAM, "GET", "/a b", &[]));
    assert_eq!(malformed.reset, Some(PROTOCOL_ERROR), "{malformed:?}");
    assert!(counted(&world).is_empty());
    let mut told = Vec::new();
    for frames in [
        frame(DATA, 0, 0, b"abc"),
        frame(DATA, 0, 1, b"abc"),
        frame(SETTINGS, 0, 0, &[0; 5]),
        h2::window_update(0, u32::MAX >> 1),
        block(&[0x80]),
        // What is begun, and not gone on with.
        get()[..5].to_vec(),
    ] {
        let code = world.send(&frames).farewell.unwrap();
        assert_ne!(code, h2::NO_ERROR);
        let code = weir::http2::errors::name(code).to_owned();
        match told.iter_mut().find(|(other, _)| *other == code) {
            Some((_, count)) => *count += 1,
            None => told.push((code, 1)),
        }
        told.sort();
        eventually(|| counted(&world) == told);
    }
    // Likewise, a part of what every connection begins with.
    let mut begun = TcpStream::connect(world.lane.address).unwrap();
    begun.write_all(&h2::PREFACE[..10]).unwrap();
    let calm = told
        .iter_mut()
        .find(|(code, _)| code == "enhance_your_calm");
    calm.unwrap().1 += 1;
    eventually(|| counted(&world) == told);
    let codes: Vec<_> = told.iter().map(|(code, _)| &**code).collect();
    assert!(codes.len() > 2, "{told:?}");
    assert!(codes.contains(&"protocol_error") && codes.contains(&"enhance_your_calm"));
}
