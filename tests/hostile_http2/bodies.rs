//! Bodies that are not what their heads say (RFC 9113 section 8.1.1), and what stands behind them: no such request reaches the
//! upstream whole.

use std::time::Duration;

use super::harness::at_once;
use super::harness::frames::{
    self as h2, DATA, END_HEADERS, END_STREAM, HEADERS, NO_ERROR, PADDED, PROTOCOL_ERROR, Raw,
    WINDOW_UPDATE,
};
use super::{Refused, Reset, Verdict, World, assert_verdict};

const MALFORMED: Verdict = Reset(PROTOCOL_ERROR);

/// A POST with these fields, whose head ends its stream where `flags` say so.
fn post(flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    h2::request(1, flags, "POST", "/p", fields)
}

fn data(flags: u8, data: &str) -> Vec<u8> {
    h2::frame(DATA, flags, 1, data.as_bytes())
}

fn trailers(flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    h2::frame(HEADERS, flags | END_HEADERS, 1, &h2::block(fields))
}

#[test]
fn a_body_is_as_long_as_it_says() {
    let mut world = World::new();
    let length = |value: &str, body: &[Vec<u8>]| {
        [&[post(0, &[("content-length", value)])][..], body]
            .concat()
            .concat()
    };
    let ended = |values: &[&str]| {
        let fields: Vec<_> = values
            .iter()
            .map(|value| ("content-length", *value))
            .collect();
        post(END_STREAM, &fields)
    };
    let five = [data(END_STREAM, "abcde")];
    for (name, frames, verdict) in [
        ("a length and no body", ended(&["5"]), MALFORMED),
        ("no number, no body", ended(&["x"]), MALFORMED),
        ("two lengths, no body", ended(&["0", "5"]), MALFORMED),
        (
            "one length twice, no body",
            ended(&["0", "0"]),
            Refused(400),
        ),
        ("too short", length("6", &five), MALFORMED),
        ("too long", length("4", &five), MALFORMED),
        (
            "too long, not ended",
            length("4", &[data(0, "abcde")]),
            MALFORMED,
        ),
        (
            "too short, then trailers",
            length(
                "6",
                &[data(0, "abcde"), trailers(END_STREAM, &[("a", "1")])],
            ),
            MALFORMED,
        ),
        (
            "none, then an end",
            length("5", &[data(END_STREAM, "")]),
            MALFORMED,
        ),
        ("no number", length("five", &five), MALFORMED),
        ("signed", length("+5", &five), MALFORMED),
        ("negative", length("-5", &five), MALFORMED),
        ("hexadecimal", length("0x5", &five), MALFORMED),
        ("list", length("5, 5", &five), MALFORMED),
        ("empty", length("", &five), MALFORMED),
        (
            "over 64 bits",
            length("18446744073709551621", &five),
            MALFORMED,
        ),
        ("over the limit", length("65537", &[]), Refused(413)),
        (
            "a coding",
            [
                post(0, &[("transfer-encoding", "chunked")]),
                data(
                    END_STREAM,
                    "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
                ),
            ]
            .concat(),
            MALFORMED,
        ),
    ] {
        assert_verdict(name, &world.send(&frames), verdict);
        world.is_fine(name);
    }
}

