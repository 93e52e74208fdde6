//! Frames of a client and of an upstream, by `h2` as weir sets it up, and what weir writes of their heads: nothing in it can be read in
//! two ways, whoever reads it, and nothing is added, lost or changed on the way from HTTP/2 to HTTP/1.1 and back.
#![no_main]

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;

use bytes::Bytes;
use h2::ext::Protocol;
use h2::{RecvStream, client, server};
use http::{HeaderMap, HeaderValue, Request, header, request, response};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio::task::unconstrained;
use weir::http1::head::{BodyLength, HeadLimits};
use weir::http1::hygiene::is_hop_by_hop;
use weir::http1::response::ResponseBody;
use weir::http2::frames::Frames;
use weir::http2::grpc;
use weir::http2::head::{
    Answering, downgrade_request, downgrade_response, upgrade_request, upgrade_response,
    websocket_request,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const ROOM: usize = 1 << 20;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().build().expect("it needs no I/O");
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    let frames = match kind & 1 {
        0 => bytes.to_vec(),
        _ => framed(bytes),
    };
    pieces(&frames);
    RUNTIME.with(|runtime| match kind & 2 {
        0 => runtime.block_on(unconstrained(of_client(&frames))),
        _ => runtime.block_on(unconstrained(of_upstream(&frames, kind & 4 != 0))),
    });
});

/// A message of stream 1, which a fuzzer makes more easily than frames and HPACK: fields, a body and trailers, with 0xfc between
/// them; names and values with 0xfd between the two and 0xfe behind them.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let mut parts = bytes.splitn(3, |byte| *byte == 0xfc);
    let (fields, body, trailers) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let mut out = frame(1, 4 | u8::from(body.is_none()), &block(fields));
    if let Some(body) = body {
        out.extend(frame(0, u8::from(trailers.is_none()), body));
    }
    if let Some(trailers) = trailers {
        out.extend(frame(1, 5, &block(trailers)));
    }
    out
}

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .expect("it is short")
        .to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
}

/// Fields by HPACK, as literals (RFC 7541 section 6.2.2).
fn block(fields: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields
        .split(|byte| *byte == 0xfe)
        .filter(|it| !it.is_empty())
    {
        let mut parts = field.splitn(2, |byte| *byte == 0xfd);
        out.push(0);
        for part in [parts.next(), parts.next()] {
            let part = part.unwrap_or_default();
            // One byte says no more.
            let part = &part[..part.len().min(126)];
            out.push(u8::try_from(part.len()).expect("it is short"));
            out.extend_from_slice(part);
        }
    }
    out
}

/// What is due of frames is the same in whatever pieces they come.
fn pieces(frames: &[u8]) {
    let (mut at_once, mut singly) = (Frames::default(), Frames::default());
    let all = [PREFACE, SETTINGS, frames].concat();
    at_once.read(&all);
    all.iter().for_each(|byte| singly.read(&[*byte]));
    assert_eq!(at_once.due(), singly.due());
}

async fn of_client(frames: &[u8]) {
    let (mut theirs, ours) = duplex(ROOM);
    say(&mut theirs, &[PREFACE, SETTINGS, frames]).await;
    let handshake = server::Builder::new()
        .max_header_list_size(64 * 1024)
        .max_concurrent_streams(100)
        .enable_connect_protocol()
        .handshake::<_, Bytes>(ours);
    let Ok(mut connection) = handshake.await else {
        return;
    };
    let mut held = Vec::new();
    poll_fn(|cx| {
        while let Poll::Ready(Some(Ok((request, respond)))) = connection.poll_accept(cx) {
            let (parts, body) = request.into_parts();
            let has_body = !body.is_end_stream();
            let fixed = one_request(parts, has_body);
            held.push((fixed, body, respond));
        }
        // All that was said is read.
        Poll::Ready(())
    })
    .await;
    drop(theirs);
    while let Some(Ok(_)) = connection.accept().await {}
    for (fixed, body, _) in held {
        let Some(fixed) = fixed else { continue };
        if let Some(length) = whole(body).await {
            assert!(
                fixed.is_none_or(|fixed| fixed == length),
                "{fixed:?} {length}"
            );
        }
    }
}

async fn say(stream: &mut DuplexStream, all: &[&[u8]]) {
    for bytes in all {
        stream.write_all(bytes).await.expect("it has room");
    }
}

/// How long a body is that came to its end in order.
async fn whole(mut body: RecvStream) -> Option<u64> {
    let mut length = 0;
    while let Some(data) = body.data().await {
        length += data.ok()?.len() as u64;
    }
    let trailers = body.trailers().await.ok()?;
    trailers.iter().flatten().for_each(|(name, value)| {
        let name = name.as_str();
        assert!(
            !name.is_empty() && !name.starts_with(':') && !name.contains([' ', '\r', '\n', '\0'])
        );
        assert!(is_one_line(value.as_bytes()));
    });
    Some(length)
}

