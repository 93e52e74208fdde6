//! A body's bytes out of the wire's (RFC 9112 sections 6 and 7), piece by piece and in place. Owns where a body ends and
//! which chunk framing is refused; does no I/O and holds no buffer.

use std::ops::Range;

use thiserror::Error;

use super::head::BodyLength;

/// The most bytes that all chunk extensions and trailers of a body may have together: framing is not a way to send without
/// end. What is left of a size line is at most 16 digits for a chunk that is not empty.
pub const MAX_FRAMING_BYTES: u32 = 8 * 1024;

/// The most spaces behind one chunk's size: a body has as many such lines as it likes.
const MAX_FILL: u8 = 64;

/// Why a body is refused: 400 from a client, 502 from an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BodyError {
    #[error("a chunk size is not hexadecimal digits within 64 bits")]
    ChunkSize,
    #[error("a chunk does not end in CR LF")]
    ChunkEnd,
    #[error("a chunk extension has a bare CR, LF or a control character")]
    ChunkExtension,
    #[error("a trailer line does not end in CR LF")]
    Trailer,
    #[error("chunk extensions and trailers are larger than {MAX_FRAMING_BYTES} bytes")]
    FramingTooLarge,
}

/// What [`BodyReader::next`] found at the front of the bytes given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Body bytes, at this place; `consumed` bytes of the input are done with.
    Data { data: Range<usize>, consumed: usize },
    /// The input is used up but for what lies behind `consumed`; give more.
    NeedMore { consumed: usize },
    /// The body is whole; the next message begins behind `consumed`.
    End { consumed: usize },
}

/// Where in a body the wire is. Chunk extensions are read, bounded and dropped; trailers are kept.
#[derive(Debug, Clone)]
pub struct BodyReader {
    state: State,
    /// Bytes of extensions and trailers so far.
    framing: u32,
    /// Whether spaces may stand behind a chunk's size: some servers fill it up. Of a request it is refused, since peers differ.
    may_fill: bool,
    /// Lines behind the last chunk, as they came.
    trailers: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fixed { left: u64 },
    Size { size: u64, digits: u8 },
    Fill { size: u64, left: u8 },
    Extension { size: u64 },
    SizeLf { size: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    TrailerStart,
    TrailerLine,
    TrailerLf,
    EndLf,
    Done,
}

const NEXT_CHUNK: State = State::Size { size: 0, digits: 0 };

impl BodyReader {
    /// A reader at the first byte behind the head.
    pub fn new(length: BodyLength) -> BodyReader {
        let state = match length {
            BodyLength::None | BodyLength::Fixed(0) => State::Done,
            BodyLength::Fixed(left) => State::Fixed { left },
            BodyLength::Chunked => NEXT_CHUNK,
        };
        BodyReader {
            state,
            framing: 0,
            may_fill: false,
            trailers: Vec::new(),
        }
    }

    /// As [`BodyReader::new`], of a response's body.
    pub fn of_response(length: BodyLength) -> BodyReader {
        BodyReader {
            may_fill: true,
            ..BodyReader::new(length)
        }
    }

