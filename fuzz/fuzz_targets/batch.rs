//! A batch as the spool and Redis give it back: whatever its bytes are, it is damaged, another weir's, or whole, and what is
//! whole makes rows and can be followed by an end mark. As they come, with their checksum mended, and with their body packed: a
//! fuzzer finds neither a checksum nor what unpacks to an event.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use weir::event::{AuditEvent, Parts};
use weir::store::audit::batch::{Batch, Boot, Header, peek};
use weir::store::audit::chain::Hasher;
use weir::store::audit::days::Day;
use weir::store::postgres::row::{self, BatchColumns};

const VERSION: u8 = 1;

fuzz_target!(|bytes: &[u8]| {
    open(bytes);
    if let [version, _, _, _, _, rest @ ..] = bytes {
        open(&summed(*version, rest));
        if let Ok((header, body)) = postcard::take_from_bytes::<Header>(rest) {
            let mut packed = postcard::to_stdvec(&header).expect("a Vec takes every byte");
            packed.extend(lz4_flex::compress_prepend_size(body));
            open(&summed(VERSION, &packed));
        }
    }
});

fn summed(version: u8, rest: &[u8]) -> Vec<u8> {
    let sum = crc32fast::hash(rest).to_le_bytes();
    [&[version], &sum[..], rest].concat()
}

fn open(bytes: &[u8]) {
    let Ok(batch) = Batch::open(bytes) else {
        return;
    };
    let header = &batch.header;
    assert_eq!(peek(bytes).as_ref(), Ok(header));
    let place = BatchColumns {
        day: header.day(),
        boot_id: 1,
        arrival: 1,
    };
    let (mut rows, mut count) = (BytesMut::new(), 0);
    for encoding in batch.events() {
        row::put(&mut rows, &place, encoding).expect("an event of a whole batch is a row");
        let parts = Parts::of(encoding).expect("a row is made of parts");
        assert_eq!(parts.columns.seq, header.first + count);
        let mut anew = Vec::new();
        assert!(parts.encode_into(&mut anew));
        assert!(anew.len() == parts.encoded_len() && anew.len() <= encoding.len());
        let _ = <AuditEvent>::decode(encoding);
        count += 1;
    }
    assert_eq!(count, header.count);
    if let Some(mut heir) = Boot::resume(header, Hasher::new(None)) {
        let (end, bytes) = heir.end(header.sealed, header.dropped);
        assert!(
            end.is_end && end.before == header.hash && end.day() >= Day::of(header.sealed.into())
        );
        assert_eq!(Batch::open(&bytes).map(|batch| batch.header), Ok(end));
    }
}
