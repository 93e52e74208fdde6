//! What variables and files brought into a value, and what is said of it without showing that: it may be secret.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

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
    /// same says only what is written; a quantity or an address may stand there.
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
    // What says which protocol is meant stands in many a mend.
    let schemes = ["http", "https", "redis", "rediss", "postgres", "postgresql"];
    let part = text.split_once("://");
    let text = part.map_or(text, |(scheme, rest)| match schemes.contains(&scheme) {
        true => rest,
        false => text,
    });
    if may_be_shown(text) {
        return false;
    }
    let message = message.to_ascii_lowercase();
    let said: HashSet<_> = message.as_bytes().windows(PIECE).collect();
    let has_piece = |bytes: &[u8]| {
        let bytes = bytes.to_ascii_lowercase();
        bytes.windows(PIECE).any(|piece| said.contains(piece))
    };
    has_piece(text.as_bytes()) || has_piece(&percent_decode_str(text).collect::<Vec<_>>())
}

/// A quantity or an address.
fn may_be_shown(text: &str) -> bool {
    text.parse::<f64>().is_ok()
        || text.parse::<TimeLength>().is_ok()
        || text.parse::<ByteSize>().is_ok()
        || text.parse::<Percent>().is_ok()
        || text.parse::<IpAddr>().is_ok()
        || text.parse::<SocketAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_a_piece_of_what_came_in_is_not_said() {
        for (value, message, is_said) in [
            ("s3cret", "\"s3cret\" is not a size", true),
            ("s3cret", "unknown name `s3cret`", true),
            ("s3cret", "use /s3cret", false),
            ("s3cret", "use /S3CR", false),
            ("s3cret", "use /s3c", true),
            ("%733cret", "use /s3cret", false),
            ("http://s3cret", "use http://HOST:PORT", true),
            ("http://s3cret", "use http://s3cret", false),
            ("s3cret://x", "s3cret is no scheme", false),
            ("http://10.0.0.1:80", "10.0.0.1:80 is taken", true),
            ("::1", "::1 is taken", true),
            ("70000", "70000 is out of bounds", true),
            ("90s", "90s is too long", true),
        ] {
            let brought_in = BroughtIn {
                written: "${A}".to_owned(),
                value: value.to_owned(),
                texts: vec![value.to_owned()],
            };
            let said = brought_in.told(message);
            let is_whole = !said.starts_with("\"${A}\" stands for what is not right here");
            assert_eq!(is_whole, is_said, "{value}: {message}: {said}");
            assert!(!said.contains("s3cret"), "{said}");
        }
    }
}
