//! Upstreams of HTTP/2 that lie, flood or talk nonsense: the client gets a reply or an abort in a bounded time, the right bytes or
//! none, and the lane still serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::harness::Lane;
use super::harness::frames::{
    self as h2, CONTINUATION, DATA, END_HEADERS, END_STREAM, Ended, HEADERS, PADDED, PING,
    PUSH_PROMISE, Raw, SETTINGS,
};
use super::harness::raw::{self, End, scripted};

/// The longest that any trouble takes here: what a timeout ends ends in 800 ms.
const BOUND: Duration = Duration::from_secs(5);

/// What the upstream does behind its lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It answers as if nothing had been.
    Answers,
    Closes,
    /// It closes as the next request comes, since no frame of it would be understood.
    Dies,
}

/// A lane in front of an upstream that answers the first request, on stream 1, by these frames, and all others with a 200. No more time
/// is over than what ends that request by its `verdict`.
fn before(frames: Vec<u8>, then: Then, verdict: Verdict) -> Lane {
    let (timeout, stream_idle) = match verdict {
        Refused(504) => ("800ms", "60s"),
        CutOff => ("60s", "800ms"),
        Refused(_) | Whole => ("60s", "60s"),
    };
    let lies = Arc::new(AtomicBool::new(true));
    let upstream = scripted(move |stream| {
        let Some(mut raw) = Raw::server(stream, &[]) else {
            return;
        };
        let mut lied = false;
        while let Ok(frame) = raw.next() {
            if frame.kind != HEADERS {
                continue;
            }
            if lied && then == Then::Dies {
                return;
            }
            if lies.swap(false, Ordering::Relaxed) {
                raw.send(&frames);
                lied = true;
                if then == Then::Closes {
                    return;
                }
            } else {
                raw.send(&head(frame.stream, END_STREAM, &[(":status", "200")]));
            }
        }
    });
    Lane::start(&format!(
        "listeners: [{{address: '127.0.0.1:0', timeouts: {{stream_idle: {stream_idle}}}}}]\n\
         upstreams: {{app: {{endpoints: ['http://{upstream}'], protocol: http2, timeout: {timeout}, connect_timeout: 60s}}}}\n"
    ))
}

fn head(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    h2::frame(HEADERS, flags | END_HEADERS, stream, &h2::block(fields))
}

fn data(flags: u8, data: &[u8]) -> Vec<u8> {
    h2::frame(DATA, flags, 1, data)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// By weir.
    Refused(u16),
    /// The head, and then an abort.
    CutOff,
    Whole,
}
use Verdict::{CutOff, Refused, Whole};

