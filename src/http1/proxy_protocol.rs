//! What a load balancer says ahead of a connection's own bytes: whose connection it is (The PROXY protocol, versions 1 and 2,
//! proxy-protocol.txt of HAProxy). Of what a header of version 2 says beside the addresses, nothing is read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

/// The most that a line of version 1 is long.
const MAX_LINE: usize = 107;
/// What is taken of version 2, with all that it says beside the addresses: certificates fit in it.
const MAX_BLOCK: usize = 8192;
/// What version 2 begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Of version 2: the signature, version and command, kind of addresses, and length of the rest.
const HEAD: usize = 16;

/// A whole header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyHeader {
    /// Its length in bytes, behind which the connection's own begin.
    pub len: usize,
    /// Whose connection it is; `None`: that of whoever sent it, or it is not said.
    pub client: Option<SocketAddr>,
}

/// Why the connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ProxyError {
    #[error("the connection does not begin with a PROXY header")]
    Absent,
    #[error("the PROXY header is malformed")]
    Malformed,
    #[error("the PROXY header is too long")]
    TooLong,
}

/// Reads the header at the front of `bytes`; `None` while it is not whole.
pub fn parse(bytes: &[u8]) -> Result<Option<ProxyHeader>, ProxyError> {
    if is_begun(bytes, SIGNATURE) {
        version_2(bytes)
    } else if is_begun(bytes, b"PROXY ") {
        version_1(bytes)
    } else {
        Err(ProxyError::Absent)
    }
}

/// Whether one begins as the other does.
fn is_begun(bytes: &[u8], with: &[u8]) -> bool {
    bytes.iter().zip(with).all(|(one, other)| one == other)
}

fn version_1(bytes: &[u8]) -> Result<Option<ProxyHeader>, ProxyError> {
    let within = &bytes[..bytes.len().min(MAX_LINE)];
    let Some(end) = within.iter().position(|byte| *byte == b'\n') else {
        return match within.len() {
            MAX_LINE => Err(ProxyError::TooLong),
            _ => Ok(None),
        };
    };
    let line = within[..end].strip_suffix(b"\r");
    let line = line.and_then(|line| line.strip_prefix(b"PROXY "));
    let line = line.ok_or(ProxyError::Malformed)?;
    // Whatever else such a line says is to be passed over.
    let client = match line.strip_prefix(b"UNKNOWN") {
        Some([] | [b' ', ..]) => None,
        Some(_) | None => {
            let line = str::from_utf8(line).ok();
            Some(line.and_then(client_of).ok_or(ProxyError::Malformed)?)
        }
    };
    Ok(Some(ProxyHeader {
        len: end + 1,
        client,
    }))
}

/// `TCP4 SOURCE DESTINATION PORT PORT`, of which the source is given.
fn client_of(line: &str) -> Option<SocketAddr> {
    let mut parts = line.split(' ');
    let mut part = || parts.next();
    let (family, source, destination) = (part()?, part()?, part()?);
    let (port, other_port) = (port(part()?)?, part()?);
    self::port(other_port)?;
    if part().is_some() {
        return None;
    }
    let address = |text: &str| match family {
        "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::from),
        "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::from),
        _ => None,
    };
    address(destination)?;
    Some(SocketAddr::new(address(source)?, port))
}

/// In decimal digits alone, without leading zeros.
fn port(text: &str) -> Option<u16> {
    let is_usual =
        text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_usual)
}