    /// The trailer section as it came (RFC 9112 section 7.1.2), without the empty line behind it; whole once the body is.
    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    /// Whether the body was read to its end, so that the connection can carry another message.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Reads on at the front of `bytes`, which begin where the last call's `consumed` ended.
    pub fn next(&mut self, bytes: &[u8]) -> Result<Piece, BodyError> {
        for (at, byte) in bytes.iter().copied().enumerate() {
            self.state = match self.state {
                State::Done => return Ok(Piece::End { consumed: at }),
                State::Fixed { left } => {
                    let (taken, left) = take(bytes.len() - at, left);
                    self.state = if left == 0 {
                        State::Done
                    } else {
                        State::Fixed { left }
                    };
                    return Ok(Piece::Data {
                        data: at..at + taken,
                        consumed: at + taken,
                    });
                }
                State::Data { left } => {
                    let (taken, left) = take(bytes.len() - at, left);
                    self.state = if left == 0 {
                        State::DataCr
                    } else {
                        State::Data { left }
                    };
                    return Ok(Piece::Data {
                        data: at..at + taken,
                        consumed: at + taken,
                    });
                }
                State::Size { size, digits } => match (byte as char).to_digit(16) {
                    // Sixteen digits fill a u64; a longer size is an attack, leading zeros or not.
                    Some(_) if digits == 16 => return Err(BodyError::ChunkSize),
                    Some(digit) => State::Size {
                        size: size << 4 | u64::from(digit),
                        digits: digits + 1,
                    },
                    None if digits == 0 => return Err(BodyError::ChunkSize),
                    None if byte == b';' => State::Extension { size },
                    None if byte == b'\r' => State::SizeLf { size },
                    None if self.may_fill && matches!(byte, b' ' | b'\t') => State::Fill {
                        size,
                        left: MAX_FILL - 1,
                    },
                    None => return Err(BodyError::ChunkSize),
                },
                State::Fill { size, left } => match (byte, left) {
                    (b';', _) => State::Extension { size },
                    (b'\r', _) => State::SizeLf { size },
                    (b' ' | b'\t', 1..) => State::Fill {
                        size,
                        left: left - 1,
                    },
                    _ => return Err(BodyError::ChunkSize),
                },
                State::Extension { size } => match byte {
                    b'\r' => State::SizeLf { size },
                    b'\t' | b' '..=b'~' | 0x80.. => {
                        self.grow()?;
                        State::Extension { size }
                    }
                    _ => return Err(BodyError::ChunkExtension),
                },
                State::SizeLf { size } => match (byte, size) {
                    (b'\n', 0) => State::TrailerStart,
                    (b'\n', left) => State::Data { left },
                    _ => return Err(BodyError::ChunkExtension),
                },
                State::DataCr if byte == b'\r' => State::DataLf,
                State::DataLf if byte == b'\n' => NEXT_CHUNK,
                State::DataCr | State::DataLf => return Err(BodyError::ChunkEnd),
                State::TrailerStart if byte == b'\r' => State::EndLf,
                State::TrailerStart | State::TrailerLine => {
                    self.grow()?;
                    self.trailers.push(byte);
                    match byte {
                        b'\r' => State::TrailerLf,
                        b'\t' | b' '..=b'~' | 0x80.. => State::TrailerLine,
                        _ => return Err(BodyError::Trailer),
                    }
                }
                State::TrailerLf if byte == b'\n' => {
                    self.trailers.push(byte);
                    State::TrailerStart
                }
                State::EndLf if byte == b'\n' => State::Done,
                State::TrailerLf | State::EndLf => return Err(BodyError::Trailer),
            };
        }
        Ok(match self.state {
            State::Done => Piece::End {
                consumed: bytes.len(),
            },
            _ => Piece::NeedMore {
                consumed: bytes.len(),
            },
        })
    }

