//! Hostile frames over raw sockets against a real lane: what RFC 9113 calls malformed, what two servers could read in two ways once
//! it is HTTP/1.1, and floods, at either side. It is refused or its connection ended, the upstream sees nothing of it, and the lane
//! serves on.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a broken step of a test is a failed test; what a test measures is printed, by the time too"
)]

#[path = "../harness/mod.rs"]
mod harness;

mod bodies;
mod floods;
mod frames;
mod heads;
mod upstreams;

use harness::Lane;
use harness::frames::{self as h2, Answer, Ended, Raw};
use harness::raw::Recorder;

/// What becomes of what a row sends. A reason may be PROTOCOL_ERROR in place of its own, and an error of a stream one of its connection
/// (RFC 9113 section 5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is answered by weir.
    Refused(u16),
    /// Its stream is reset, for this reason.
    Reset(u32),
    /// Its connection is ended, for this reason.
    Parted(u32),
}
use Verdict::{Parted, Refused, Reset};

/// A lane in front of an upstream that keeps all that it is sent.
struct World {
    upstream: Recorder,
    lane: Lane,
    /// How often it was seen to be fine.
    fine: usize,
}

impl World {
    fn new() -> World {
        let upstream = Recorder::start();
        let lane = Lane::start(&format!(
            "listeners: [{{address: '127.0.0.1:0', timeouts: {{header_read: 500ms, stream_idle: 500ms, request_read: 2s}}, \
             limits: {{max_header_bytes: 4KiB, max_headers: 20, max_body: 64KiB}}}}]\n\
             upstream: http://{}\n",
            upstream.address
        ));
        World {
            upstream,
            lane,
            fine: 0,
        }
    }

    /// Sends `frames` behind the preface, on a connection of their own, and judges stream 1.
    fn send(&self, frames: &[u8]) -> Answer {
        let mut raw = Raw::client(self.lane.address, &[]);
        // Until then the windows are the small ones that a connection begins with.
        raw.until(|frame| frame.kind == h2::SETTINGS && frame.flags == h2::ACK);
        raw.send(frames);
        raw.answer(1)
    }

    /// A fresh connection of either version is served, and nothing but what such ones sent has reached the upstream whole.
    fn is_fine(&mut self, name: &str) {
        assert_eq!(self.lane.connect().get("/fine").status, 200, "{name}");
        let mut raw = Raw::client(self.lane.address, &[]);
        raw.send(&h2::get(1, "/fine"));
        assert_eq!(raw.answer(1).status, Some(200), "{name}");
        self.fine += 2;
        let whole = self.upstream.whole();
        assert_eq!(whole.len(), self.fine, "{name}: {whole:#?}");
        assert!(
            whole
                .iter()
                .all(|request| request.starts_with("GET /fine HTTP/1.1\r\n"))
        );
    }

    /// As [`World::is_fine`], and not a byte of anything else has reached the upstream.
    fn has_sent_nothing(&mut self, name: &str) {
        self.is_fine(name);
        let whole: usize = self.upstream.whole().iter().map(String::len).sum();
        assert_eq!(
            self.upstream.bytes().len(),
            whole,
            "{name}: {}",
            self.upstream.bytes()
        );
    }
}

#[track_caller]
fn assert_verdict(name: &str, answer: &Answer, verdict: Verdict) {
    let judged = match *answer {
        Answer {
            farewell: Some(code @ 1..),
            ..
        } => Some(Parted(code)),
        Answer {
            reset: Some(code),
            status: None,
            ..
        } => Some(Reset(code)),
        // What is left of the request is not wanted, which is no error.
        Answer {
            status: Some(status),
            whole: true,
            reset: None | Some(h2::NO_ERROR),
            ..
        } => Some(Refused(status)),
        _ => None,
    };
    assert_ne!(answer.ended, Some(Ended::Hung), "{name}: {answer:?}");
    let among = match verdict {
        Refused(_) => vec![verdict],
        Reset(code) => vec![
            Reset(code),
            Reset(h2::PROTOCOL_ERROR),
            Parted(code),
            Parted(h2::PROTOCOL_ERROR),
        ],
        Parted(code) => vec![Parted(code), Parted(h2::PROTOCOL_ERROR)],
    };
    let is_among = judged.is_some_and(|judged| among.contains(&judged));
    assert!(is_among, "{name}: {judged:?}, not {verdict:?}: {answer:?}");
}

impl World {
    /// As [`World::is_fine`]; of requests that were in order when their connection was ended nothing whole has come.
    fn has_sent_no_more(&mut self, name: &str) {
        let before = self.upstream.whole().len();
        self.fine = before;
        assert!(!self.upstream.bytes().contains("smuggled"), "{name}");
        self.is_fine(name);
    }
}
