//! Heads that would be others once they are HTTP/1.1 (RFC 9113 sections 8.2, 8.3 and 10.3), and too large ones (10.5.1).

use super::harness::frames::{self as h2, END_HEADERS, END_STREAM, HEADERS, PROTOCOL_ERROR};
use super::{Refused, Reset, Verdict, World, assert_verdict};

type Field<'f> = (&'f [u8], &'f [u8]);

const MALFORMED: Verdict = Reset(PROTOCOL_ERROR);

const METHOD: Field<'static> = (b":method", b"GET");
const SCHEME: Field<'static> = (b":scheme", b"http");
const AUTHORITY: Field<'static> = (b":authority", b"x");
const PATH: Field<'static> = (b":path", b"/p");
const USUAL: [Field<'static>; 4] = [METHOD, SCHEME, AUTHORITY, PATH];

/// A whole request of these fields, without a body.
fn head(fields: &[Field<'_>]) -> Vec<u8> {
    h2::frame(HEADERS, END_HEADERS | END_STREAM, 1, &h2::block(fields))
}

/// The usual request with these fields behind it.
fn with(more: &[Field<'_>]) -> Vec<u8> {
    head(&[&USUAL, more].concat())
}

/// The usual request with one of its pseudo-headers in place of its own.
fn instead(name: &'static [u8], value: &[u8]) -> Vec<u8> {
    let fields: Vec<_> = USUAL
        .iter()
        .map(|(other, usual)| (*other, if *other == name { value } else { *usual }))
        .collect();
    head(&fields)
}

/// Refuses each of `rows`, a name, a request and its verdict, and forwards nothing of them.
fn nothing_is_forwarded(rows: &[(&str, Vec<u8>, Verdict)]) {
    let mut world = World::new();
    for (name, frames, verdict) in rows {
        assert_verdict(name, &world.send(frames), *verdict);
        world.has_sent_nothing(name);
    }
}

/// RFC 9113 section 8.2.1. Behind each CR LF a request stands that a naive gateway would send.
#[test]
fn a_malformed_field_is_refused() {
    let name = |name: &[u8]| with(&[(name, b"1")]);
    let value = |value: &[u8]| with(&[(b"a", value)]);
    nothing_is_forwarded(&[
        (
            "CR LF in a name",
            name(b"a: 1\r\n\r\nGET /smuggled HTTP/1.1\r\nhost"),
            MALFORMED,
        ),
        ("CR in a name", name(b"a\rb"), MALFORMED),
        ("LF in a name", name(b"a\nb"), MALFORMED),
        ("NUL in a name", name(b"a\0b"), MALFORMED),
        ("space in a name", name(b"a b"), MALFORMED),
        ("space behind a name", name(b"a "), MALFORMED),
        ("space before a name", name(b" a"), MALFORMED),
        ("tab in a name", name(b"a\tb"), MALFORMED),
        ("colon in a name", name(b"a:b"), MALFORMED),
        (
            "colon behind a name",
            name(b"transfer-encoding:"),
            MALFORMED,
        ),
        ("upper case", name(b"A"), MALFORMED),
        ("upper case within", name(b"content-Length"), MALFORMED),
        ("DEL in a name", name(b"a\x7f"), MALFORMED),
        ("byte over ASCII in a name", name(b"a\x80"), MALFORMED),
        ("brackets in a name", name(b"a[]"), MALFORMED),
        ("no name", name(b""), MALFORMED),
        (
            "CR LF in a value",
            value(b"1\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"),
            MALFORMED,
        ),
        ("CR in a value", value(b"1\r2"), MALFORMED),
        ("LF in a value", value(b"1\n2"), MALFORMED),
        ("LF behind a value", value(b"1\n"), MALFORMED),
        ("NUL in a value", value(b"1\x002"), MALFORMED),
        ("BEL in a value", value(b"\x07"), MALFORMED),
        ("DEL in a value", value(b"\x7f"), MALFORMED),
        ("space before a value", value(b" 1"), Refused(400)),
        ("space behind a value", value(b"1 "), Refused(400)),
        ("tab before a value", value(b"\t1"), Refused(400)),
        ("tab behind a value", value(b"1\t"), Refused(400)),
        (
            "CR LF in a cookie",
            with(&[(b"cookie", b"a=1\r\nb: 2")]),
            MALFORMED,
        ),
        (
            "space behind a crumb",
            with(&[(b"cookie", b"a=1 "), (b"cookie", b"b=2")]),
            Refused(400),
        ),
    ]);
}

/// RFC 9113 sections 8.3 and 8.3.1.
#[test]
fn pseudo_headers_are_those_of_a_request_once_and_first() {
    let twice = |field: Field<'_>| head(&[&USUAL[..], &[field]].concat());
    let without = |index: usize| {
        let mut fields = USUAL.to_vec();
        fields.remove(index);
        head(&fields)
    };
    let late = |index: usize| {
        let mut fields = USUAL.to_vec();
        let field = fields.remove(index);
        fields.extend([(&b"a"[..], &b"1"[..]), field]);
        head(&fields)
    };
    nothing_is_forwarded(&[
        ("two methods", twice(METHOD), MALFORMED),
        ("two other methods", twice((b":method", b"POST")), MALFORMED),
        ("two schemes", twice(SCHEME), MALFORMED),
        ("two authorities", twice((b":authority", b"y")), MALFORMED),
        ("two paths", twice((b":path", b"/smuggled")), MALFORMED),
        ("no method", without(0), MALFORMED),
        ("no scheme", without(1), MALFORMED),
        ("no authority and no host", without(2), Refused(400)),
        ("no path", without(3), MALFORMED),
        ("late method", late(0), MALFORMED),
        ("late scheme", late(1), MALFORMED),
        ("late authority", late(2), MALFORMED),
        ("late path", late(3), MALFORMED),
        ("unknown", twice((b":x", b"1")), MALFORMED),
        ("a response's", twice((b":status", b"200")), MALFORMED),
        ("a name of a colon", twice((b":", b"1")), MALFORMED),
        ("upper case", twice((b":Path", b"/")), MALFORMED),
        ("no fields at all", head(&[]), MALFORMED),
    ]);
}

/// RFC 9113 section 8.3.1: what stands in them would stand in the request line.
#[test]
fn what_stands_in_a_pseudo_header_is_one_part_of_a_request_line() {
    let method = |value: &[u8]| instead(b":method", value);
    let path = |value: &[u8]| instead(b":path", value);
    let authority = |value: &[u8]| instead(b":authority", value);
    let scheme = |value: &[u8]| instead(b":scheme", value);
    nothing_is_forwarded(&[
        (
            "request in a method",
            method(b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\nGET"),
            MALFORMED,
        ),
        (
            "line in a method",
            method(b"GET /admin HTTP/1.1"),
            MALFORMED,
        ),
        ("space behind a method", method(b"GET "), MALFORMED),
        ("space before a method", method(b" GET"), MALFORMED),
        ("LF in a method", method(b"GET\n"), MALFORMED),
        ("NUL in a method", method(b"GET\0"), MALFORMED),
        ("no method", method(b""), MALFORMED),
        ("method in lower case", method(b"get"), Refused(400)),
        ("method in brackets", method(b"(GET)"), MALFORMED),
        (
            "request in a path",
            path(b"/ HTTP/1.1\r\nHost: x\r\n\r\nGET /smuggled"),
            MALFORMED,
        ),
        ("line in a path", path(b"/ HTTP/1.1"), MALFORMED),
        ("space in a path", path(b"/a b"), MALFORMED),
        ("tab in a path", path(b"/a\tb"), MALFORMED),
        ("CR in a path", path(b"/a\rb"), MALFORMED),
        ("LF in a path", path(b"/a\nb"), MALFORMED),
        ("NUL in a path", path(b"/a\0b"), MALFORMED),
        ("DEL in a path", path(b"/a\x7f"), MALFORMED),
        ("byte that is not UTF-8", path(b"/\xff"), MALFORMED),
        ("UTF-8 cut short", path(b"/\xc3"), MALFORMED),
        ("no path", path(b""), MALFORMED),
        ("path without its slash", path(b"p"), MALFORMED),
        ("path of a query", path(b"?a"), Refused(400)),
        ("quote in a query", path(b"/a?b=\"c"), MALFORMED),
        ("bracket in a query", path(b"/a?b=<c"), MALFORMED),
        ("absolute path", path(b"http://x/p"), MALFORMED),
        ("asterisk", path(b"*"), Refused(400)),
        ("backslash", path(b"/a\\b"), Refused(400)),
        ("path above the root", path(b"/../x"), Refused(400)),
        (
            "path above the root, escaped",
            path(b"/..%2fx"),
            Refused(400),
        ),
        ("escaped NUL", path(b"/a%00b"), Refused(400)),
        ("bad escape", path(b"/a%zz"), Refused(400)),
        (
            "fields in an authority",
            authority(b"x\r\nhost: y"),
            MALFORMED,
        ),
        ("LF in an authority", authority(b"x\ny"), MALFORMED),
        ("NUL in an authority", authority(b"x\0"), MALFORMED),
        ("space in an authority", authority(b"x y"), MALFORMED),
        ("user part", authority(b"user@x"), Refused(400)),
        (
            "user part and password",
            authority(b"user:pw@x"),
            Refused(400),
        ),
        ("path in an authority", authority(b"x/y"), MALFORMED),
        ("query in an authority", authority(b"x?y"), MALFORMED),
        ("fragment in an authority", authority(b"x#y"), MALFORMED),
        ("list of authorities", authority(b"x,y"), Refused(400)),
        ("two ports", authority(b"x:80:80"), MALFORMED),
        ("port over 65535", authority(b"x:65536"), Refused(400)),
        ("port that is no number", authority(b"x:a"), Refused(400)),
        ("escape in an authority", authority(b"%78"), MALFORMED),
        ("open bracket", authority(b"[::1"), MALFORMED),
        (
            "byte over ASCII in an authority",
            authority(b"\xc3\xa4"),
            MALFORMED,
        ),
        ("empty authority", authority(b""), MALFORMED),
        (
            "request in a scheme",
            scheme(b"http://x/smuggled HTTP/1.1\r\n"),
            MALFORMED,
        ),
        ("scheme with its colon", scheme(b"http://"), MALFORMED),
        ("no scheme", scheme(b""), Refused(400)),
        ("another scheme", scheme(b"ftp"), Refused(400)),
        ("space in a scheme", scheme(b"ht tp"), MALFORMED),
    ]);
}

/// `http` cuts it off; no one sees it (RFC 9110 section 4.2.5).
#[test]
fn a_fragment_goes_nowhere() {
    let world = World::new();
    for path in [&b"/a?b#c"[..], b"/a?b#/../../smuggled"] {
        assert_eq!(world.send(&instead(b":path", path)).status, Some(200));
    }
    let seen = world.upstream.whole();
    assert!(
        seen.iter()
            .all(|request| request.starts_with("GET /a?b HTTP/1.1\r\n")),
        "{seen:?}"
    );
}

#[test]
fn a_path_beyond_ascii_goes_on_in_escapes() {
    let world = World::new();
    let status = world.send(&instead(b":path", b"/\xc3\xa4")).status;
    assert_eq!(status, Some(200));
    let seen = world.upstream.whole();
    assert!(seen[0].starts_with("GET /%C3%A4 HTTP/1.1\r\n"), "{seen:?}");
}

/// RFC 9113 section 8.3.1: an intermediary that believed one would route by it what another serves by the other.
#[test]
fn host_and_authority_agree() {
    let without = |host: &[u8]| head(&[METHOD, SCHEME, PATH, (b"host", host)]);
    nothing_is_forwarded(&[
        ("another host", with(&[(b"host", b"y")]), Refused(400)),
        ("another port", with(&[(b"host", b"x:80")]), Refused(400)),
        ("empty host", with(&[(b"host", b"")]), Refused(400)),
        (
            "two hosts",
            with(&[(b"host", b"x"), (b"host", b"x")]),
            Refused(400),
        ),
        ("host with a user part", without(b"user@x"), Refused(400)),
        ("host with a space", without(b"x y"), Refused(400)),
        ("host with a path", without(b"x/y"), Refused(400)),
        ("list of hosts", without(b"x, y"), Refused(400)),
        ("host with a tab", without(b"x\ty"), Refused(400)),
    ]);
    let world = World::new();
    for fields in [
        &USUAL[..],
        &[METHOD, SCHEME, PATH, (b"host", b"x")],
        &[&USUAL[..], &[(b"host", b"x")]].concat(),
    ] {
        assert_eq!(world.send(&head(fields)).status, Some(200));
    }
    for request in world.upstream.whole() {
        assert_eq!(
            request.to_lowercase().matches("\r\nhost: x\r\n").count(),
            1,
            "{request}"
        );
    }
}

/// RFC 9113 section 8.2.2: they are of a hop that is HTTP/1.1; the codings of "HTTP/2: The Sequel is Always Worse" (Kettle, 2021).
#[test]
fn fields_of_a_connection_are_refused() {
    let field = |name: &'static [u8], value: &'static [u8]| with(&[(name, value)]);
    nothing_is_forwarded(&[
        ("connection", field(b"connection", b"close"), MALFORMED),
        (
            "connection that names",
            field(b"connection", b"host"),
            MALFORMED,
        ),
        ("keep-alive", field(b"keep-alive", b"timeout=5"), MALFORMED),
        (
            "proxy-connection",
            field(b"proxy-connection", b"keep-alive"),
            MALFORMED,
        ),
        (
            "transfer-encoding",
            field(b"transfer-encoding", b"chunked"),
            MALFORMED,
        ),
        (
            "transfer-encoding, identity",
            field(b"transfer-encoding", b"identity"),
            MALFORMED,
        ),
        ("upgrade", field(b"upgrade", b"websocket"), MALFORMED),
        ("te of gzip", field(b"te", b"gzip"), MALFORMED),
        (
            "te of trailers and gzip",
            field(b"te", b"trailers, gzip"),
            MALFORMED,
        ),
        (
            "te of trailers, weighed",
            field(b"te", b"trailers;q=0.5"),
            MALFORMED,
        ),
        ("expectation", field(b"expect", b"200-ok"), Refused(417)),
    ]);
}

/// RFC 9113 section 8.5 and RFC 8441: a tunnel would be past every policy.
#[test]
fn no_tunnel_is_opened() {
    let connect: Field<'_> = (b":method", b"CONNECT");
    let target: Field<'_> = (b":authority", b"x:443");
    let protocol: Field<'_> = (b":protocol", b"websocket");
    let udp: Field<'_> = (b":protocol", b"connect-udp");
    let with_protocol = head(&[METHOD, SCHEME, AUTHORITY, PATH, protocol]);
    nothing_is_forwarded(&[
        ("CONNECT", head(&[connect, target]), Refused(400)),
        (
            "CONNECT without a port",
            head(&[connect, AUTHORITY]),
            Refused(400),
        ),
        (
            "CONNECT with a path",
            head(&[connect, SCHEME, target, PATH]),
            MALFORMED,
        ),
        (
            "CONNECT with a scheme",
            head(&[connect, SCHEME, target]),
            MALFORMED,
        ),
        (
            "CONNECT, extended, to what is not spoken (RFC 8441 section 4)",
            head(&[connect, SCHEME, AUTHORITY, PATH, udp]),
            Refused(501),
        ),
        (
            "CONNECT without an authority",
            head(&[connect]),
            Refused(400),
        ),
        ("GET, extended", with_protocol, MALFORMED),
    ]);
}

/// RFC 9113 section 10.5.1.
#[test]
fn a_head_over_its_bounds_is_refused() {
    let long = vec![b'a'; 5000];
    let many: Vec<_> = (0..30).map(|n| format!("a-{n}").into_bytes()).collect();
    let many: Vec<Field<'_>> = many.iter().map(|name| (&**name, &b"1"[..])).collect();
    let path = [b"/", &*long].concat();
    let crumbs: Vec<Field<'_>> = vec![(b"cookie", &long[..300]); 12];
    let rows = [
        ("value", with(&[(b"a", &long)])),
        ("name", with(&[(&long, b"1")])),
        ("path", instead(b":path", &path)),
        ("authority", instead(b":authority", &long)),
        ("method", instead(b":method", &long.to_ascii_uppercase())),
        ("many fields", with(&many)),
        ("many crumbs", with(&crumbs)),
        (
            "one field in many places",
            with(&vec![(&b"a"[..], &long[..200]); 20]),
        ),
    ];
    let rows = rows.map(|(name, frames)| (name, frames, Refused(431)));
    nothing_is_forwarded(&rows);
    // In frames that go on, too (section 6.10).
    let block = h2::block(&[&USUAL[..], &[(b"a", &long)]].concat());
    let (first, rest) = block.split_at(100);
    let frames = [
        h2::frame(HEADERS, END_STREAM, 1, first),
        h2::frame(h2::CONTINUATION, END_HEADERS, 1, rest),
    ];
    nothing_is_forwarded(&[("goes on", frames.concat(), Refused(431))]);
}
