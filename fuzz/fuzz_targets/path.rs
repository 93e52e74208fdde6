//! A normal path has one spelling: nothing in it can be normalised further, whoever reads it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::http1::path::normalise;

fuzz_target!(|path: &[u8]| {
    let Ok(normal) = normalise(path) else { return };
    assert_eq!(normalise(&normal).as_deref(), Ok(&*normal));
    assert_eq!(normal.first(), Some(&b'/'));
    assert!(normal.iter().all(|byte| (b'!'..=b'~').contains(byte)));
    assert!(!normal.iter().any(|byte| b"?#\\".contains(byte)));
    let (_, inner) = normal.split_first().expect("it begins with a slash");
    let mut segments = inner.split(|byte| *byte == b'/').peekable();
    while let Some(segment) = segments.next() {
        assert!(!segment.is_empty() || segments.peek().is_none());
        assert!(![&b"."[..], b".."].contains(&segment));
    }
});
