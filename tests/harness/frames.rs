//! HTTP/2 frame by frame (RFC 9113), for what no library sends: a writer of frames and of HPACK without tables, and a reader that
//! knows no more than a test asks.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::DEADLINE;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames (section 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

/// Error codes (section 7).
pub const NO_ERROR: u32 = 0;
pub const PROTOCOL_ERROR: u32 = 1;
pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// A frame, of whatever it says.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut out = length[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// A settings frame of these identifiers and values (section 6.5.1).
pub fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (name, value) in settings {
        payload.extend_from_slice(&name.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    frame(SETTINGS, 0, 0, &payload)
}

pub fn window_update(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

pub fn goaway(last: u32, code: u32) -> Vec<u8> {
    frame(
        GOAWAY,
        0,
        0,
        &[last.to_be_bytes(), code.to_be_bytes()].concat(),
    )
}

/// A field as a literal without a place in the table (RFC 7541 section 6.2.2), of whatever bytes.
pub fn literal(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = vec![0];
    put_text(&mut out, name);
    put_text(&mut out, value);
    out
}

/// As [`literal`], but with a place in the table (section 6.2.1).
pub fn kept(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = literal(name, value);
    out[0] = 0x40;
    out
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    // An integer with a prefix of seven bits (section 5.1).
    if let Some(mut left) = text.len().checked_sub(127) {
        out.push(127);
        while left >= 128 {
            out.push(u8::try_from(left % 128).unwrap() | 128);
            left /= 128;
        }
        out.push(u8::try_from(left).unwrap());
    } else {
        out.push(u8::try_from(text.len()).unwrap());
    }
    out.extend_from_slice(text);
}

/// A block of such fields.
pub fn block<T: AsRef<[u8]>>(fields: &[(T, T)]) -> Vec<u8> {
    let fields = fields.iter();
    fields
        .flat_map(|(name, value)| literal(name.as_ref(), value.as_ref()))
        .collect()
}

/// A request's head in one frame, for a path at host `x`.
pub fn request(stream: u32, flags: u8, method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut fields = vec![
        (":method", method),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", path),
    ];
    fields.extend_from_slice(more);
    frame(HEADERS, flags | END_HEADERS, stream, &block(&fields))
}

pub fn get(stream: u32, path: &str) -> Vec<u8> {
    request(stream, END_STREAM, "GET", path, &[])
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    /// The code of a reset or a farewell.
    pub fn code(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        let code = self.payload[at..at + 4].try_into().unwrap();
        Some(u32::from_be_bytes(code))
    }

    /// The status that stands first in a response's head, as h2 encodes it: by the static table, or by a literal under the name
    /// at its place 8, in Huffman's digits or plain.
    pub fn status(&self) -> Option<u16> {
        let known = [200, 204, 206, 304, 400, 404, 500];
        if self.kind != HEADERS {
            return None;
        }
        let mut block = &self.payload[..];
        // Updates of the table's size.
        while block.first()? & 0xe0 == 0x20 {
            block = &block[1..];
        }
        match block[0] {
            index @ 0x88..=0x8e => Some(known[usize::from(index - 0x88)]),
            0x08 | 0x18 | 0x48 => {
                let length = usize::from(block[1]);
                let text = &block[2..2 + (length & 127)];
                let text = match length & 128 {
                    0 => String::from_utf8_lossy(text).into_owned(),
                    _ => digits(text),
                };
                text.get(..3)?.parse().ok()
            }
            _ => None,
        }
    }
}

/// The digits of a Huffman-coded number (RFC 7541 appendix B): 0, 1 and 2 have five bits, the others six.
fn digits(coded: &[u8]) -> String {
    let bits = coded
        .iter()
        .fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    let mut left = coded.len() * 8;
    let mut out = String::new();
    while left >= 5 {
        let five = bits >> (left - 5) & 31;
        if five < 3 {
            out.push_str(&five.to_string());
            left -= 5;
            continue;
        }
        if left < 6 {
            break;
        }
        match bits >> (left - 6) & 63 {
            six @ 25..=31 => out.push_str(&(six - 22).to_string()),
            _ => break,
        }
        left -= 6;
    }
    out
}

/// A connection that sends what the test likes.
pub struct Raw {
    pub stream: TcpStream,
    ahead: Vec<u8>,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By its end, or a reset.
    Closed,
    /// Nothing came for as long as a test waits.
    Hung,
}

impl Raw {
    /// A client that has said its preface and these settings.
    pub fn client(address: SocketAddr, its: &[(u16, u32)]) -> Raw {
        let mut raw = Raw::of(TcpStream::connect(address).unwrap());
        raw.send(PREFACE);
        // Without a table of headers, so that a test can read a status.
        raw.send(&settings(&[&[(1, 0)], its].concat()));
        raw
    }

    /// A server that has read the preface and said these settings; `None` where the client sent none.
    pub fn server(stream: TcpStream, its: &[(u16, u32)]) -> Option<Raw> {
        let mut raw = Raw::of(stream);
        let mut preface = [0; PREFACE.len()];
        raw.stream.read_exact(&mut preface).ok()?;
        assert_eq!(preface, PREFACE);
        raw.send(&settings(its));
        Some(raw)
    }

    pub fn of(stream: TcpStream) -> Raw {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let ahead = Vec::new();
        Raw { stream, ahead }
    }

    /// Sends these bytes, unless the other end is gone; whether they were taken.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The next frame, be it of whatever kind. Settings are acknowledged, and pings answered, on the way.
    pub fn next(&mut self) -> Result<Frame, Ended> {
        let frame = self.read()?;
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                self.send(&super::frames::frame(SETTINGS, ACK, 0, &[]));
            }
            PING if frame.flags & ACK == 0 => {
                self.send(&super::frames::frame(PING, ACK, 0, &frame.payload));
            }
            _ => {}
        }
        Ok(frame)
    }

    fn read(&mut self) -> Result<Frame, Ended> {
        let head = self.exactly(9)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
        Ok(Frame {
            kind: head[3],
            flags: head[4],
            stream: stream & !(1 << 31),
            payload: self.exactly(usize::try_from(length).unwrap())?,
        })
    }

    fn exactly(&mut self, length: usize) -> Result<Vec<u8>, Ended> {
        let mut piece = [0; 16 * 1024];
        while self.ahead.len() < length {
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(Ended::Closed),
                Ok(read) => self.ahead.extend_from_slice(&piece[..read]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Err(Ended::Hung);
                }
                // A read that has a time ends where the process is stopped and goes on.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Ended::Closed),
            }
        }
        Ok(self.ahead.drain(..length).collect())
    }

    /// The next frame that `is`.
    #[track_caller]
    pub fn until(&mut self, is: impl Fn(&Frame) -> bool) -> Frame {
        loop {
            match self.next() {
                Ok(frame) if is(&frame) => return frame,
                Ok(_) => {}
                Err(ended) => panic!("it is {ended:?}"),
            }
        }
    }

    /// Everything of this stream until it ends or is reset, or the connection ends or says farewell.
    pub fn answer(&mut self, stream: u32) -> Answer {
        let mut answer = Answer::default();
        loop {
            match self.next() {
                Ok(frame) if frame.kind == GOAWAY => {
                    answer.farewell = frame.code();
                    // What it may still carry is no answer to what it objects to.
                    if answer.farewell != Some(NO_ERROR) {
                        return answer;
                    }
                }
                Ok(frame) if frame.stream == stream => {
                    match frame.kind {
                        RST_STREAM => {
                            answer.reset = frame.code();
                            return answer;
                        }
                        HEADERS => answer.status = frame.status().or(answer.status),
                        DATA => answer.body.extend_from_slice(&frame.payload),
                        _ => {}
                    }
                    if frame.ends_stream() {
                        answer.whole = true;
                        return answer;
                    }
                }
                Ok(_) => {}
                Err(ended) => {
                    answer.ended = Some(ended);
                    return answer;
                }
            }
        }
    }

    /// Reads until the connection ends; the code of its farewell.
    pub fn farewell(&mut self) -> (Option<u32>, Ended) {
        let mut code = None;
        loop {
            match self.next() {
                Ok(frame) => code = frame.code().filter(|_| frame.kind == GOAWAY).or(code),
                Err(ended) => return (code, ended),
            }
        }
    }

    /// For how long a read waits.
    pub fn patience(&self, span: Duration) {
        self.stream.set_read_timeout(Some(span)).unwrap();
    }
}

/// What became of a request.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: Option<u16>,
    pub body: Vec<u8>,
    /// Whether the stream ended in order.
    pub whole: bool,
    pub reset: Option<u32>,
    pub farewell: Option<u32>,
    pub ended: Option<Ended>,
}
