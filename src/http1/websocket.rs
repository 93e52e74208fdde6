//! WebSocket (RFC 6455) as far as a proxy must know it: how it is opened, where one frame ends and the next begins, and how it is
//! closed. Does no I/O, and looks into no payload.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1_smol::Sha1;

use super::head::values;
use super::hygiene::connection_options;
use super::response::ResponseHead;

/// As an `Upgrade` field names it.
pub const WEBSOCKET: &[u8] = b"websocket";

/// Why a connection is closed (RFC 6455 section 7.4.1).
pub const GOING_AWAY: u16 = 1001;
pub const POLICY_VIOLATION: u16 = 1008;

/// The longest header of a frame.
const MAX_HEADER: usize = 14;
const CLOSE: u8 = 8;

/// The `Sec-WebSocket-Key` of 16 random bytes.
pub fn key(random: u128) -> String {
    STANDARD.encode(random.to_be_bytes())
}

/// The `Sec-WebSocket-Accept` that answers a key (section 4.2.2).
pub fn accept(key: &str) -> String {
    let mut sha1 = Sha1::from(key);
    sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(sha1.digest().bytes())
}

/// Whether a 101, whose head stands in `answer`, opens the connection that this key asked for (section 4.1).
pub fn is_opened(answer: &[u8], head: &ResponseHead, key: &str) -> bool {
    let values = |name: &'static str| values(answer, &head.fields, name);
    let mut options = values("connection").flat_map(connection_options);
    let (mut protocols, mut accepts) = (values("upgrade"), values("sec-websocket-accept"));
    let is_one = |value: Option<&[u8]>, wanted: &[u8]| {
        value.is_some_and(|value| value.eq_ignore_ascii_case(wanted))
    };
    options.any(|option| option.eq_ignore_ascii_case(b"upgrade"))
        && is_one(protocols.next(), WEBSOCKET)
        && protocols.next().is_none()
        && accepts.next() == Some(accept(key).as_bytes())
        && accepts.next().is_none()
}

/// A Close frame. A client's has a mask, which is random.
pub fn close(code: u16, mask: Option<[u8; 4]>) -> Vec<u8> {
    let payload = code.to_be_bytes();
    let mut frame = vec![0x80 | CLOSE];
    match mask {
        None => {
            frame.push(2);
            frame.extend(payload);
        }
        Some(mask) => {
            frame.push(0x80 | 2);
            frame.extend(mask);
            frame.extend([payload[0] ^ mask[0], payload[1] ^ mask[1]]);
        }
    }
    frame
}

/// One way of a connection: where its bytes stand within a frame (section 5.2).
#[derive(Debug, Clone, Default)]
pub struct Frames {
    /// The header that is under way.
    header: [u8; MAX_HEADER],
    /// How much of it is here; 0 once it is whole.
    have: usize,
    payload_left: u64,
    closing: bool,
    closed: bool,
}

impl Frames {
    /// Whether the next byte begins a frame, so that another frame can stand before it: fragments of a message do not mind.
    pub fn is_between(&self) -> bool {
        self.have == 0 && self.payload_left == 0
    }

    /// Whether a Close frame has passed, behind which there must be no other.
    pub fn has_closed(&self) -> bool {
        self.closed
    }

    /// These bytes pass.
    pub fn follow(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let some = self.advance(bytes);
            bytes = &bytes[some..];
        }
    }

    /// How many of the bytes that come next belong to the frame that is under way.
    pub fn rest(&self, bytes: &[u8]) -> usize {
        match self.is_between() || bytes.is_empty() {
            true => 0,
            false => self.clone().advance(bytes),
        }
    }

    /// Takes of `bytes`, not empty, what there is of one frame.
    fn advance(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while self.payload_left == 0 && at < bytes.len() {
            self.header[self.have] = bytes[at];
            self.have += 1;
            at += 1;
            if self.have < header_len(&self.header[..self.have]) {
                continue;
            }
            self.closing = self.header[0] & 0x0f == CLOSE;
            self.payload_left = payload_len(&self.header);
            self.have = 0;
            if self.payload_left == 0 {
                break;
            }
        }
        let rest = u64::try_from(bytes.len() - at).unwrap_or(u64::MAX);
        let some = rest.min(self.payload_left);
        self.payload_left -= some;
        self.closed |= self.closing && self.is_between();
        at + usize::try_from(some).expect("it is no more than there are bytes")
    }
}