/// Its head is passed on as it came or refused. The length that its body is said to have, where it is passed on and says one.
fn one_request(mut parts: request::Parts, has_body: bool) -> Option<Option<u64>> {
    let mut has_body = has_body;
    match parts.extensions.remove::<Protocol>() {
        Some(protocol) if protocol.as_str() == "websocket" => {
            websocket_request(&mut parts, "AAAAAAAAAAAAAAAAAAAAAA==");
            has_body = false;
        }
        Some(_) => return None,
        None => {
            for hop in ["connection", "upgrade", "transfer-encoding", "keep-alive"] {
                assert!(!parts.headers.contains_key(hop), "{parts:?}");
            }
        }
    }
    for value in parts.headers.get_all(header::CONTENT_TYPE) {
        let _ = grpc::is_grpc(value.as_bytes());
    }
    for value in parts.headers.get_all("grpc-timeout") {
        let _ = grpc::timeout(value.as_bytes());
    }
    let mut out = Vec::new();
    let head = downgrade_request(&mut out, &parts, has_body, HeadLimits::default()).ok()?;
    let (line, fields) = read(&out);
    assert_eq!(head.len, out.len());
    let target = parts
        .uri
        .path_and_query()
        .expect("it was passed on")
        .as_str();
    assert_eq!(
        line,
        format!("{} {target} HTTP/1.1", parts.method).as_bytes()
    );
    assert!(
        parts
            .method
            .as_str()
            .bytes()
            .all(|byte| byte.is_ascii_graphic())
    );
    // UTF-8 becomes escapes where the path is looked at, as that of HTTP/1.1 does.
    let may_be = |byte: u8| byte.is_ascii_graphic() || !byte.is_ascii();
    assert!(target.bytes().all(may_be), "{target}");

    // Host first, then all as they came but for cookies, which are one field of those that are not empty.
    let host = parts
        .uri
        .authority()
        .map(|authority| authority.as_str().as_bytes());
    let host = host.or_else(|| parts.headers.get(header::HOST).map(HeaderValue::as_bytes));
    assert_eq!(
        fields.first().copied(),
        host.map(|host| (&b"host"[..], host))
    );
    let cookies: Vec<_> = parts
        .headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .filter(|cookie| !cookie.is_empty())
        .collect();
    let cookies = cookies.join(&b"; "[..]);
    let mut expected = listed(&parts.headers, &[header::HOST, header::COOKIE]);
    if parts.headers.contains_key(header::COOKIE) {
        expected.push((b"cookie", &cookies));
    }
    let says_length = parts.headers.contains_key(header::CONTENT_LENGTH);
    if has_body && !says_length {
        expected.push((b"transfer-encoding", b"chunked"));
    }
    assert_eq!(fields[1..], expected);
    let by_head: Vec<_> = head
        .fields
        .iter()
        .map(|(name, value)| (&out[name.clone()], &out[value.clone()]))
        .collect();
    assert_eq!(by_head, fields);

    let fixed = match head.body {
        BodyLength::None => {
            let said = parts.headers.get(header::CONTENT_LENGTH);
            assert!(
                !has_body
                    || said.is_some_and(|said| said.as_bytes().iter().all(|digit| *digit == b'0'))
            );
            has_body.then_some(0)
        }
        BodyLength::Fixed(length) => {
            let said = parts
                .headers
                .get(header::CONTENT_LENGTH)
                .expect("it says one");
            assert_eq!(
                said.to_str().ok().and_then(|said| said.parse().ok()),
                Some(length)
            );
            Some(length)
        }
        BodyLength::Chunked => {
            assert!(has_body && !says_length);
            None
        }
    };

    // And back to HTTP/2.
    if let Ok(request) = upgrade_request(&out, false, false) {
        assert_eq!(request.method(), parts.method);
        assert_eq!(
            request.uri().path_and_query().map(|path| path.as_str()),
            Some(target)
        );
        assert_eq!(
            request.uri().authority().map(|it| it.as_str().as_bytes()),
            host
        );
        let mut kept = fields[1..].to_vec();
        kept.retain(|(name, _)| !is_hop_by_hop(name));
        assert_same(listed(request.headers(), &[]), kept);
    }
    Some(fixed)
}

