//! PROXY headers that are not what they should be, over raw sockets against a real weir. Each row names the section of HAProxy's
//! proxy-protocol.txt that says what becomes of it. Behind each header stands a request: it is served where the header holds, and where it
//! does not the connection ends without a byte and the upstream sees nothing of it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use super::harness::eventually;
use super::harness::process::{Running, file};
use super::harness::raw::{self, End, Recorder};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
/// Without its end.
const LINE: &str = "PROXY TCP4 1.2.3.4 5.6.7.8 9 10";
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const IPV4: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 0, 10];

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// Its request is served as this client's.
    Of(&'static str),
    /// It ends without a word, for this reason.
    Ends(&'static str),
    /// The header holds, and what is behind it is no request.
    NoRequest(u16),
}

use Expected::{Ends, NoRequest, Of};

/// The client that the connection comes from.
const PEER: Expected = Of("127.0.0.1");
const MALFORMED: Expected = Ends("malformed");
const TOO_LONG: Expected = Ends("too_long");
const ABSENT: Expected = Ends("absent");

/// A section of proxy-protocol.txt, what is tried, the header, and what becomes of it.
type Row = (&'static str, &'static str, Vec<u8>, Expected);

/// A header of version 2 with this length in it, whatever follows.
fn head(command: u8, kind: u8, length: u16, rest: &[u8]) -> Vec<u8> {
    let length = length.to_be_bytes();
    [&SIGNATURE[..], &[command, kind], &length, rest].concat()
}

fn block(command: u8, kind: u8, rest: &[u8]) -> Vec<u8> {
    head(command, kind, u16::try_from(rest.len()).unwrap(), rest)
}

struct Weir {
    running: Running,
    upstream: Recorder,
    _config: tempfile::NamedTempFile,
}

impl Weir {
    fn start(mode: &str, within: &str) -> Weir {
        let upstream = Recorder::start();
        let config = file(&format!(
            "listeners: [{{name: in, address: '127.0.0.1:0', proxy_protocol: {mode}, timeouts: {{header_read: {within}}}}}]\n\
             upstream: http://{}\nadmin: {{address: '127.0.0.1:0'}}\nruntime: {{lanes: 1}}\n",
            upstream.address
        ));
        Weir {
            running: Running::start(config.path()),
            upstream,
            _config: config,
        }
    }

    fn failures(&self) -> Vec<(String, u64)> {
        let text = self.running.admin().get("/metrics").body;
        let series = "weir_proxy_protocol_failures_total{listener=\"in\",reason=\"";
        let lines = text.lines().filter_map(|line| line.strip_prefix(series));
        let value = |line: &str| {
            let (reason, value) = line.split_once("\"} ")?;
            Some((reason.to_owned(), value.parse().ok()?))
        };
        lines.filter_map(value).collect()
    }

    fn failed(&self, reason: &str) -> u64 {
        let failures = self.failures();
        let found = failures.iter().find(|(name, _)| name == reason);
        found.map_or(0, |(_, count)| *count)
    }

    /// Holds for each row that its connection comes to what is expected, and that no other is counted.
    fn check(&self, rows: &[Row]) {
        for (section, name, header, expected) in rows {
            let name = format!("{section}: {name}");
            let served = self.upstream.whole().len();
            let before = self.failures();
            let wire = raw::send(
                self.running.address.parse().unwrap(),
                &[header, REQUEST].concat(),
            );
            match expected {
                Of(client) => {
                    assert_eq!(wire.status(), Some(200), "{name}: {wire:?}");
                    let whole = self.upstream.whole();
                    assert_eq!(whole.len(), served + 1, "{name}");
                    let told = format!("X-Forwarded-For: {client}\r\n");
                    assert!(whole[served].contains(&told), "{name}: {}", whole[served]);
                    assert_eq!(self.failures(), before, "{name}");
                }
                NoRequest(status) => {
                    assert_eq!(wire.status(), Some(*status), "{name}: {wire:?}");
                    assert_eq!(self.upstream.whole().len(), served, "{name}");
                }
                Ends(reason) => {
                    assert_eq!((&*wire.text, wire.end == End::Hung), ("", false), "{name}");
                    let count = before.iter().find(|(name, _)| name == reason);
                    let count = count.map_or(0, |(_, count)| *count);
                    eventually(|| self.failed(reason) == count + 1);
                    assert_eq!(self.upstream.whole().len(), served, "{name}");
                }
            }
        }
        // Whatever had slipped through would have come by now.
        let bytes: usize = self.upstream.whole().iter().map(String::len).sum();
        assert_eq!(self.upstream.bytes().len(), bytes, "parts of requests came");
    }
}

#[test]
fn a_line_holds_to_the_letter_or_ends_the_connection() {
    let line = |line: &str| format!("{line}\r\n").into_bytes();
    let unknown = |length: usize| {
        let mut line = b"PROXY UNKNOWN ".to_vec();
        line.resize(length - 2, b'x');
        [&line[..], b"\r\n"].concat()
    };
    let six = [["ffff"; 8].join(":"), ["ffff"; 8].join(":")].join(" ");
    let rows = [
        ("TCP4", line(LINE), Of("1.2.3.4")),
        (
            "TCP6",
            line("PROXY TCP6 FD00:0::1 ::1 0 65535"),
            Of("fd00::1"),
        ),
        (
            "the longest TCP6",
            line(&format!("PROXY TCP6 {six} 65535 65535")),
            Of("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ),
        (
            "IPv4 within IPv6",
            line("PROXY TCP6 ::ffff:1.2.3.4 ::1 1 2"),
            Of("1.2.3.4"),
        ),
        ("UNKNOWN alone", line("PROXY UNKNOWN"), PEER),
        (
            "UNKNOWN and more",
            line("PROXY UNKNOWN 1.2.3.4 5.6.7.8 9 10"),
            PEER,
        ),
        (
            "UNKNOWN and no text",
            b"PROXY UNKNOWN \xff\0\x80\r\n".to_vec(),
            PEER,
        ),
        ("UNKNOWN of 107 bytes", unknown(107), PEER),
        ("UNKNOWN of 108 bytes", unknown(108), TOO_LONG),
        (
            "no CRLF in 107 bytes",
            [&b"PROXY UNKNOWN "[..], &[b'x'; 107]].concat(),
            TOO_LONG,
        ),
        ("LF alone", format!("{LINE}\n").into_bytes(), MALFORMED),
        (
            "LF alone behind UNKNOWN",
            b"PROXY UNKNOWN\n".to_vec(),
            MALFORMED,
        ),
        ("CR alone", line(&format!("{LINE}\rx")), MALFORMED),
        ("two CRs", line(&format!("{LINE}\r")), MALFORMED),
        (
            "two spaces",
            line("PROXY TCP4  1.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        ("a space at the end", line(&format!("{LINE} ")), MALFORMED),
        ("a tab", line("PROXY TCP4\t1.2.3.4 5.6.7.8 9 10"), MALFORMED),
        (
            "lower case",
            line("PROXY tcp4 1.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "another family",
            line("PROXY UDP4 1.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "a family that begins as UNKNOWN",
            line("PROXY UNKNOWNS"),
            MALFORMED,
        ),
        ("no family", line("PROXY "), MALFORMED),
        (
            "IPv6 under TCP4",
            line("PROXY TCP4 ::1 ::1 9 10"),
            MALFORMED,
        ),
        (
            "IPv4 under TCP6",
            line("PROXY TCP6 1.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "destination of another family",
            line("PROXY TCP4 1.2.3.4 ::1 9 10"),
            MALFORMED,
        ),
        (
            "address with a leading zero",
            line("PROXY TCP4 01.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "address of three numbers",
            line("PROXY TCP4 1.2.3 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "address over 255",
            line("PROXY TCP4 1.2.3.256 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "address in hex",
            line("PROXY TCP4 0x1.2.3.4 5.6.7.8 9 10"),
            MALFORMED,
        ),
        (
            "two double colons",
            line("PROXY TCP6 1::2::3 ::1 9 10"),
            MALFORMED,
        ),
        (
            "address of 144 bits",
            line("PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 9 10"),
            MALFORMED,
        ),
        (
            "address with a zone",
            line("PROXY TCP6 fe80::1%eth0 ::1 9 10"),
            MALFORMED,
        ),
        (
            "port over 65535",
            line("PROXY TCP4 1.2.3.4 5.6.7.8 65536 10"),
            MALFORMED,
        ),
        (
            "port with a sign",
            line("PROXY TCP4 1.2.3.4 5.6.7.8 +9 10"),
            MALFORMED,
        ),
        (
            "port with a leading zero",
            line("PROXY TCP4 1.2.3.4 5.6.7.8 9 010"),
            MALFORMED,
        ),
        ("no port", line("PROXY TCP4 1.2.3.4 5.6.7.8"), MALFORMED),
        ("one port", line("PROXY TCP4 1.2.3.4 5.6.7.8 9"), MALFORMED),
        ("a third port", line(&format!("{LINE} 11")), MALFORMED),
        (
            "a NUL",
            line("PROXY TCP4 1.2.3.4\0 5.6.7.8 9 10"),
            MALFORMED,
        ),
        // A header is one, and what follows it is the client's own.
        (
            "a second line",
            line(&format!("{LINE}\r\n{LINE}")),
            NoRequest(505),
        ),
    ];
    let rows = rows.map(|(name, header, expected)| ("2.1", name, header, expected));
    Weir::start("require", "10s").check(&rows);
}

#[test]
fn a_block_holds_to_the_letter_or_ends_the_connection() {
    let ipv6: Vec<u8> = [[0; 15].as_slice(), &[1], &[9; 16], &[1, 0, 0, 2]].concat();
    // A NOOP (section 2.2.4), and one that says that it is longer than the block.
    let more = [4, 0, 1, 7, 0xe0, 0xff, 0xff];
    let of_size = |size: usize| [&IPV4[..], &vec![0; size - 16 - 12]].concat();
    let rows = [
        ("TCP over IPv4", block(0x21, 0x11, &IPV4), Of("1.2.3.4")),
        ("TCP over IPv6", block(0x21, 0x21, &ipv6), Of("::1")),
        (
            "more behind IPv4",
            block(0x21, 0x11, &[&IPV4[..], &more].concat()),
            Of("1.2.3.4"),
        ),
        (
            "more behind IPv6",
            block(0x21, 0x21, &[&ipv6[..], &more].concat()),
            Of("::1"),
        ),
        ("LOCAL", block(0x20, 0, &[]), PEER),
        ("LOCAL with addresses", block(0x20, 0x11, &IPV4), PEER),
        (
            "LOCAL with a family that is none",
            block(0x20, 0xff, &IPV4),
            PEER,
        ),
        (
            "LOCAL with half an address",
            block(0x20, 0x11, &IPV4[..5]),
            PEER,
        ),
        ("UNSPEC", block(0x21, 0, &[]), PEER),
        ("UNSPEC with addresses", block(0x21, 0, &IPV4), PEER),
        ("UDP over IPv4", block(0x21, 0x12, &IPV4), PEER),
        ("UDP over IPv6", block(0x21, 0x22, &ipv6), PEER),
        ("a Unix stream", block(0x21, 0x31, &[b'/'; 216]), PEER),
        ("a Unix datagram", block(0x21, 0x32, &[b'/'; 216]), PEER),
        ("version 1", block(0x11, 0x11, &IPV4), MALFORMED),
        ("version 3", block(0x31, 0x11, &IPV4), MALFORMED),
        ("version 0", block(0x01, 0x11, &IPV4), MALFORMED),
        ("another command", block(0x22, 0x11, &IPV4), MALFORMED),
        ("command 15", block(0x2f, 0, &[]), MALFORMED),
        ("family 4", block(0x21, 0x41, &IPV4), MALFORMED),
        ("family 15", block(0x21, 0xf1, &IPV4), MALFORMED),
        ("protocol 3", block(0x21, 0x13, &IPV4), MALFORMED),
        ("protocol 15", block(0x21, 0x1f, &IPV4), MALFORMED),
        ("no address of IPv4", block(0x21, 0x11, &[]), MALFORMED),
        (
            "a byte too few of IPv4",
            block(0x21, 0x11, &IPV4[1..]),
            MALFORMED,
        ),
        (
            "IPv4's length for IPv6",
            block(0x21, 0x21, &IPV4),
            MALFORMED,
        ),
        (
            "a byte too few of IPv6",
            block(0x21, 0x21, &ipv6[1..]),
            MALFORMED,
        ),
        // weir's own bound.
        ("of 8 KiB", block(0x21, 0x11, &of_size(8192)), Of("1.2.3.4")),
        ("over 8 KiB", block(0x21, 0x11, &of_size(8193)), TOO_LONG),
        (
            "a length of 65535",
            head(0x21, 0x11, u16::MAX, &IPV4),
            TOO_LONG,
        ),
        (
            "a second block",
            block(0x20, 0, &[]).repeat(2),
            NoRequest(400),
        ),
    ];
    let rows = rows.map(|(name, header, expected)| ("2.2", name, header, expected));
    Weir::start("require", "10s").check(&rows);
}

#[test]
fn who_must_say_and_does_not_is_closed() {
    let mut other = block(0x21, 0x11, &IPV4);
    other[11] = 0;
    let rows = [
        ("a request", Vec::new()),
        ("TLS", b"\x16\x03\x01\x02\0\x01\0".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        (
            "PROXY without a space",
            b"PROXYTCP4 1.2.3.4 5.6.7.8 9 10\r\n".to_vec(),
        ),
        ("proxy", b"proxy TCP4 1.2.3.4 5.6.7.8 9 10\r\n".to_vec()),
        ("a space before it", format!(" {LINE}\r\n").into_bytes()),
        (
            "an empty line before it",
            format!("\r\n{LINE}\r\n").into_bytes(),
        ),
        ("a signature with a wrong end", other),
    ];
    let rows = rows.map(|(name, header)| ("2", name, header, ABSENT));
    Weir::start("require", "10s").check(&rows);
    Weir::start("accept", "10s").check(&[("2", "a request", Vec::new(), PEER)]);
}

/// Headers that are cut off, or say that they are longer than they are.
fn unfinished() -> Vec<Row> {
    let whole = block(0x21, 0x11, &IPV4);
    let of = |section, name, bytes: &[u8]| (section, name, bytes.to_vec(), MALFORMED);
    vec![
        of("2.1", "no end of the line", LINE.as_bytes()),
        of("2.1", "a CR at the end", format!("{LINE}\r").as_bytes()),
        of("2.1", "PRO", b"PRO"),
        of("2.2", "a part of the signature", &whole[..7]),
        of("2.2", "no length", &whole[..14]),
        of("2.2", "half a length", &whole[..15]),
        of("2.2", "no addresses", &whole[..16]),
        of("2.2", "half the addresses", &whole[..22]),
        of(
            "2.2",
            "a length beyond the end",
            &head(0x21, 0x11, 13, &IPV4),
        ),
        of(
            "2.2",
            "LOCAL with a length beyond the end",
            &head(0x20, 0, 1, &[]),
        ),
    ]
}

#[test]
fn a_header_that_is_not_whole_is_none() {
    let weir = Weir::start("require", "10s");
    for (count, (section, name, bytes, _)) in (1..).zip(unfinished()) {
        let mut tcp = weir.running.connect();
        tcp.write_all(&bytes).unwrap();
        tcp.shutdown(Shutdown::Write).unwrap();
        let wire = raw::read_to_end(&mut tcp);
        assert_eq!(
            (&*wire.text, wire.end),
            ("", End::Closed),
            "{section}: {name}"
        );
        eventually(|| weir.failed("gone") == count);
    }
    assert_eq!(weir.upstream.bytes(), "");
}

#[test]
fn a_header_takes_no_longer_than_it_may() {
    // proxy-protocol.txt, section 2: "a short timeout".
    let weir = Weir::start("require", "300ms");
    for (count, (section, name, bytes, _)) in (1..).zip(unfinished()) {
        let mut tcp = weir.running.connect();
        tcp.write_all(&bytes).unwrap();
        let wire = raw::read_to_end(&mut tcp);
        assert!(
            wire.text.is_empty() && wire.end != End::Hung,
            "{section}: {name}"
        );
        eventually(|| weir.failed("timed_out") == count);
    }
    let before = weir.failed("timed_out");
    // Byte by byte, each in time.
    let mut tcp = weir.running.connect();
    tcp.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    for byte in head(0x21, 0x11, 100, &[0; 100]) {
        if tcp.write_all(&[byte]).is_err() {
            break;
        }
        match tcp.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => break,
            Ok(_) => panic!("it was answered"),
        }
    }
    eventually(|| weir.failed("timed_out") == before + 1);
    assert_eq!(weir.upstream.bytes(), "");
}