/// What looks like framing in a body is data there, and stays it.
#[test]
fn a_body_is_no_framing() {
    let world = World::new();
    let body = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let answer = world.send(&[post(0, &[]), data(END_STREAM, body)].concat());
    assert_eq!(answer.status, Some(200));
    let seen = world.upstream.bytes();
    let chunk = format!("\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    assert!(seen.ends_with(&chunk), "{seen}");
}

/// RFC 9113 section 8.1.
#[test]
fn trailers_are_fields_and_the_end() {
    let mut world = World::new();
    let behind = |frames: Vec<u8>| [post(0, &[]), data(0, "abc"), frames].concat();
    for (name, frames, verdict) in [
        ("no end", behind(trailers(0, &[("a", "1")])), MALFORMED),
        (
            "upper case",
            behind(trailers(END_STREAM, &[("A", "1")])),
            MALFORMED,
        ),
        (
            "connection",
            behind(trailers(END_STREAM, &[("connection", "close")])),
            MALFORMED,
        ),
        (
            "transfer-encoding",
            behind(trailers(END_STREAM, &[("transfer-encoding", "chunked")])),
            MALFORMED,
        ),
        (
            "CR LF",
            behind(trailers(
                END_STREAM,
                &[("a", "1\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")],
            )),
            MALFORMED,
        ),
    ] {
        assert_verdict(name, &world.send(&frames), verdict);
        world.is_fine(name);
    }
}

/// The upstream has what was in order; what is too much it never sees.
#[test]
fn what_is_too_much_stays_here() {
    let world = World::new();
    for (length, first) in [("4", "abcd"), ("0", "")] {
        let frames = [
            post(0, &[("content-length", length)]),
            data(0, first),
            data(END_STREAM, "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"),
        ];
        let answer = world.send(&frames.concat());
        assert!(
            answer.reset == Some(PROTOCOL_ERROR) || answer.status == Some(200),
            "{answer:?}"
        );
        assert!(!world.upstream.bytes().contains("smuggled"));
    }
}

/// `h2` passes over what looks like a pseudo-header there (section 8.1 calls it malformed), and over what is too large.
#[test]
fn what_has_no_place_behind_a_body_goes_nowhere() {
    let world = World::new();
    let large = trailers(END_STREAM, &[("x-large", &"a".repeat(5000)), ("a", "1")]);
    // Of letters that no request id has.
    let named = |name| trailers(END_STREAM, &[(name, "NOWHERE"), ("a", "1")]);
    let pseudo = [":path", ":method", ":authority", ":status"].map(named);
    at_once(pseudo.into_iter().chain([large]), |trailers| {
        world.send(&[post(0, &[]), data(0, "abc"), trailers].concat());
    });
    let seen = world.upstream.bytes();
    assert!(!seen.contains("x-large"), "{seen}");
    assert!(!seen.contains("NOWHERE"), "{seen}");
    assert!(
        !seen.contains(":path") && !seen.contains(":authority"),
        "{seen}"
    );
}

/// RFC 9113 section 6.1.
#[test]
fn padding_is_no_part_of_a_body() {
    let world = World::new();
    let padded = |pad: u8, data: &[u8], zeros: usize| {
        let payload = [&[pad], data, &vec![0; zeros]].concat();
        h2::frame(DATA, PADDED | END_STREAM, 1, &payload)
    };
    let head = post(0, &[("content-length", "3")]);
    let answer = world.send(&[head, padded(200, b"abc", 200)].concat());
    assert_eq!(answer.status, Some(200));
    assert!(world.upstream.bytes().ends_with("\r\n\r\nabc"));
}

/// Each part of a body counts anew, but the whole has its time, too.
#[test]
fn a_slow_body_is_refused() {
    let mut world = World::new();
    // Nothing for `stream_idle`.
    let answer = world.send(&[post(0, &[]), data(0, "a")].concat());
    assert_verdict("stalled", &answer, Refused(408));
    assert_eq!(answer.reset.unwrap_or(NO_ERROR), NO_ERROR);
    world.is_fine("stalled");
    // A byte now and then, for longer than `request_read`.
    let mut raw = Raw::client(world.lane.address, &[]);
    raw.send(&post(0, &[]));
    let mut other = Raw::of(raw.stream.try_clone().unwrap());
    let dripping = std::thread::spawn(move || {
        for _ in 0..40 {
            other.send(&data(0, "a"));
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    assert_verdict("dripping", &raw.answer(1), Refused(408));
    dripping.join().unwrap();
    world.is_fine("dripping");
}

/// Over the limit in parts, without a length.
#[test]
fn a_body_over_the_limit_is_refused() {
    let mut world = World::new();
    let part = data(0, &"a".repeat(10_000));
    let mut raw = Raw::client(world.lane.address, &[]);
    raw.send(&post(0, &[]));
    raw.send(&part.repeat(6));
    // No more than the window has room for.
    raw.until(|frame| frame.kind == WINDOW_UPDATE && frame.stream == 1);
    raw.send(&part);
    assert_verdict("parts", &raw.answer(1), Refused(413));
    world.is_fine("parts");
}