/// What a client of each version makes of it.
#[expect(clippy::disallowed_methods, reason = "a bound on time")]
fn check(name: &str, frames: &[u8], verdict: Verdict) {
    let thens = match name.split(' ').next() {
        Some("half") => &[Then::Dies, Then::Closes][..],
        // A close on the unread answers to a flood is a reset, which overtakes what stands before it.
        Some("floods") => &[Then::Answers],
        _ => &[Then::Answers, Then::Closes],
    };
    for then in thens {
        let name = format!("{name}, {then:?}");
        // What is cut short by a close is no stall.
        let verdict = match (verdict, then) {
            (Refused(504), Then::Closes) => Refused(502),
            _ => verdict,
        };
        let began = Instant::now();
        let lane = before(frames.to_vec(), *then, verdict);
        let mut wire = raw::send(
            lane.address,
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        );
        assert_ne!(wire.end, End::Hung, "{name}: {wire:?}");
        while wire.text.starts_with("HTTP/1.1 103 ") {
            wire.text = wire.text.split_once("\r\n\r\n").unwrap().1.to_owned();
        }
        assert!(wire.replies() <= 1, "{name}: {wire:?}");
        let (head, body) = wire.parts();
        let length = head
            .split("\r\nContent-Length: ")
            .nth(1)
            .or(head.split("\r\ncontent-length: ").nth(1));
        let length = length.map(|rest| rest.lines().next().unwrap().parse::<usize>().unwrap());
        let is_whole = length == Some(body.len()) || body.ends_with("0\r\n\r\n");
        let one = match (wire.status(), is_whole) {
            (Some(200), true) => Whole,
            (Some(200), false) => CutOff,
            (status, _) => Refused(status.unwrap_or_default()),
        };
        lane_is_fine(&name, &lane);

        let lane = before(frames.to_vec(), *then, verdict);
        let mut client = Raw::client(lane.address, &[]);
        client.send(&h2::get(1, "/"));
        let answer = client.answer(1);
        assert_eq!(answer.farewell, None, "{name}: {answer:?}");
        assert_ne!(answer.ended, Some(Ended::Hung), "{name}: {answer:?}");
        let two = match (answer.status, answer.whole) {
            (Some(200), true) => Whole,
            (Some(200), false) => CutOff,
            // A reset overtakes what was not sent yet, even the head.
            (None, false) => CutOff,
            (status, true) => Refused(status.unwrap_or_default()),
            (_, false) => panic!("{name}: {answer:?}"),
        };
        // The same connection serves on: the trouble was the upstream's.
        client.send(&h2::get(3, "/"));
        assert_eq!(client.answer(3).status, Some(200), "{name}");
        lane_is_fine(&name, &lane);
        // An end may overtake what stands before it.
        let among = |seen| seen == verdict || (verdict == CutOff && seen == Refused(502));
        assert!(
            among(one) && among(two),
            "{name}: {one:?}, {two:?}, not {verdict:?}: {wire:?} {answer:?}"
        );
        assert!(began.elapsed() < BOUND, "{name}: {:?}", began.elapsed());
    }
}

fn lane_is_fine(name: &str, lane: &Lane) {
    assert_eq!(lane.connect().get("/").status, 200, "{name}");
    assert_eq!(lane.plan.borrow().metrics.tasks.panics.get(), 0, "{name}");
}

