//! Whatever a file says, it is a configuration or a list of mistakes, each with what and where.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weir::config::check;

fuzz_target!(|text: &str| {
    // What stands in this machine's files is not for a fuzzer to find.
    if text.contains("file:") {
        return;
    }
    // Variables are there or not, as in life.
    let lookup = |name: &str| name.len().is_multiple_of(2).then(|| "1".to_owned());
    if let Err(mistakes) = check::parse(text, &lookup) {
        assert!(!mistakes.is_empty());
    }
});
