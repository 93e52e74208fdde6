//! Texts that live as long as the process. For names of the configuration alone, so that how many there are is bounded by
//! the names ever configured, and events can carry them without an allocation.

use std::collections::HashSet;

use parking_lot::Mutex;

static TEXTS: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);

/// The one copy of `text`.
pub fn intern(text: &str) -> &'static str {
    let mut texts = TEXTS.lock();
    let texts = texts.get_or_insert_default();
    if let Some(known) = texts.get(text) {
        return known;
    }
    let kept: &'static str = Box::leak(text.into());
    texts.insert(kept);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_kept_once() {
        let (one, two) = (intern("weir-intern-test"), intern("weir-intern-test"));
        assert!(std::ptr::eq(one, two));
    }
}
