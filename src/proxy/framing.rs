//! HTTP/1.1 as both ways to an upstream read and write it: a response's head, and the pieces of bodies in their buffers.

use std::io::Write as _;
use std::ops::Range;

use super::outgoing::Request;
use super::reply::Rejection;
use super::wire::{read_rest, read_some};
use crate::http1::head::HeadLimits;
use crate::http1::response::{BadResponse, ResponseHead, parse_response};
use crate::net::stream::Reading;
use crate::net::tls::Trouble;

/// The next head, interim or final. What was read of it stays in `answer`, so that it can be called again.
pub(super) async fn read_head(
    request: &Request,
    upstream: &mut Reading<'_, '_>,
    answer: &mut Vec<u8>,
) -> Result<ResponseHead, Rejection> {
    loop {
        let parsed = match answer.is_empty() {
            true => None,
            false => parse_response(answer, request.is_head, HeadLimits::default())
                .map_err(Rejection::BadResponse)?,
        };
        match parsed {
            // A switch that no one asked for is nonsense.
            Some(head) if head.status == 101 && !request.upgrade => {
                return Err(Rejection::BadResponse(BadResponse::Switch));
            }
            Some(head) => return Ok(head),
            None => {}
        }
        let read = match answer.is_empty() {
            true => read_some(upstream, answer).await,
            false => read_rest(upstream, answer).await,
        };
        match read {
            Ok(1..) => {}
            // With TLS 1.3 the handshake is over by the time that a server refuses the certificate that it is shown.
            Err(error) if Trouble::within(&error) == Some(Trouble::Distrusted) => {
                return Err(Rejection::UpstreamTls(Trouble::Distrusted));
            }
            Ok(0) | Err(_) => return Err(Rejection::UpstreamBroken),
        }
    }
}

/// A buffer whose pieces are taken one by one from its front. They leave it at once, when this is dropped: each time, all that
/// is behind moves up, which for thousands of small chunks would be most of the work.
pub(super) struct Front<'b> {
    buffer: &'b mut Vec<u8>,
    taken: usize,
}

impl<'b> Front<'b> {
    pub(super) fn of(buffer: &'b mut Vec<u8>) -> Front<'b> {
        Front { buffer, taken: 0 }
    }

    /// What is not taken.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// Takes so many bytes of the rest.
    pub(super) fn take(&mut self, consumed: usize) {
        self.taken += consumed;
    }

    /// Moves a piece of a body, `data` of the rest, behind what is in `out`, and takes what is `consumed` with it: without a copy,
    /// where it is all that both have.
    pub(super) fn move_piece(
        &mut self,
        data: Range<usize>,
        consumed: usize,
        out: &mut Vec<u8>,
        chunked: bool,
    ) {
        if out.is_empty() && !chunked && self.taken == 0 && data == (0..self.buffer.len()) {
            std::mem::swap(self.buffer, out);
        } else {
            put_piece(out, &self.rest()[data], chunked);
            self.take(consumed);
        }
    }
}

impl Drop for Front<'_> {
    fn drop(&mut self) {
        self.buffer.drain(..self.taken);
    }
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
