//! A request's or a response's head, the body and the trailers behind it: places lie within the bytes, a head and trailers mean the same
//! when they are written anew, and a body is the same in whatever pieces it comes.
#![no_main]

use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use weir::http1::body::{BodyError, BodyReader, Piece};
use weir::http1::head::{BodyLength, HeadLimits, parse_request};
use weir::http1::response::{ResponseBody, parse_response};
use weir::http1::trailers;

fuzz_target!(|bytes: &[u8]| {
    let limits = HeadLimits::default();
    if let Ok(Some(head)) = parse_request(bytes, limits) {
        let line = [
            &bytes[head.method.clone()],
            b" ",
            &bytes[head.target.clone()],
        ]
        .concat();
        let version = format!(" HTTP/1.{}\r\n", head.minor_version).into_bytes();
        let anew = [line, version, fields(bytes, &head.fields)].concat();
        let again = parse_request(&anew, limits)
            .expect("well formed")
            .expect("whole");
        assert_eq!(
            (again.len, again.body, again.keep_alive),
            (anew.len(), head.body, head.keep_alive)
        );
        assert_eq!(fields(&anew, &again.fields), fields(bytes, &head.fields));
        body(head.body, &bytes[head.len..]);
        // Less of it is not whole, and never wrong.
        assert_eq!(parse_request(&bytes[..head.len - 1], limits), Ok(None));
    }
    for to_head in [false, true] {
        if let Ok(Some(head)) = parse_response(bytes, to_head, limits) {
            assert!((100..1000).contains(&head.status));
            let line = format!("HTTP/1.1 {} ", head.status).into_bytes();
            let line = [&line, &bytes[head.reason.clone()], b"\r\n"].concat();
            let anew = [line, fields(bytes, &head.fields)].concat();
            let again = parse_response(&anew, to_head, limits)
                .expect("well formed")
                .expect("whole");
            assert_eq!((again.status, again.body), (head.status, head.body));
            if let ResponseBody::Length(length) = head.body {
                body(length, &bytes[head.len..]);
            }
        }
    }
    body(BodyLength::Chunked, bytes);
    section(bytes);
});

fn section(bytes: &[u8]) {
    let Ok(places) = trailers::parse(bytes) else {
        return;
    };
    let anew = fields(bytes, &places);
    let anew = anew.strip_suffix(b"\r\n").expect("an empty line ends it");
    let again = trailers::parse(anew).expect("well formed");
    assert_eq!(fields(anew, &again), fields(bytes, &places));
}

fn fields(bytes: &[u8], fields: &[(Range<usize>, Range<usize>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.extend_from_slice(&bytes[name.clone()]);
        out.extend_from_slice(b": ");
        out.extend_from_slice(&bytes[value.clone()]);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn body(length: BodyLength, wire: &[u8]) {
    assert_eq!(read(length, wire, wire.len().max(1)), read(length, wire, 1));
}

/// The body, its trailers and the length of what it took, or `None` while it is not whole, from pieces of `step` bytes.
fn read(
    length: BodyLength,
    wire: &[u8],
    step: usize,
) -> Result<Option<(Vec<u8>, Vec<u8>, usize)>, BodyError> {
    let mut reader = BodyReader::new(length);
    let (mut out, mut start, mut end) = (Vec::new(), 0, 0);
    loop {
        match reader.next(&wire[start..end])? {
            Piece::Data { data, consumed } => {
                out.extend_from_slice(&wire[start..end][data]);
                start += consumed;
            }
            Piece::End { consumed } => {
                section(reader.trailers());
                return Ok(Some((out, reader.trailers().to_vec(), start + consumed)));
            }
            Piece::NeedMore { .. } if end == wire.len() => return Ok(None),
            Piece::NeedMore { consumed } => {
                start += consumed;
                end = (end + step).min(wire.len());
            }
        }
    }
}
