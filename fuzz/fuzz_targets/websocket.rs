//! Frames of a WebSocket end at the same places however their bytes are cut, and a Close frame of weir's own between two is one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::http1::websocket::{Frames, GOING_AWAY, close};

fuzz_target!(|bytes: &[u8]| {
    let mut at_once = Frames::default();
    at_once.follow(bytes);
    let mut singly = Frames::default();
    for at in 0..bytes.len() {
        let rest = singly.rest(&bytes[at..]);
        assert!(rest <= bytes.len() - at && (rest == 0) == singly.is_between());
        singly.follow(&bytes[at..=at]);
    }
    assert_eq!(at_once.is_between(), singly.is_between());
    assert_eq!(at_once.has_closed(), singly.has_closed());
    if singly.is_between() {
        singly.follow(&close(GOING_AWAY, None));
        assert!(singly.is_between() && singly.has_closed());
    }
});
