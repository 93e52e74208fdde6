//! A PROXY header: it is the same in whatever pieces it comes, and what is wrong stays wrong.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::http1::proxy_protocol::parse;

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    let known = (0..=bytes.len()).map(|end| parse(&bytes[..end]));
    match whole {
        Ok(Some(header)) => {
            assert!((1..=bytes.len()).contains(&header.len));
            for (end, read) in known.enumerate() {
                assert_eq!(read, if end < header.len { Ok(None) } else { whole });
            }
        }
        Ok(None) => assert!(known.into_iter().all(|read| read == Ok(None))),
        Err(_) => {
            let mut wrong = known.skip_while(|read| *read == Ok(None));
            assert!(wrong.all(|read| read.is_err()));
        }
    }
});