#[test]
fn trouble_before_the_head_is_a_502_or_a_504() {
    let status = (":status", "200");
    let with = |fields: &[(&str, &str)]| head(1, END_STREAM, &[&[status], fields].concat());
    let large = "a".repeat(16_000);
    let many: Vec<_> = (0..150).map(|n| format!("a-{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (&**name, "1")).collect();
    let interim = head(1, 0, &[(":status", "103"), ("link", "</a>")]);
    let mut goes_on = h2::frame(HEADERS, END_STREAM, 1, &h2::block(&[status]));
    let mut endless = goes_on.clone();
    for n in 0..6 {
        let flags = if n == 5 { END_HEADERS } else { 0 };
        goes_on.extend(h2::frame(
            CONTINUATION,
            flags,
            1,
            &h2::literal(b"a", large.as_bytes()),
        ));
    }
    endless.extend(h2::frame(CONTINUATION, 0, 1, &[]).repeat(5000));
    for (name, frames, verdict) in [
        // RFC 9113 section 8.3.2.
        (
            "no status",
            head(1, END_STREAM, &[("a", "1")]),
            Refused(502),
        ),
        (
            "two statuses",
            head(1, END_STREAM, &[status, status]),
            Refused(502),
        ),
        (
            "status in words",
            head(1, END_STREAM, &[(":status", "OK")]),
            Refused(502),
        ),
        (
            "status of two digits",
            head(1, END_STREAM, &[(":status", "20")]),
            Refused(502),
        ),
        (
            "status of four digits",
            head(1, END_STREAM, &[(":status", "2000")]),
            Refused(502),
        ),
        (
            "status of class 0",
            head(1, END_STREAM, &[(":status", "099")]),
            Refused(502),
        ),
        (
            "status with a line",
            head(1, END_STREAM, &[(":status", "200 OK\r\nset-cookie: a=1")]),
            Refused(502),
        ),
        (
            "a switch",
            head(1, END_STREAM, &[(":status", "101")]),
            Refused(502),
        ),
        (
            "a switch that goes on",
            head(1, 0, &[(":status", "101")]),
            Refused(502),
        ),
        (
            "late status",
            head(1, END_STREAM, &[("a", "1"), status]),
            Refused(502),
        ),
        ("unknown pseudo-header", with(&[(":x", "/")]), Refused(502)),
        // Sections 8.2.1 and 8.2.2: responses split and joined.
        (
            "CR LF in a value",
            with(&[("a", "1\r\nset-cookie: a=1")]),
            Refused(502),
        ),
        (
            "CR LF in a name",
            with(&[("a: 1\r\nset-cookie", "a=1")]),
            Refused(502),
        ),
        ("NUL in a value", with(&[("a", "\0")]), Refused(502)),
        ("upper case", with(&[("A", "1")]), Refused(502)),
        ("connection", with(&[("connection", "close")]), Refused(502)),
        (
            "transfer-encoding",
            with(&[("transfer-encoding", "chunked")]),
            Refused(502),
        ),
        ("upgrade", with(&[("upgrade", "x")]), Refused(502)),
        // Section 8.1.1.
        (
            "a length and no body",
            with(&[("content-length", "5")]),
            Refused(502),
        ),
        (
            "a length that is none",
            with(&[("content-length", "x")]),
            Refused(502),
        ),
        (
            "two lengths",
            with(&[("content-length", "5"), ("content-length", "6")]),
            Refused(502),
        ),
        (
            "one length twice",
            with(&[("content-length", "0"), ("content-length", "0")]),
            Refused(502),
        ),
        ("DATA before the head", data(0, b"abc"), Refused(502)),
        (
            "trailers before the head",
            [interim.clone(), data(END_STREAM, b"")].concat(),
            Refused(502),
        ),
        (
            "an interim response that ends",
            head(1, END_STREAM, &[(":status", "103")]),
            Refused(502),
        ),
        (
            "a flood of interim responses",
            interim.repeat(1000),
            Refused(502),
        ),
        // Section 10.5.1.
        ("too large", goes_on, Refused(502)),
        ("too many fields", with(&many), Refused(502)),
        ("a head without end", endless, Refused(502)),
        // Sections 4 to 7.
        (
            "another stream",
            head(3, END_STREAM, &[status]),
            Refused(502),
        ),
        (
            "an even stream",
            head(2, END_STREAM, &[status]),
            Refused(502),
        ),
        ("stream 0", head(0, END_STREAM, &[status]), Refused(502)),
        (
            "push",
            h2::frame(
                PUSH_PROMISE,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 2][..], &h2::block(&[(":method", "GET")])].concat(),
            ),
            Refused(502),
        ),
        (
            "bad compression",
            h2::frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 20]),
            Refused(502),
        ),
        ("bad settings", h2::settings(&[(5, 1)]), Refused(502)),
        (
            "a frame too large",
            h2::frame(DATA, 0, 1, &vec![0; 20_000]),
            Refused(502),
        ),
        (
            "window over its bound",
            h2::window_update(0, i32::MAX.unsigned_abs()),
            Refused(502),
        ),
        ("a reset", h2::reset(1, 2), Refused(502)),
        ("a reset without a reason", h2::reset(1, 0), Refused(502)),
        ("HTTP/1.1 asked for", h2::reset(1, 13), Refused(502)),
        (
            "a farewell that has seen it",
            [h2::goaway(1, 2), h2::reset(1, 2)].concat(),
            Refused(502),
        ),
        (
            "a farewell that takes it back",
            [h2::goaway(1, 0), h2::goaway(3, 0), h2::reset(1, 2)].concat(),
            Refused(502),
        ),
        (
            "HTTP/1.1",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_vec(),
            Refused(502),
        ),
        ("nothing", Vec::new(), Refused(504)),
        (
            "half a frame",
            head(1, END_STREAM, &[status])[..11].to_vec(),
            Refused(504),
        ),
        ("an interim response alone", interim, Refused(504)),
        // What is passed over.
        ("a request's pseudo-header", with(&[(":path", "/")]), Whole),
        (
            "settings to push",
            [h2::settings(&[(2, 1)]), with(&[])].concat(),
            Whole,
        ),
        (
            "an unknown frame",
            [h2::frame(200, 0, 0, b"abc"), with(&[])].concat(),
            Whole,
        ),
        (
            "floods",
            [
                h2::frame(PING, 0, 0, &[0; 8]).repeat(2000),
                h2::frame(SETTINGS, 0, 0, &[]).repeat(2000),
                with(&[]),
            ]
            .concat(),
            Whole,
        ),
        (
            "a switch of its own settings",
            [h2::settings(&[(3, 0), (4, 0)]), with(&[])].concat(),
            Whole,
        ),
    ] {
        check(name, &frames, verdict);
    }
}

