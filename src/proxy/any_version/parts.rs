//! Bodies by either version of HTTP, part by part: where they come from and where they go. A part is asked for once the
//! one before has been taken, so that a slow reader slows the writer; what a window lets come of HTTP/2 meanwhile is kept as bytes.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;

use crate::clock;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::trailers;
use crate::net::stream::{Reading, Writing};
use crate::net::window::{Inflow, Window};
use crate::proxy::framing::{Front, put_piece};
use crate::proxy::wire::{is_end, read_rest, write_in_parts};

/// Bytes that are worth a write.
const ENOUGH: usize = 16 * 1024;
/// A part of fewer bytes goes on with those behind it.
const SMALL: usize = 1024;
/// Bytes by which a slow receiver of HTTP/2 moves: windows of a byte at a time would else hold a body for ever (CVE-2019-9517).
const MOVED: usize = 1024;

/// The next of a body.
#[derive(Debug)]
pub(super) enum Part {
    /// Not empty; `last` where it is known that nothing follows.
    Data { bytes: Bytes, last: bool },
    /// The end, with the fields behind the body.
    End(HeaderMap),
}

/// Why a body comes or goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// The other end closed, reset or failed.
    Gone,
    /// It ended within the body, but may still read.
    CutShort,
    /// What came is no body.
    Malformed,
}

/// Where a body comes from.
pub(super) enum Source<'a, 's> {
    Http1 {
        stream: Reading<'a, 's>,
        /// What was read ahead, and at the end what lies behind the body.
        buffer: &'a mut Vec<u8>,
        reader: BodyReader,
        /// Whether the end of the connection ends the body.
        until_close: bool,
    },
    Http2 {
        stream: &'a mut RecvStream,
        /// Bytes of the part given last, which its sender may send anew once they are taken.
        taken: usize,
        /// What has come since, out of its frames.
        ahead: BytesMut,
        inflow: Inflow,
        /// Of its connection.
        window: &'a Window,
    },
}

impl<'a> Source<'a, '_> {
    pub(super) fn http2(stream: &'a mut RecvStream, window: &'a Window) -> Self {
        Source::Http2 {
            stream,
            taken: 0,
            ahead: BytesMut::new(),
            inflow: Inflow::default(),
            window,
        }
    }

    /// The next part; none behind an [`Part::End`] or a last one. A call that is dropped has taken nothing.
    pub(super) async fn next(&mut self) -> Result<Part, Broken> {
        match self {
            Source::Http1 {
                stream,
                buffer,
                reader,
                until_close,
            } => loop {
                if let Some(part) = read_ahead(buffer, reader)? {
                    return Ok(part);
                }
                match read_rest(stream, buffer).await {
                    Ok(1..) => {}
                    read if *until_close && is_end(&read) => {
                        return Ok(Part::End(HeaderMap::new()));
                    }
                    Ok(0) => return Err(Broken::CutShort),
                    Err(_) => return Err(Broken::Gone),
                }
            },
            Source::Http2 {
                stream,
                taken,
                ahead,
                inflow,
                window,
            } => {
                let _ = stream
                    .flow_control()
                    .release_capacity(std::mem::take(taken));
                if !ahead.is_empty() {
                    let bytes = ahead.split_to(ahead.len().min(ENOUGH)).freeze();
                    *taken = bytes.len();
                    inflow.took(*taken, clock::coarse(), window);
                    let last = ahead.is_empty() && stream.is_end_stream();
                    return Ok(Part::Data { bytes, last });
                }
                loop {
                    match stream.data().await {
                        Some(Ok(bytes)) if bytes.is_empty() && !stream.is_end_stream() => {}
                        Some(Ok(bytes)) if bytes.is_empty() => {
                            return Ok(Part::End(HeaderMap::new()));
                        }
                        Some(Ok(first)) => {
                            let bytes = match first.len() < SMALL {
                                true => together(stream, first),
                                false => first,
                            };
                            *taken = bytes.len();
                            inflow.took(*taken, clock::coarse(), window);
                            let last = stream.is_end_stream();
                            return Ok(Part::Data { bytes, last });
                        }
                        // Ended by the other side in order: it has sent all that it wants to be heard.
                        Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => {
                            return Err(Broken::CutShort);
                        }
                        Some(Err(_)) => return Err(Broken::Gone),
                        None => {
                            let trailers = stream.trailers().await.map_err(|_| Broken::Gone)?;
                            return Ok(Part::End(trailers.unwrap_or_default()));
                        }
                    }
                }
            }
        }
    }

    /// What `put` gives. Where that waits for a receiver, what comes of the body meanwhile is taken out of its frames, of which a
    /// small one costs many times its bytes; the window bounds how much that is.
    pub(super) async fn gathering<T>(&mut self, put: impl Future<Output = T>) -> T {
        let mut put = pin!(put);
        poll_fn(|cx| {
            let put = put.as_mut().poll(cx);
            if let (Poll::Pending, Source::Http2 { stream, ahead, .. }) = (&put, &mut *self) {
                gather(stream, ahead, usize::MAX, cx);
            }
            put
        })
        .await
    }

    /// Whether the body was taken to its end.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Source::Http1 { reader, .. } => reader.is_done(),
            Source::Http2 { stream, ahead, .. } => stream.is_end_stream() && ahead.is_empty(),
        }
    }

    /// Whether the body was taken to its end, and nothing came behind it.
    pub(super) fn is_spent(&self) -> bool {
        match self {
            Source::Http1 { buffer, .. } => self.is_over() && buffer.is_empty(),
            Source::Http2 { .. } => self.is_over(),
        }
    }
}

