//! A request's body that may be sent more than once: what was taken of it is kept, up to a size that the file names, and a short one in any
//! case for an upstream that may say that it did not look at it.

use std::cell::Cell;

use bytes::Bytes;
use http::HeaderMap;

use super::parts::{Broken, Part, Source};
use crate::http1::head::BodyLength;
use crate::proxy::retries::may_be_kept;

/// So many bytes are kept for an upstream of HTTP/2, whatever the file names: many of them end a connection behind so many requests, and leave
/// out those that are on their way.
const UNSEEN: usize = 16 * 1024;

/// Where a request's body comes from, from its first byte again where that is still possible.
pub(super) struct Body<'r, 'a, 's> {
    pub source: &'r mut Source<'a, 's>,
    /// `None` where it became too much.
    kept: Option<Kept>,
    /// The most that is kept, in bytes.
    most: usize,
    /// The most of that by which it may be tried again, as the file names it.
    named: Option<usize>,
    /// Bytes of `kept` that this try has been given.
    given: usize,
    /// Whether some of it can be sent no more.
    is_gone: bool,
    /// Whether it is more than what is `named`.
    is_lost: &'r Cell<bool>,
}

/// All that was taken. Copied: a small part would hold on to the whole of what it was read into, and small parts may be many.
#[derive(Default)]
struct Kept {
    data: Vec<u8>,
    end: Option<End>,
}

/// How a body ended.
enum End {
    /// With its data.
    Data,
    Trailers(HeaderMap),
}

impl<'r, 'a, 's> Body<'r, 'a, 's> {
    /// A body of this `length`, of which up to `keep` bytes are kept for another try, or more `for_http2`; `is_lost` comes to say whether it
    /// cannot be tried again.
    pub(super) fn new(
        source: &'r mut Source<'a, 's>,
        length: BodyLength,
        keep: usize,
        for_http2: bool,
        is_lost: &'r Cell<bool>,
    ) -> Body<'r, 'a, 's> {
        let most = if for_http2 { keep.max(UNSEEN) } else { keep };
        Body {
            source,
            kept: may_be_kept(length, most).then(Kept::default),
            most,
            named: may_be_kept(length, keep).then_some(keep),
            given: 0,
            is_gone: false,
            is_lost,
        }
    }

    /// The next part of this try. A call that is dropped has taken nothing.
    pub(super) async fn next(&mut self) -> Result<Part, Broken> {
        if let Some(kept) = &self.kept {
            let again = &kept.data[self.given..];
            if !again.is_empty() {
                self.given = kept.data.len();
                let last = matches!(kept.end, Some(End::Data));
                let bytes = Bytes::copy_from_slice(again);
                return Ok(Part::Data { bytes, last });
            }
            if let Some(End::Trailers(trailers)) = &kept.end {
                return Ok(Part::End(trailers.clone()));
            }
        }
        let part = self.source.next().await?;
        let fits = self
            .kept
            .as_mut()
            .is_some_and(|kept| kept.add(&part, self.most));
        match &mut self.kept {
            Some(kept) if fits => self.given = kept.data.len(),
            kept => *kept = None,
        }
        self.is_gone = !fits;
        let kept = self.kept.as_ref().map(Kept::len);
        self.is_lost.set(kept.is_none() || kept > self.named);
        Ok(part)
    }

    /// Whether some of it can be sent no more, were it not seen.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone
    }

    /// Another try begins, with nothing lost.
    pub(super) fn begin_again(&mut self) {
        self.given = 0;
    }
}

impl Kept {
    /// False, with nothing added, where that would be more than `most` bytes.
    fn add(&mut self, part: &Part, most: usize) -> bool {
        let more = match part {
            Part::Data { bytes, .. } => bytes.len(),
            Part::End(trailers) => len_of(trailers),
        };
        if self.data.len() + more > most {
            return false;
        }
        match part {
            Part::Data { bytes, last } => {
                self.data.extend_from_slice(bytes);
                self.end = last.then_some(End::Data);
            }
            Part::End(trailers) => self.end = Some(End::Trailers(trailers.clone())),
        }
        true
    }

    /// In bytes.
    fn len(&self) -> usize {
        let trailers = match &self.end {
            Some(End::Trailers(trailers)) => len_of(trailers),
            Some(End::Data) | None => 0,
        };
        self.data.len() + trailers
    }
}

fn len_of(trailers: &HeaderMap) -> usize {
    let fields = trailers.iter();
    fields
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum()
}