#[test]
fn trouble_in_a_body_aborts_the_stream() {
    let begun = |fields: &[(&str, &str)]| {
        let head = head(1, 0, &[&[(":status", "200")], fields].concat());
        [head, data(0, b"abc")].concat()
    };
    let length = begun(&[("content-length", "9")]);
    let unknown = begun(&[]);
    let trailers = |flags, fields: &[(&str, &str)]| head(1, flags, fields);
    for (name, first, more) in [
        ("short of its length", &length, data(END_STREAM, b"d")),
        ("short of its length, alone", &length, data(END_STREAM, b"")),
        (
            "short of its length, by trailers",
            &length,
            trailers(END_STREAM, &[("a", "1")]),
        ),
        ("over its length", &length, data(END_STREAM, b"1234567")),
        ("over its length, not ended", &length, data(0, b"1234567")),
        ("a reset", &unknown, h2::reset(1, 2)),
        ("a reset as if in order", &unknown, h2::reset(1, 0)),
        ("a reset as if taken back", &unknown, h2::reset(1, 8)),
        ("a reset as if not seen", &unknown, h2::reset(1, 7)),
        (
            "a farewell",
            &unknown,
            [h2::goaway(1, 2), h2::reset(1, 2)].concat(),
        ),
        ("a farewell as if not seen", &unknown, h2::goaway(0, 0)),
        (
            "trailers that do not end",
            &unknown,
            trailers(0, &[("a", "1")]),
        ),
        (
            "trailers in upper case",
            &unknown,
            trailers(END_STREAM, &[("A", "1")]),
        ),
        (
            "trailers of CR LF",
            &unknown,
            trailers(END_STREAM, &[("a", "1\r\n\r\n")]),
        ),
        (
            "a second head",
            &unknown,
            trailers(0, &[(":status", "200")]),
        ),
        (
            "padding beyond its end",
            &unknown,
            h2::frame(DATA, PADDED, 1, &[9, 0]),
        ),
        ("a frame too large", &unknown, data(0, &vec![0; 20_000])),
        (
            "bad compression",
            &unknown,
            h2::frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 20]),
        ),
        ("nonsense", &unknown, b"nonsense, and more of it".to_vec()),
        ("a stall", &unknown, Vec::new()),
        (
            "half a frame",
            &unknown,
            data(END_STREAM, b"abcdef")[..12].to_vec(),
        ),
    ] {
        check(name, &[&**first, &more].concat(), CutOff);
    }
}

/// An upstream that heeds no window: what no one reads is not kept.
#[test]
fn data_over_the_window_is_cut_off() {
    let part = data(0, &[b'x'; 16_384]);
    let lane = before(
        [head(1, 0, &[(":status", "200")]), part.repeat(300)].concat(),
        Then::Answers,
        CutOff,
    );
    let mut client = Raw::client(lane.address, &[]);
    client.send(&h2::get(1, "/"));
    let answer = client.answer(1);
    assert!(
        answer.reset.is_some() || answer.ended.is_some(),
        "{:?}",
        answer.status
    );
    assert!(answer.body.len() <= 65_535);
    lane_is_fine("over", &lane);
}
