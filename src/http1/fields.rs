//! What httparse says of fields: the room that it is given for them, and where they stand in the bytes it has read.

use std::mem::MaybeUninit;
use std::ops::Range;

/// Where httparse puts fields: on the stack for as many as is usual, and never cleared, which would cost more than parsing.
pub(super) struct FieldRoom<'b> {
    usual: [MaybeUninit<httparse::Header<'b>>; USUAL_FIELDS],
    many: Vec<MaybeUninit<httparse::Header<'b>>>,
    max: usize,
}

const USUAL_FIELDS: usize = 100;

impl<'b> FieldRoom<'b> {
    pub(super) fn new(max: usize) -> FieldRoom<'b> {
        let many = if max > USUAL_FIELDS { max } else { 0 };
        FieldRoom {
            usual: [MaybeUninit::uninit(); USUAL_FIELDS],
            many: vec![MaybeUninit::uninit(); many],
            max,
        }
    }

    pub(super) fn fields(&mut self) -> &mut [MaybeUninit<httparse::Header<'b>>] {
        match self.max > USUAL_FIELDS {
            true => &mut self.many,
            false => &mut self.usual[..self.max],
        }
    }
}

/// Where in `bytes` this part of them stands.
#[inline]
pub(super) fn place(bytes: &[u8], part: &[u8]) -> Range<usize> {
    let start = part.as_ptr() as usize - bytes.as_ptr() as usize;
    start..start + part.len()
}

/// Where in `bytes` the names and values stand.
#[inline]
pub(super) fn places(
    bytes: &[u8],
    headers: &[httparse::Header<'_>],
) -> Vec<(Range<usize>, Range<usize>)> {
    let of = |field: &httparse::Header<'_>| {
        let name = place(bytes, field.name.as_bytes());
        (name, place(bytes, field.value))
    };
    headers.iter().map(of).collect()
}
