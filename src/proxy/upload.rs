//! A request's body on its way to the upstream, which may go on beside the response.

use std::io::Write as _;
use std::pin::pin;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::forward::Request;
use super::handle::Failure;
use super::headers::{may_trail_up, put_last_chunk};
use super::reply::Rejection;
use super::wire::{Deadlines, Elapsed, read_some};
use crate::clock;
use crate::http1::body::{BodyReader, Piece};
use crate::http1::head::BodyLength;
use crate::net::stream::{Reading, Writing};

/// A request with a body on its way up. It may be left at any wait and gone on with: what is not sent yet is kept here.
pub(super) struct Upload<'p> {
    reader: BodyReader,
    chunked: bool,
    /// Bytes that the body may still have.
    left: u64,
    /// Of the body, so far.
    pub bytes: u64,
    /// For the client, so far.
    waited: Duration,
    /// Not sent yet, but for what is `written` of it.
    out: Vec<u8>,
    written: usize,
    /// What a request's trailers must not say.
    identity_fields: &'p [Vec<u8>],
}

impl<'p> Upload<'p> {
    /// With nothing sent yet, `head` neither.
    pub(super) fn new(
        request: &Request,
        head: &[u8],
        identity_fields: &'p [Vec<u8>],
    ) -> Upload<'p> {
        let out = match request.body {
            BodyLength::None => Vec::new(),
            BodyLength::Fixed(_) | BodyLength::Chunked => head.to_vec(),
        };
        Upload {
            reader: BodyReader::new(request.body),
            chunked: request.body == BodyLength::Chunked,
            left: request.max_body,
            bytes: 0,
            waited: Duration::ZERO,
            out,
            written: 0,
            identity_fields,
        }
    }

    pub(super) async fn go_on(
        &mut self,
        request: &Request,
        from_client: &mut Reading<'_, '_>,
        buffer: &mut Vec<u8>,
        deadlines: &mut Deadlines,
        to_upstream: &mut Writing<'_, '_>,
    ) -> Result<(), Failure> {
        loop {
            while self.written < self.out.len() {
                let write = to_upstream.write(&self.out[self.written..]);
                match deadlines.within(request.within, write).await {
                    Ok(Ok(written @ 1..)) => self.written += written,
                    Ok(Ok(0) | Err(_)) => return Err(Rejection::UpstreamBroken.into()),
                    Err(Elapsed) => return Err(Rejection::UpstreamTimeout.into()),
                }
            }
            self.out.clear();
            self.written = 0;
            match deadlines.within(request.within, to_upstream.flush()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Rejection::UpstreamBroken.into()),
                Err(Elapsed) => return Err(Rejection::UpstreamTimeout.into()),
            }
            if self.reader.is_done() {
                return Ok(());
            }
            if buffer.is_empty() {
                self.read(request, from_client, buffer, deadlines).await?;
            }
            self.gather(buffer)?;
        }
    }

    async fn read(
        &mut self,
        request: &Request,
        from_client: &mut Reading<'_, '_>,
        buffer: &mut Vec<u8>,
        deadlines: &mut Deadlines,
    ) -> Result<(), Failure> {
        // Only the client's time counts, not that of an upstream which is slow to read.
        let began = clock::mono();
        let span = request
            .idle
            .min(request.read_within.saturating_sub(self.waited));
        match deadlines.within(span, read_some(from_client, buffer)).await {
            Ok(Ok(1..)) => {}
            // It may still read.
            Ok(Ok(0)) => return Err(Rejection::BadBody.into()),
            Ok(Err(_)) => return Err(Failure::ClientGone),
            Err(Elapsed) => return Err(Rejection::BodyTimeout.into()),
        }
        self.waited += clock::mono().saturating_sub(began);
        Ok(())
    }

    /// Takes all of the body that is in `buffer`, to go out at once: a write for each of many small chunks would be work for
    /// nothing.
    fn gather(&mut self, buffer: &mut Vec<u8>) -> Result<(), Rejection> {
        while !buffer.is_empty() && !self.reader.is_done() {
            let piece = self.reader.next(buffer);
            let consumed = match piece.map_err(|_| Rejection::BadBody)? {
                Piece::Data { data, consumed } => {
                    self.bytes += data.len() as u64;
                    self.left = self
                        .left
                        .checked_sub(data.len() as u64)
                        .ok_or(Rejection::BodyTooLarge)?;
                    put_piece(&mut self.out, &buffer[data], self.chunked);
                    consumed
                }
                Piece::NeedMore { consumed } | Piece::End { consumed } => consumed,
            };
            buffer.drain(..consumed);
        }
        if self.reader.is_done() && self.chunked {
            let may = |name: &[u8]| may_trail_up(name, self.identity_fields);
            put_last_chunk(&mut self.out, self.reader.trailers(), may)
                .map_err(|_| Rejection::BadBody)?;
        }
        Ok(())
    }
}

/// What is left of an upload when the response has begun.
pub(super) struct Rest<'a, 'p> {
    pub upload: &'a mut Upload<'p>,
    pub request: &'a Request,
    pub from_client: Reading<'a, 'a>,
    pub buffer: &'a mut Vec<u8>,
    pub deadlines: Deadlines,
    pub to_upstream: Writing<'a, 'a>,
}

/// What `response` gives, with the rest of the upload going on meanwhile. How that ends is no matter: the response stands, and
/// neither connection is used again.
pub(super) async fn beside<F: Future>(rest: &mut Option<Rest<'_, '_>>, response: F) -> F::Output {
    let Some(going) = rest else {
        return response.await;
    };
    let mut response = pin!(response);
    tokio::select! {
        biased;
        output = &mut response => return output,
        _ = going.upload.go_on(
            going.request,
            &mut going.from_client,
            going.buffer,
            &mut going.deadlines,
            &mut going.to_upstream,
        ) => {}
    }
    *rest = None;
    response.await
}

/// Puts a piece of a body behind others, as a chunk where those are.
pub(super) fn put_piece(out: &mut Vec<u8>, data: &[u8], chunked: bool) {
    if chunked {
        let _ = write!(out, "{:x}\r\n", data.len());
    }
    out.extend_from_slice(data);
    if chunked {
        out.extend_from_slice(b"\r\n");
    }
}
