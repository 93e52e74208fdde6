//! A request's body that may be sent more than once: what was taken of it is kept, up to a size that the file names.

use std::cell::Cell;

use super::parts::{Broken, Part, Source};
use crate::http1::head::BodyLength;

/// Where a request's body comes from, from its first byte again where that is still possible.
pub(super) struct Body<'r, 'a, 's> {
    pub source: &'r mut Source<'a, 's>,
    /// All that was taken, in order; `None` where that became too much.
    kept: Option<Vec<Part>>,
    /// Bytes that may still be kept.
    room: usize,
    /// Parts of `kept` that this try has taken.
    at: usize,
    /// Whether some of it can be sent no more.
    is_lost: &'r Cell<bool>,
}

impl<'r, 'a, 's> Body<'r, 'a, 's> {
    /// A body of this `length`, of which up to `keep` bytes are kept; `is_lost` comes to say whether it cannot be sent again.
    pub(super) fn new(
        source: &'r mut Source<'a, 's>,
        (length, keep): (BodyLength, usize),
        is_lost: &'r Cell<bool>,
    ) -> Body<'r, 'a, 's> {
        let fits = match length {
            BodyLength::None => false,
            BodyLength::Fixed(bytes) => bytes <= keep as u64,
            BodyLength::Chunked => keep > 0,
        };
        Body {
            source,
            kept: fits.then(Vec::new),
            room: keep,
            at: 0,
            is_lost,
        }
    }

    /// The next part of this try. A call that is dropped has taken nothing.
    pub(super) async fn next(&mut self) -> Result<Part, Broken> {
        if let Some(part) = self.kept.as_ref().and_then(|kept| kept.get(self.at)) {
            self.at += 1;
            return Ok(part.clone());
        }
        let part = self.source.next().await?;
        if let Some(kept) = &mut self.kept {
            match self.room.checked_sub(part.len()) {
                Some(room) => {
                    kept.push(part.clone());
                    self.room = room;
                    self.at += 1;
                }
                None => self.kept = None,
            }
        }
        self.is_lost.set(self.kept.is_none());
        Ok(part)
    }

    /// Whether some of it can be sent no more.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.get()
    }

    /// Another try begins, with nothing lost.
    pub(super) fn begin_again(&mut self) {
        self.at = 0;
    }
}

impl Part {
    /// Bytes of memory that are its own.
    fn len(&self) -> usize {
        match self {
            Part::Data { bytes, .. } => bytes.len(),
            Part::End(trailers) => trailers.iter().map(field_len).sum(),
        }
    }
}

fn field_len((name, value): (&http::HeaderName, &http::HeaderValue)) -> usize {
    name.as_str().len() + value.len()
}