    fn grow(&mut self) -> Result<(), BodyError> {
        if self.framing >= MAX_FRAMING_BYTES {
            return Err(BodyError::FramingTooLarge);
        }
        self.framing += 1;
        Ok(())
    }
}

/// How many of `available` bytes belong to `left`, and what is left then.
fn take(available: usize, left: u64) -> (usize, u64) {
    let taken = usize::try_from(left).map_or(available, |left| available.min(left));
    (taken, left - taken as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type BodyAndRest = (Vec<u8>, Vec<u8>);

    /// Feeds `wire` in pieces of `step` bytes; the body and the bytes behind it, or `None` while it is not whole.
    fn read(
        length: BodyLength,
        wire: &[u8],
        step: usize,
    ) -> Result<Option<BodyAndRest>, BodyError> {
        let mut reader = BodyReader::new(length);
        let mut body = Vec::new();
        let (mut start, mut end) = (0, 0);
        loop {
            match reader.next(&wire[start..end])? {
                Piece::Data { data, consumed } => {
                    body.extend_from_slice(&wire[start..end][data]);
                    start += consumed;
                }
                Piece::End { consumed } => {
                    return Ok(Some((body, wire[start + consumed..].to_vec())));
                }
                Piece::NeedMore { .. } if end == wire.len() => return Ok(None),
                Piece::NeedMore { consumed } => {
                    start += consumed;
                    end = (end + step).min(wire.len());
                }
            }
        }
    }

    #[test]
    fn a_body_ends_where_its_framing_says() {
        let check = |length, wire: &str, body: &str, rest: &str| {
            let expected = Some((body.as_bytes().to_vec(), rest.as_bytes().to_vec()));
            for step in 1..=wire.len().max(1) {
                assert_eq!(
                    read(length, wire.as_bytes(), step),
                    Ok(expected.clone()),
                    "{wire:?} by {step}"
                );
            }
        };
        check(BodyLength::Fixed(3), "abcGET", "abc", "GET");
        check(
            BodyLength::Chunked,
            "3\r\nabc\r\n0\r\n\r\nGET",
            "abc",
            "GET",
        );
        check(
            BodyLength::Chunked,
            "A;x=\"y\"\r\n0123456789\r\n00\r\nX-T: 1\r\n\r\n",
            "0123456789",
            "",
        );
        check(BodyLength::None, "", "", "");
    }

    #[test]
    fn ambiguous_chunk_framing_is_refused() {
        let check = |wire: &str, error| {
            for step in 1..=wire.len() {
                assert_eq!(
                    read(BodyLength::Chunked, wire.as_bytes(), step),
                    Err(error),
                    "{wire:?} by {step}"
                );
            }
        };
        check("\r\n", BodyError::ChunkSize);
        check("-1\r\n", BodyError::ChunkSize);
        check("0x1\r\n", BodyError::ChunkSize);
        check(" 1\r\n", BodyError::ChunkSize);
        check("1 \r\n", BodyError::ChunkSize);
        check("1\n", BodyError::ChunkSize);
        check("10000000000000000\r\n", BodyError::ChunkSize);
        check("1;a\n", BodyError::ChunkExtension);
        check("1;a\rb", BodyError::ChunkExtension);
        check("1\r\nab", BodyError::ChunkEnd);
        check("1\r\na\n", BodyError::ChunkEnd);
        check("0\r\nX: 1\n", BodyError::Trailer);
        check("0\r\n\rX", BodyError::Trailer);
    }

    #[test]
    fn spaces_behind_sizes_are_bounded_by_the_line() {
        let all = |wire: &str| {
            let mut reader = BodyReader::of_response(BodyLength::Chunked);
            let mut rest = wire.as_bytes();
            loop {
                match reader.next(rest)? {
                    Piece::Data { consumed, .. } => rest = &rest[consumed..],
                    Piece::NeedMore { .. } | Piece::End { .. } => return Ok(reader.is_done()),
                }
            }
        };
        let long = "1   \r\na\r\n".repeat(10_000) + "0  \r\n\r\n";
        assert_eq!(all(&long), Ok(true));
        let spaces = |count: usize| format!("0{}\r\n\r\n", " ".repeat(count));
        assert_eq!(all(&spaces(usize::from(MAX_FILL))), Ok(true));
        let over = all(&spaces(usize::from(MAX_FILL) + 1));
        assert_eq!(over, Err(BodyError::ChunkSize));
    }

    #[test]
    fn framing_without_end_is_refused() {
        let extension = format!("1;{}", "a".repeat(MAX_FRAMING_BYTES as usize + 1));
        assert_eq!(
            read(BodyLength::Chunked, extension.as_bytes(), 1024),
            Err(BodyError::FramingTooLarge)
        );
        // Each alone is small.
        let extensions = format!("1;{}\r\na\r\n", "a".repeat(100)).repeat(100);
        assert_eq!(
            read(BodyLength::Chunked, extensions.as_bytes(), 1024),
            Err(BodyError::FramingTooLarge)
        );
        let trailers = format!("0\r\n{}", "A: 1\r\n".repeat(2000));
        assert_eq!(
            read(BodyLength::Chunked, trailers.as_bytes(), 1024),
            Err(BodyError::FramingTooLarge)
        );
    }

    proptest! {
        #[test]
        fn chunks_come_out_as_they_went_in(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8), step in 1usize..64) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            prop_assert_eq!(read(BodyLength::Chunked, &wire, step), Ok(Some((chunks.concat(), Vec::new()))));
        }

        #[test]
        fn no_bytes_panic_or_hang(wire in prop::collection::vec(any::<u8>(), 0..200), step in 1usize..64) {
            let _ = read(BodyLength::Chunked, &wire, step);
        }
    }
}