async fn of_upstream(frames: &[u8], to_head: bool) {
    let (mut theirs, ours) = duplex(ROOM);
    say(&mut theirs, &[SETTINGS, frames]).await;
    let mut theirs = Some(theirs);
    let handshake = client::Builder::new()
        .enable_push(false)
        .max_header_list_size(64 * 1024)
        .handshake::<_, Bytes>(ours);
    let Ok((mut requests, connection)) = handshake.await else {
        return;
    };
    let method = if to_head { "HEAD" } else { "GET" };
    let request = Request::builder().method(method).uri("http://x/").body(());
    let Ok((mut response, _)) = requests.send_request(request.expect("it is well formed"), true)
    else {
        return;
    };
    let mut connection = pin!(connection);
    let mut heads = Vec::new();
    let mut body = None;
    let mut answered = false;
    let mut ended = false;
    poll_fn(|cx| {
        // Once before and once behind the end of what was said.
        ended = ended || connection.as_mut().poll(cx).is_ready();
        while let Poll::Ready(Some(Ok(interim))) = response.poll_informational(cx) {
            heads.push((interim.into_parts().0, false));
        }
        if !answered && let Poll::Ready(answer) = Pin::new(&mut response).poll(cx) {
            answered = true;
            if let Ok(answer) = answer {
                let (parts, stream) = answer.into_parts();
                heads.push((parts, stream.is_end_stream()));
                body = Some(stream);
            }
        }
        match (ended, theirs.take()) {
            (true, _) => Poll::Ready(()),
            (false, None) => Poll::Pending,
            (false, Some(theirs)) => {
                drop(theirs);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    })
    .await;
    for (parts, ended) in heads {
        for to_http1 in [false, true] {
            let how = Answering {
                to_head,
                ended,
                to_http1,
            };
            one_response(&parts, how);
        }
    }
    if let Some(body) = body {
        whole(body).await;
    }
}

fn one_response(parts: &response::Parts, how: Answering) {
    let mut out = Vec::new();
    let Ok(head) = downgrade_response(&mut out, parts, how) else {
        return;
    };
    assert_eq!((head.len, head.status), (out.len(), parts.status.as_u16()));
    let (line, fields) = read(&out);
    assert_eq!(
        line,
        format!("HTTP/1.1 {} ", parts.status.as_u16()).as_bytes()
    );
    let mut expected = listed(&parts.headers, &[]);
    let ours = fields.get(expected.len()..).unwrap_or_default();
    match (ours, how.ended) {
        ([], _) => {}
        ([(b"transfer-encoding", b"chunked")], false) | ([(b"content-length", b"0")], true) => {
            assert!(!parts.headers.contains_key(header::CONTENT_LENGTH));
        }
        _ => panic!("{ours:?}"),
    }
    expected.extend_from_slice(ours);
    assert_eq!(fields, expected);
    if how.ended {
        assert_eq!(head.body, ResponseBody::Length(BodyLength::None));
    }

    let (response, len) = upgrade_response(&out).expect("what was passed on can be said");
    assert_eq!((response.status(), len), (parts.status, out.len()));
    // White space around a value is no part of it.
    let kept = fields
        .iter()
        .map(|(name, value)| (*name, value.trim_ascii()));
    let kept = kept.filter(|(name, _)| !is_hop_by_hop(name)).collect();
    assert_same(listed(response.headers(), &[]), kept);
}

type Fields<'m> = Vec<(&'m [u8], &'m [u8])>;

/// The first line of a head and its fields, as a reader has them that knows no leniency.
fn read(head: &[u8]) -> (&[u8], Fields<'_>) {
    let head = head.strip_suffix(b"\r\n\r\n").expect("it has an end");
    let text: Vec<_> = head.split(|byte| *byte == b'\n').collect();
    let (last, others) = text.split_last().expect("one at least");
    let others = others
        .iter()
        .map(|line| line.strip_suffix(b"\r").expect("CR stands before LF"));
    let mut lines = others
        .chain([*last])
        .inspect(|line| assert!(is_one_line(line)));
    let first = lines.next().expect("one at least");
    let fields = lines.map(|line| {
        let colon = line
            .iter()
            .position(|byte| *byte == b':')
            .expect("a field has a colon");
        let (name, rest) = line.split_at(colon);
        let value = rest.strip_prefix(b": ").expect("a space stands behind it");
        assert!(
            !name.is_empty() && name.iter().all(|byte| is_token(*byte)),
            "{name:?}"
        );
        (name, value)
    });
    (first, fields.collect())
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_one_line(text: &[u8]) -> bool {
    !text.iter().any(|byte| b"\r\n\0".contains(byte))
}

fn listed<'m>(fields: &'m HeaderMap, without: &[header::HeaderName]) -> Fields<'m> {
    let kept = fields.iter().filter(|(name, _)| !without.contains(name));
    kept.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
        .collect()
}

/// A map keeps the order of one name's values alone.
fn assert_same(mut these: Fields<'_>, mut those: Fields<'_>) {
    these.sort_by_key(|(name, _)| *name);
    those.sort_by_key(|(name, _)| *name);
    assert_eq!(these, those);
}