/// What stands in `buffer` of a body of HTTP/1.1, in one part, however many chunks it is: by HTTP/2 each would be a frame of its own.
fn read_ahead(buffer: &mut Vec<u8>, reader: &mut BodyReader) -> Result<Option<Part>, Broken> {
    let mut front = Front::of(buffer);
    let mut all = Vec::new();
    while !front.rest().is_empty() || reader.is_done() {
        match reader.next(front.rest()).map_err(|_| Broken::Malformed)? {
            Piece::Data { data, consumed } => {
                let rest = front.rest();
                if all.is_empty() {
                    // As much as there can be.
                    all.reserve_exact(rest.len() - data.start);
                }
                all.extend_from_slice(&rest[data]);
                front.take(consumed);
            }
            Piece::NeedMore { consumed } => front.take(consumed),
            Piece::End { consumed } => {
                front.take(consumed);
                if all.is_empty() {
                    return Ok(Some(Part::End(fields_of(reader.trailers())?)));
                }
                break;
            }
        }
        // A body of a length may have its end with its data.
        if reader.is_done() && !all.is_empty() {
            break;
        }
    }
    if all.is_empty() {
        return Ok(None);
    }
    let last = reader.is_done() && reader.trailers().is_empty();
    let bytes = Bytes::from(all);
    Ok(Some(Part::Data { bytes, last }))
}

/// A part with those behind it that have come, too: by HTTP/1.1 each would be a write and a segment of its own.
fn together(stream: &mut RecvStream, first: Bytes) -> Bytes {
    let mut cx = Context::from_waker(Waker::noop());
    let Poll::Ready(Some(Ok(second))) = stream.poll_data(&mut cx) else {
        return first;
    };
    let mut all = BytesMut::with_capacity(first.len() + second.len());
    all.extend_from_slice(&first);
    all.extend_from_slice(&second);
    gather(stream, &mut all, ENOUGH, &mut cx);
    all.freeze()
}

/// Takes what has come, until there are `enough` bytes. Why there is no more is told to whoever asks next.
fn gather(stream: &mut RecvStream, ahead: &mut BytesMut, enough: usize, cx: &mut Context<'_>) {
    while ahead.len() < enough
        && let Poll::Ready(Some(Ok(bytes))) = stream.poll_data(cx)
    {
        ahead.extend_from_slice(&bytes);
    }
}

fn fields_of(section: &[u8]) -> Result<HeaderMap, Broken> {
    let mut fields = HeaderMap::new();
    for (name, value) in trailers::parse(section).map_err(|_| Broken::Malformed)? {
        let name = http::HeaderName::from_bytes(&section[name]).map_err(|_| Broken::Malformed)?;
        let value =
            http::HeaderValue::from_bytes(&section[value]).map_err(|_| Broken::Malformed)?;
        fields
            .try_append(name, value)
            .map_err(|_| Broken::Malformed)?;
    }
    Ok(fields)
}

