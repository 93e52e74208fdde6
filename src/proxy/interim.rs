//! Interim responses (RFC 9110 section 15.2) on their way to the client. Owns which are passed on, and what of them is not told yet: one
//! that is begun has to have its end before anything else is said. Must not know where they come from.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::exchange::Failure;
use super::headers;
use super::outgoing::Request;
use super::reply::Rejection;
use super::wire::{Deadlines, Elapsed};
use crate::config::rewrite::HeaderChanges;
use crate::http1::response::{BadResponse, ResponseHead};

/// Interim responses that are told before the final one; others are passed over.
const MAX_TOLD: usize = 16;
/// Bytes of interim responses before the final one; more is a flood.
const MAX_BYTES: usize = 16 * 1024;

/// The interim responses to one request, sent over one connection.
pub(super) struct Interims<'r> {
    /// Of the route, to what is told.
    changes: &'r HeaderChanges,
    /// Whether the client knows them, which HTTP/1.0 does not.
    known: bool,
    came: usize,
    /// Bytes of all that came.
    bytes: usize,
    /// Heads as HTTP/1.1, of which so many bytes are told.
    out: Vec<u8>,
    told: usize,
}

impl<'r> Interims<'r> {
    pub(super) fn new(request: &Request, changes: &'r HeaderChanges) -> Interims<'r> {
        Interims {
            changes,
            known: !request.is_http10,
            came: 0,
            bytes: 0,
            out: Vec::new(),
            told: 0,
        }
    }

    /// Takes the head at the front of `answer`, to be told to the client, if it is that of an interim response; whether it is.
    pub(super) fn take(
        &mut self,
        answer: &mut Vec<u8>,
        head: &ResponseHead,
    ) -> Result<bool, Rejection> {
        if head.status >= 200 || head.status == 101 {
            return Ok(false);
        }
        self.bytes += head.len;
        if self.bytes > MAX_BYTES {
            return Err(Rejection::BadResponse(BadResponse::Interim));
        }
        self.came += 1;
        // All but the answer to an expectation, which was weir's own.
        if head.status != 100 && self.known && self.came <= MAX_TOLD {
            headers::put_interim_head(&mut self.out, answer, head, self.changes);
        }
        answer.drain(..head.len);
        Ok(true)
    }

    /// What the client is still to be told.
    pub(super) fn untold(&self) -> &[u8] {
        &self.out[self.told..]
    }

    /// So many bytes of [`Interims::untold`] are on their way.
    pub(super) fn told(&mut self, bytes: usize) {
        self.told += bytes;
        if self.told == self.out.len() {
            self.out.clear();
            self.told = 0;
        }
    }

    /// Tells a client of HTTP/1.1. A call that is dropped is gone on with by the next.
    pub(super) async fn tell(&mut self, client: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        while !self.untold().is_empty() {
            match client.write(self.untold()).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => self.told(written),
            }
        }
        client.flush().await
    }

    /// As [`Interims::tell`], to a client that takes it `within` this time or is given up.
    pub(super) async fn tell_within(
        &mut self,
        within: Duration,
        deadlines: &mut Deadlines,
        client: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), Failure> {
        match deadlines.within(within, self.tell(client)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(Elapsed) => Err(Failure::ClientGone),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, duplex};

    use super::*;

    /// An upload that ends leaves off telling wherever it is.
    #[test]
    fn telling_goes_on_where_it_was_left() {
        let changes = HeaderChanges::default();
        let mut interims = Interims {
            changes: &changes,
            known: true,
            came: 0,
            bytes: 0,
            out: b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n".to_vec(),
            told: 0,
        };
        let whole = interims.out.clone();
        let (mut weir, mut client) = duplex(8);
        let mut came = Vec::new();
        let mut left = 0;
        while interims.tell(&mut weir).now_or_never().is_none() {
            left += 1;
            let read = client.read_buf(&mut came).now_or_never();
            assert!(read.is_some_and(|read| read.is_ok()));
        }
        assert!(left > 2 && interims.untold().is_empty());
        let _ = client.read_buf(&mut came).now_or_never();
        assert_eq!(came, whole);
    }
}
