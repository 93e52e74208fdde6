//! YAML (and so JSON) texts that are changed in place: all that does not change stays as it was written, comments and quotes too.
//!
//! [`tree`] says where each node stands, [`edit`] turns a changed value into edits of the text, [`emit`] writes what is new. What comes out is
//! read again and compared: where an edit did not do (an anchor that others share), the document is written anew, without comments.
//! Must not know what an object is for.

mod edit;
mod emit;
mod tree;

use std::collections::HashMap;

use serde_json::Value;

pub(super) use emit::json;
pub use tree::Malformed;
pub(super) use tree::{Node, parse};

/// A text with new values in place of its documents'.
pub(super) struct Changed {
    pub(super) text: String,
    /// The documents that were written anew, by index.
    pub(super) rewritten: Vec<usize>,
    /// Comments that stood in what is gone.
    pub(super) lost: Vec<String>,
}

/// `new` has a value for each document of `text`, which is what `nodes` were read from.
pub(super) fn change(text: &str, nodes: &[Node], new: &[Value]) -> Changed {
    let (changed, rewritten) = changed(text, nodes, new);
    let mut kept: HashMap<String, usize> = HashMap::new();
    for comment in tree::comments(&changed) {
        *kept.entry(comment).or_default() += 1;
    }
    let mut lost = tree::comments(text);
    lost.retain(|comment| match kept.get_mut(comment) {
        Some(left @ 1..) => {
            *left -= 1;
            false
        }
        Some(0) | None => true,
    });
    Changed {
        text: changed,
        rewritten,
        lost,
    }
}

/// The text, and which documents were written anew.
fn changed(text: &str, nodes: &[Node], new: &[Value]) -> (String, Vec<usize>) {
    let mut rewritten = Vec::new();
    // Twice at most for each document: what is written anew is right.
    loop {
        let mut edits = Vec::new();
        for (at, (node, value)) in nodes.iter().zip(new).enumerate() {
            if rewritten.contains(&at) {
                edits.push(edit::whole(text, node, value));
            } else {
                edits.extend(edit::edits(text, node, value));
            }
        }
        let changed = edit::apply(text, edits);
        let read = changed.as_deref().and_then(|text| parse(text).ok());
        let same = |at: &usize| {
            let read = read.as_ref().and_then(|nodes| nodes.get(*at));
            read.is_some_and(|node| node.value() == new[*at])
        };
        let count = read.as_ref().map(Vec::len) == Some(new.len());
        let mut wrong: Vec<_> = (0..new.len())
            .filter(|at| !rewritten.contains(at) && !same(at))
            .collect();
        if !count {
            // Which edit it was is not known then.
            wrong = (0..new.len())
                .filter(|at| !rewritten.contains(at) && nodes[*at].value() != new[*at])
                .collect();
        }
        match changed {
            Some(text) if wrong.is_empty() => return (text, rewritten),
            Some(_) | None if !wrong.is_empty() => rewritten.extend(wrong),
            Some(_) | None => {
                return (emit::documents(nodes, new), (0..new.len()).collect());
            }
        }
    }
}

#[cfg(test)]
mod tests;