/// Where a body goes. What is sent says that something `moved` as a slow receiver takes it part by part.
pub(super) enum Sink<'a> {
    Http1 {
        stream: Writing<'a, 'a>,
        /// What goes out with the next part: the head, at first.
        out: Vec<u8>,
        chunked: bool,
    },
    Http2(SendStream<Bytes>),
}

impl Sink<'_> {
    /// Sends what waits to be sent with a part, though there is none yet.
    pub(super) async fn flush(&mut self, moved: impl Fn()) -> Result<(), Broken> {
        match self {
            Sink::Http1 { stream, out, .. } => send_out(stream, out, moved).await,
            Sink::Http2(_) => Ok(()),
        }
    }

    /// Sends data, not empty, once the receiver has room for it.
    pub(super) async fn put(
        &mut self,
        bytes: Bytes,
        last: bool,
        moved: impl Fn(),
    ) -> Result<(), Broken> {
        match self {
            Sink::Http1 {
                stream,
                out,
                chunked,
            } => {
                put_piece(out, &bytes, *chunked);
                if last && *chunked {
                    out.extend_from_slice(b"0\r\n\r\n");
                }
                send_out(stream, out, moved).await
            }
            Sink::Http2(stream) => put_http2(stream, bytes, last, moved).await,
        }
    }

    /// Ends the body. Trailers are left out where the framing has no place for them.
    pub(super) async fn end(
        &mut self,
        trailers: HeaderMap,
        moved: impl Fn(),
    ) -> Result<(), Broken> {
        match self {
            Sink::Http1 {
                stream,
                out,
                chunked,
            } => {
                if *chunked {
                    out.extend_from_slice(b"0\r\n");
                    for (name, value) in &trailers {
                        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                            out.extend_from_slice(part);
                        }
                    }
                    out.extend_from_slice(b"\r\n");
                }
                send_out(stream, out, moved).await
            }
            Sink::Http2(stream) => {
                let ended = match trailers.is_empty() {
                    true => stream.send_data(Bytes::new(), true),
                    false => stream.send_trailers(trailers),
                };
                ended.map_err(|_| Broken::Gone)
            }
        }
    }

    /// Breaks the body off, so that its receiver does not take what it has for the whole.
    pub(super) fn reset(&mut self, reason: Reason) {
        match self {
            // The caller closes the connection.
            Sink::Http1 { .. } => {}
            Sink::Http2(stream) => stream.send_reset(reason),
        }
    }
}

async fn send_out(
    stream: &mut Writing<'_, '_>,
    out: &mut Vec<u8>,
    moved: impl Fn(),
) -> Result<(), Broken> {
    let written = write_in_parts(stream, out, moved).await;
    out.clear();
    written.map_err(|_| Broken::Gone)
}

async fn put_http2(
    stream: &mut SendStream<Bytes>,
    mut bytes: Bytes,
    last: bool,
    moved: impl Fn(),
) -> Result<(), Broken> {
    let mut taken = 0;
    loop {
        stream.reserve_capacity(bytes.len());
        let room = match stream.capacity() {
            0 => match poll_fn(|cx| stream.poll_capacity(cx)).await {
                // It may say that there is room where another stream was quicker.
                Some(Ok(0)) => continue,
                Some(Ok(room)) => room,
                Some(Err(_)) | None => return Err(Broken::Gone),
            },
            room => room,
        };
        let part = bytes.split_to(room.min(bytes.len()));
        taken += part.len();
        let done = bytes.is_empty();
        stream
            .send_data(part, last && done)
            .map_err(|_| Broken::Gone)?;
        if done {
            return Ok(());
        }
        if taken >= MOVED {
            taken = 0;
            moved();
        }
    }
}

/// Takes out the fields that may not go on.
pub(super) fn keep(trailers: &mut HeaderMap, may: impl Fn(&[u8]) -> bool) {
    let not: Vec<_> = trailers
        .keys()
        .filter(|name| !may(name.as_str().as_bytes()))
        .cloned()
        .collect();
    for name in not {
        trailers.remove(name);
    }
}
