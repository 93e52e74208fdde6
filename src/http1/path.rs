//! Path normalisation (RFC 3986 section 6.2.2) before routes are matched. Owns the one form of a path that policy sees
//! and that goes upstream, so that no spelling of a path walks around a route's policy. Must not know of routes.

use std::borrow::Cow;

use thiserror::Error;

/// Why a request target's path is refused with 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PathError {
    /// It does not begin with `/`.
    #[error("path does not begin with \"/\"")]
    NotAbsolute,
    /// `..` climbs above the root.
    #[error("path climbs above the root by \"..\"")]
    AboveRoot,
    /// `%` is not followed by two hex digits.
    #[error("path has a \"%\" that is not followed by two hex digits")]
    BadEscape,
    /// An escaped `/`, `\` or NUL: servers disagree on whether it parts segments, so no answer is safe.
    #[error("path has an escaped \"/\", \"\\\" or NUL")]
    AmbiguousEscape,
    /// Servers that know path parameters, such as Tomcat, read `..;x` as `..`.
    #[error("path has a dot segment with parameters")]
    DotParameters,
    /// A byte that RFC 3986 does not allow in a path unescaped.
    #[error("path has a byte that must be escaped")]
    BadByte,
}

/// The normal form of `path` (no query): unreserved escapes decoded, other escapes in upper case, `.` and `..`
/// resolved, runs of `/` folded to one. Idempotent. A path already in its normal form is borrowed, not copied.
pub fn normalise(path: &[u8]) -> Result<Cow<'_, [u8]>, PathError> {
    if path.first() != Some(&b'/') {
        return Err(PathError::NotAbsolute);
    }
    if is_plain(path) {
        return Ok(Cow::Borrowed(path));
    }
    resolve(&decode(path)?).map(Cow::Owned)
}

/// No escape, no dot segment, no empty segment, no byte to refuse: the common case, in one pass.
fn is_plain(path: &[u8]) -> bool {
    let mut previous = 0;
    for &byte in path {
        if !is_path_byte(byte)
            || byte == b'%'
            || (previous == b'/' && (byte == b'/' || byte == b'.'))
        {
            return false;
        }
        previous = byte;
    }
    true
}

fn decode(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if !is_path_byte(byte) {
            return Err(PathError::BadByte);
        }
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let [high, low, tail @ ..] = rest else {
            return Err(PathError::BadEscape);
        };
        let (Some(h), Some(l)) = (hex(*high), hex(*low)) else {
            return Err(PathError::BadEscape);
        };
        rest = tail;
        match h << 4 | l {
            b'/' | b'\\' | 0 => return Err(PathError::AmbiguousEscape),
            plain if is_unreserved(plain) => out.push(plain),
            _ => out.extend([b'%', high.to_ascii_uppercase(), low.to_ascii_uppercase()]),
        }
    }
    Ok(out)
}

fn resolve(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut ends_in_folder = false;
    for segment in path.split(|byte| *byte == b'/') {
        ends_in_folder = matches!(segment, b"" | b"." | b"..");
        match segment {
            b"" | b"." => {}
            b".." => {
                segments.pop().ok_or(PathError::AboveRoot)?;
            }
            _ if segment.starts_with(b".;") || segment.starts_with(b"..;") => {
                return Err(PathError::DotParameters);
            }
            name => segments.push(name),
        }
    }
    let mut out = Vec::with_capacity(path.len());
    for segment in &segments {
        out.push(b'/');
        out.extend_from_slice(segment);
    }
    if ends_in_folder {
        out.push(b'/');
    }
    Ok(out)
}

fn hex(byte: u8) -> Option<u8> {
    (byte as char).to_digit(16).map(|digit| digit as u8)
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// `pchar`, `/` and `%` of RFC 3986, and the brackets and bars that browsers send bare.
fn is_path_byte(byte: u8) -> bool {
    is_unreserved(byte) || b"!$&'()*+,;=:@/%[]|^{}\"`".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(input: &str, expected: Result<&str, PathError>) {
        let got =
            normalise(input.as_bytes()).map(|path| String::from_utf8_lossy(&path).into_owned());
        assert_eq!(got, expected.map(str::to_owned), "{input}");
    }

    #[test]
    fn every_spelling_of_a_path_becomes_one() {
        check("/", Ok("/"));
        check("/admin/x", Ok("/admin/x"));
        check("/a/../admin", Ok("/admin"));
        check("/a/%2e%2E/admin", Ok("/admin"));
        check("//admin", Ok("/admin"));
        check("/a//b///", Ok("/a/b/"));
        check("/%61dmin", Ok("/admin"));
        check("/./admin/.", Ok("/admin/"));
        check("/a/..", Ok("/"));
        check("/a%c3%a9", Ok("/a%C3%A9"));
        check("/.well-known/x..y", Ok("/.well-known/x..y"));
        check("/a;x=1/..y;z", Ok("/a;x=1/..y;z"));
        check("/%252e%252e/x", Ok("/%252e%252e/x"));
    }

    #[test]
    fn an_ambiguous_path_is_refused() {
        check("", Err(PathError::NotAbsolute));
        check("admin", Err(PathError::NotAbsolute));
        check("/..", Err(PathError::AboveRoot));
        check("/%2e%2e/x", Err(PathError::AboveRoot));
        check("/a%2fb", Err(PathError::AmbiguousEscape));
        check("/a%5Cb", Err(PathError::AmbiguousEscape));
        check("/a%00", Err(PathError::AmbiguousEscape));
        check("/a\\b", Err(PathError::BadByte));
        check("/a b", Err(PathError::BadByte));
        check("/a%", Err(PathError::BadEscape));
        check("/a%2", Err(PathError::BadEscape));
        check("/a%zz", Err(PathError::BadEscape));
        check("/a/..;/admin", Err(PathError::DotParameters));
        check("/a/%2e;x=1/admin", Err(PathError::DotParameters));
    }

    proptest! {
        #[test]
        fn normalising_twice_is_normalising_once(path in "/[a-c./%2eEfF5]{0,24}") {
            if let Ok(once) = normalise(path.as_bytes()) {
                prop_assert_eq!(normalise(&once).expect("a normal path is accepted"), once.clone());
                prop_assert!(!once.windows(2).any(|pair| pair == b"//"));
                prop_assert!(once.split(|b| *b == b'/').all(|s| s != b".." && s != b"."));
            }
        }

        #[test]
        fn no_bytes_panic(path in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = normalise(&path);
        }
    }
}