fn version_2(bytes: &[u8]) -> Result<Option<ProxyHeader>, ProxyError> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else {
        return Ok(None);
    };
    let [.., command, kind, high, low] = *head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(ProxyError::Malformed),
    };
    // The family, of which there are four, and the transport, of which there are three; of LOCAL they say nothing.
    if !is_local && (kind >> 4 > 3 || kind & 0xf > 2) {
        return Err(ProxyError::Malformed);
    }
    // TCP over IPv4 and IPv6; what is of another kind says nothing of use here.
    let needed = match kind {
        _ if is_local => 0,
        0x11 => 12,
        0x21 => 36,
        _ => 0,
    };
    if length < needed {
        return Err(ProxyError::Malformed);
    }
    if HEAD + length > MAX_BLOCK {
        return Err(ProxyError::TooLong);
    }
    let Some(block) = rest.get(..length) else {
        return Ok(None);
    };
    let client = match (needed, block) {
        (12, [a, b, c, d, _, _, _, _, high, low, ..]) => {
            let ip = Ipv4Addr::new(*a, *b, *c, *d);
            Some(SocketAddr::new(
                ip.into(),
                u16::from_be_bytes([*high, *low]),
            ))
        }
        (36, block) => block.split_first_chunk::<16>().and_then(|(source, rest)| {
            let (_, ports) = rest.split_first_chunk::<16>()?;
            let (port, _) = ports.split_first_chunk::<2>()?;
            let ip = Ipv6Addr::from(*source);
            Some(SocketAddr::new(ip.into(), u16::from_be_bytes(*port)))
        }),
        _ => None,
    };
    Ok(Some(ProxyHeader {
        len: HEAD + length,
        client,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn client(bytes: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
        let header = parse(bytes)?.expect("whole");
        assert_eq!(header.len, bytes.len());
        Ok(header.client)
    }

    fn of(text: &str) -> Option<SocketAddr> {
        Some(text.parse().unwrap())
    }

    /// A header of version 2.
    fn block(command: u8, kind: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, kind], &length, rest].concat()
    }

    #[test]
    fn a_line_says_whose_connection_it_is() {
        let check = |line: &str, expected| {
            let line = format!("{line}\r\n");
            assert_eq!(client(line.as_bytes()), expected, "{line:?}");
        };
        let bad = Err(ProxyError::Malformed);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 9 10", Ok(of("1.2.3.4:9")));
        check("PROXY TCP6 ::1 fd00::2 65535 0", Ok(of("[::1]:65535")));
        check(
            "PROXY TCP6 ::ffff:1.2.3.4 ::1 1 2",
            Ok(of("[::ffff:1.2.3.4]:1")),
        );
        check("PROXY UNKNOWN", Ok(None));
        check("PROXY UNKNOWN what ever it says", Ok(None));
        assert_eq!(client(b"PROXY UNKNOWN \xff\r\n"), Ok(None));
        check("PROXY UNKNOWNS", bad);
        check("PROXY ", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 9", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 9 10 11", bad);
        check("PROXY TCP4  1.2.3.4 5.6.7.8 9 10", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 9 10 ", bad);
        check("PROXY TCP4 1.2.3.4 ::1 9 10", bad);
        check("PROXY TCP4 ::1 ::1 9 10", bad);
        check("PROXY TCP6 1.2.3.4 5.6.7.8 9 10", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 65536 10", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 +9 10", bad);
        check("PROXY TCP4 1.2.3.4 5.6.7.8 09 10", bad);
        check("PROXY TCP4 01.2.3.4 5.6.7.8 9 10", bad);
        check("PROXY UDP4 1.2.3.4 5.6.7.8 9 10", bad);
        check("PROXY TCP4\t1.2.3.4 5.6.7.8 9 10", bad);
        assert_eq!(parse(b"PROXY UNKNOWN\n"), Err(ProxyError::Malformed));
    }

    #[test]
    fn a_block_says_whose_connection_it_is() {
        let four = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 0, 10];
        let six: Vec<u8> = [[0; 15].as_slice(), &[1], &[9; 16], &[1, 0], &[0, 2]].concat();
        let more = |block: &[u8]| [block, &[4, 0, 1, 7]].concat();
        let check = |block: &[u8], expected| assert_eq!(client(block), expected, "{block:?}");
        let bad = Err(ProxyError::Malformed);
        check(&block(0x21, 0x11, &four), Ok(of("1.2.3.4:9")));
        check(&block(0x21, 0x21, &six), Ok(of("[::1]:256")));
        // What follows the addresses is passed over.
        check(&block(0x21, 0x11, &more(&four)), Ok(of("1.2.3.4:9")));
        check(&block(0x21, 0x21, &more(&six)), Ok(of("[::1]:256")));
        // LOCAL, of no family, by UDP, of Unix sockets.
        check(&block(0x20, 0x11, &four), Ok(None));
        check(&block(0x20, 0, &[]), Ok(None));
        check(&block(0x20, 0xff, &four), Ok(None));
        check(&block(0x21, 0, &four), Ok(None));
        check(&block(0x21, 0x12, &four), Ok(None));
        check(&block(0x21, 0x31, &[b'a'; 216]), Ok(None));
        check(&block(0x11, 0x11, &four), bad);
        check(&block(0x22, 0x11, &four), bad);
        check(&block(0x21, 0x41, &four), bad);
        check(&block(0x21, 0x13, &four), bad);
        check(&block(0x21, 0x11, &four[1..]), bad);
        check(&block(0x21, 0x21, &six[1..]), bad);
        assert_eq!(
            parse(&block(0x21, 0x11, &[0; 9000])),
            Err(ProxyError::TooLong)
        );
    }

    #[test]
    fn what_is_none_is_told_by_its_first_bytes() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROPFIND",
            b"\x16\x03\x01",
            b"\r\n\r\nA",
            b"PROXYA",
        ] {
            assert_eq!(parse(bytes), Err(ProxyError::Absent));
        }
        for bytes in [&b""[..], b"P", b"PROXY", b"\r", b"\r\n\r\n\0\r\nQUIT"] {
            assert_eq!(parse(bytes), Ok(None), "{bytes:?}");
        }
        assert_eq!(
            parse(format!("PROXY UNKNOWN {}", "a".repeat(200)).as_bytes()),
            Err(ProxyError::TooLong)
        );
    }

    /// Bytes that look like a header, and others.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let tail = prop::collection::vec(any::<u8>(), 0..300);
        let line = "PROXY (TCP4|TCP6|UNKNOWN) [0-9.:a-f ]{0,60}\r\n".prop_map(String::into_bytes);
        let two = (
            0x1f_u8..0x23,
            any::<u8>(),
            prop::collection::vec(any::<u8>(), 0..80),
        )
            .prop_map(|(command, kind, rest)| block(command, kind, &rest));
        (prop_oneof![line, two, Just(Vec::new())], tail)
            .prop_map(|(front, rest)| [front, rest].concat())
    }

    proptest! {
        #[test]
        fn a_header_is_the_same_in_whatever_pieces_it_comes(bytes in bytes()) {
            let whole = parse(&bytes);
            if let Ok(Some(header)) = whole {
                prop_assert!(header.len <= bytes.len());
                prop_assert_eq!(parse(&bytes[..header.len]), whole);
                for end in 0..header.len {
                    prop_assert_eq!(parse(&bytes[..end]), Ok(None));
                }
            }
            if whole.is_err() {
                // What is wrong stays wrong, whatever follows.
                prop_assert_eq!(parse(&[&bytes[..], b"\r\n"].concat()).is_err(), true);
            }
        }

        #[test]
        fn what_is_written_is_read(client: SocketAddr, other: SocketAddr, rest in prop::collection::vec(any::<u8>(), 0..9)) {
            let (family, kind) = match client.ip() {
                IpAddr::V4(_) => ("TCP4", 0x11),
                IpAddr::V6(_) => ("TCP6", 0x21),
            };
            let other_ip = match (client.ip(), other.ip()) {
                (IpAddr::V4(_), IpAddr::V6(_)) => IpAddr::from([9, 9, 9, 9]),
                (IpAddr::V6(_), IpAddr::V4(_)) => IpAddr::from([9; 16]),
                (_, ip) => ip,
            };
            // Flow and scope are not said.
            let client = SocketAddr::new(client.ip(), client.port());
            let line = format!("PROXY {family} {} {other_ip} {} {}\r\n", client.ip(), client.port(), other.port());
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let addresses = [octets(client.ip()), octets(other_ip)].concat();
            let ports = [client.port().to_be_bytes(), other.port().to_be_bytes()].concat();
            for header in [line.into_bytes(), block(0x21, kind, &[addresses, ports].concat())] {
                let parsed = parse(&[&header[..], &rest].concat());
                prop_assert_eq!(parsed, Ok(Some(ProxyHeader { len: header.len(), client: Some(client) })));
            }
        }
    }
}