/// How long a header is that begins so, as far as is known.
fn header_len(begin: &[u8]) -> usize {
    let Some(second) = begin.get(1) else {
        return 2;
    };
    let length = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    2 + length + mask
}

fn payload_len(header: &[u8; MAX_HEADER]) -> u64 {
    let bytes = match header[1] & 0x7f {
        126 => &header[2..4],
        127 => &header[2..10],
        short => return u64::from(short),
    };
    bytes
        .iter()
        .fold(0, |length, byte| length << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http1::head::HeadLimits;
    use crate::http1::response::parse_response;

    #[test]
    fn a_key_is_answered_as_the_rfc_shows() {
        assert_eq!(
            accept("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        assert_eq!(STANDARD.decode(key(7)).unwrap().len(), 16);
    }

    #[test]
    fn a_connection_is_opened_only_as_was_asked() {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let check = |fields: &str, expected| {
            let answer = format!("HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n");
            let head = parse_response(answer.as_bytes(), false, HeadLimits::default());
            let head = head.unwrap().unwrap();
            assert_eq!(
                is_opened(answer.as_bytes(), &head, key),
                expected,
                "{fields}"
            );
        };
        let accepted = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
        check(
            &format!("Upgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n{accepted}"),
            true,
        );
        check(
            &format!("Upgrade: websocket\r\nConnection: upgrade\r\n{accepted}{accepted}"),
            false,
        );
        check(&format!("Upgrade: websocket\r\n{accepted}"), false);
        check(&format!("Connection: upgrade\r\n{accepted}"), false);
        check(
            &format!("Upgrade: x\r\nConnection: upgrade\r\n{accepted}"),
            false,
        );
        check("Upgrade: websocket\r\nConnection: upgrade\r\n", false);
        check(
            "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOp=\r\n",
            false,
        );
    }

    #[test]
    fn a_close_frame_is_one() {
        assert_eq!(close(1001, None), [0x88, 2, 0x03, 0xe9]);
        assert_eq!(
            close(1001, Some([1, 2, 3, 4])),
            [0x88, 0x82, 1, 2, 3, 4, 0x02, 0xeb]
        );
        for mask in [None, Some([9, 9, 9, 9])] {
            let mut frames = Frames::default();
            frames.follow(&close(1008, mask));
            assert!(frames.is_between() && frames.has_closed());
        }
    }

    fn frame(first: u8, masked: bool, form: u8, len: u16) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![first];
        match (form, len) {
            (0, 0..=125) => frame.push(mask | len as u8),
            (0 | 1, _) => {
                frame.push(mask | 126);
                frame.extend(len.to_be_bytes());
            }
            _ => {
                frame.push(mask | 127);
                frame.extend(u64::from(len).to_be_bytes());
            }
        }
        let rest = usize::from(len) + if masked { 4 } else { 0 };
        frame.extend(vec![0x88; rest]);
        frame
    }

    proptest! {
        #[test]
        fn frames_end_where_they_end_however_they_are_cut(
            frames in prop::collection::vec((any::<u8>(), any::<bool>(), 0u8..3, 0u16..300), 1..8),
            cuts in prop::collection::vec(1usize..40, 1..200),
        ) {
            let mut bytes = Vec::new();
            let mut ends = vec![0];
            let mut close_at = None;
            for (first, masked, form, len) in frames {
                bytes.extend(frame(first, masked, form, len));
                ends.push(bytes.len());
                if first & 0x0f == CLOSE && close_at.is_none() {
                    close_at = Some(bytes.len());
                }
            }
            let mut followed = Frames::default();
            let mut at = 0;
            for cut in cuts.into_iter().cycle() {
                prop_assert_eq!(followed.is_between(), ends.contains(&at));
                prop_assert_eq!(followed.has_closed(), close_at.is_some_and(|end| end <= at));
                let next = ends.iter().find(|end| **end >= at).unwrap();
                prop_assert_eq!(followed.rest(&bytes[at..]), next - at);
                if at == bytes.len() {
                    break;
                }
                let end = bytes.len().min(at + cut);
                followed.follow(&bytes[at..end]);
                at = end;
            }
        }

        #[test]
        fn any_bytes_are_followed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Frames::default();
            for piece in bytes.chunks(7) {
                prop_assert!(frames.rest(piece) <= piece.len());
                frames.follow(piece);
            }
        }
    }
}
