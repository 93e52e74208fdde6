//! What variables and files brought into a value, and what is said of it without showing that: it may be secret.

use std::collections::HashSet;

use percent_encoding::percent_decode_str;

use crate::config::units::{ByteSize, Percent, TimeLength};

/// So many bytes of a text in a row are a piece of it that is not shown.
const PIECE: usize = 4;

/// A value of which a part came in for a `${…}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BroughtIn {
    /// As the file has it.
    pub written: String,
    /// What it stands for.
    pub value: String,
    /// What each variable and file brought in; no default, which the file itself has.
    pub texts: Vec<String>,
}

impl BroughtIn {
    /// The message, which is about this value, with what is written in the value's place. One that would show a piece of what came in all the
    /// same says only what is written; a number, a length of time or a size may stand there.
    pub fn told(&self, message: &str) -> String {
        let quoted = |text: &str| [format!("\"{text}\""), format!("`{text}`")];
        let [said, named] = quoted(&self.value);
        let [instead, by_name] = quoted(&self.written);
        // What is written is looked at by nobody: a variable may have its own name in it.
        let without = message.replace(&said, "").replace(&named, "");
        match self.texts.iter().any(|text| shows(&without, text)) {
            true => format!(
                "{instead} stands for what is not right here: to be told more, run weir check on a copy with the value written out"
            ),
            false => message.replace(&said, &instead).replace(&named, &by_name),
        }
    }
}

/// Whether a piece of the text stands in the message, be it in small letters or unescaped.
fn shows(message: &str, text: &str) -> bool {
    if is_quantity(text) {
        return false;
    }
    // What says which protocol is meant stands in many a mend.
    let schemes = ["http", "https", "redis", "rediss", "postgres", "postgresql"];
    let part = text.split_once("://");
    let text = part.map_or(text, |(scheme, rest)| match schemes.contains(&scheme) {
        true => rest,
        false => text,
    });
    let message = message.to_ascii_lowercase();
    let said: HashSet<_> = message.as_bytes().windows(PIECE).collect();
    let has_piece = |bytes: &[u8]| {
        let bytes = bytes.to_ascii_lowercase();
        bytes.windows(PIECE).any(|piece| said.contains(piece))
    };
    has_piece(text.as_bytes()) || has_piece(&percent_decode_str(text).collect::<Vec<_>>())
}

fn is_quantity(text: &str) -> bool {
    text.parse::<f64>().is_ok()
        || text.parse::<TimeLength>().is_ok()
        || text.parse::<ByteSize>().is_ok()
        || text.parse::<Percent>().is_ok()
}
