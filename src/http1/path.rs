//! Path normalisation (RFC 3986 section 6.2.2) before routes are matched. Owns the one form of a path that policy sees, the form
//! that goes upstream, and what else servers may read in it, so that no spelling of a path walks around a route's policy. Must
//! not know of routes.

use std::borrow::Cow;

use percent_encoding::percent_encode_byte;
use smallvec::SmallVec;
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
    /// Servers cut a path off there, or fail.
    #[error("path has an escaped NUL")]
    EscapedNul,
    /// Where an escaped `/` or `\` parts segments, as it does for some servers, the path has dot segments or another route.
    #[error(
        "path has an escaped \"/\" or \"\\\", and dot segments or another route where that parts segments"
    )]
    EscapedSeparators,
    /// Servers that know path parameters, such as Tomcat, read `..;x` as `..`.
    #[error("path has a dot segment with parameters")]
    DotParameters,
    /// Without its parameters the path has another route than with them, and servers differ on which of the two is meant.
    #[error("path has parameters (\";\"), and another route without them")]
    Parameters,
    /// A byte that RFC 3986 does not allow in a path unescaped.
    #[error("path has a byte that must be escaped")]
    BadByte,
}

/// The normal form of `path` (no query), by which it is matched: what a path may have bare is bare and all else escaped, in upper
/// case; `.` and `..` are resolved, runs of `/` folded to one. `;` alone stays as it is spelt, since escaped it begins no
/// parameters (RFC 3986 section 3.3). Idempotent. A path already in its normal form is borrowed, not copied.
pub fn normalise(path: &[u8]) -> Result<Cow<'_, [u8]>, PathError> {
    if path.first() != Some(&b'/') {
        return Err(PathError::NotAbsolute);
    }
    if is_plain(path) {
        return Ok(Cow::Borrowed(path));
    }
    let decoded = decode(path, |byte| byte != b';' && is_pchar(byte))?;
    resolve(&decoded).map(Cow::Owned)
}

/// The form of `path` that goes upstream: the normal one, but that reserved characters stay escaped where they came so, and empty
/// segments stay, but for the first. To some servers `%2B` is another character than `+` (RFC 3986 section 2.2) and `/a//b` another
/// path than `/a/b`, and signatures go by the spelling.
pub fn as_sent(path: &[u8]) -> Result<Cow<'_, [u8]>, PathError> {
    if is_plain(path) {
        return Ok(Cow::Borrowed(path));
    }
    let spelt = decode(path, is_unreserved)?;
    let mut segments = spelt.split(|byte| *byte == b'/');
    // Servers differ on what `..` takes away where it stands behind an empty one.
    if segments.any(|segment| matches!(segment, b"." | b"..")) {
        return resolve(&spelt).map(Cow::Owned);
    }
    let slashes = spelt.iter().take_while(|byte| **byte == b'/').count();
    Ok(Cow::Owned(spelt[slashes.saturating_sub(1)..].to_vec()))
}

/// What else servers may read in a normal `path`, each with why it is refused if that has another route. The last is what the
/// most lenient of them reads, with neither escaped separators nor parameters; none where all read the same. Normal too.
pub fn readings(path: &str) -> Result<SmallVec<[(String, PathError); 2]>, PathError> {
    let bare = |path: &str| without_parameters(path).map(|bare| (bare, PathError::Parameters));
    let mut readings: SmallVec<_> = bare(path).into_iter().collect();
    if !has_escaped_separators(path) {
        return Ok(readings);
    }
    for separators in [&["%2F"][..], &["%5C"], &["%2F", "%5C"]] {
        if separators.iter().all(|it| path.contains(it)) {
            let parted = parted(path, separators)?;
            let bare = bare(&parted);
            readings.push((parted, PathError::EscapedSeparators));
            readings.extend(bare);
        }
    }
    Ok(readings)
}

/// A normal `path` as the most lenient server reads it: as it is counted, or a client would spell as many paths as it likes.
pub fn most_lenient(path: &str) -> Cow<'_, str> {
    let last = readings(path).ok().and_then(|mut readings| readings.pop());
    last.map_or(Cow::Borrowed(path), |(reading, _)| Cow::Owned(reading))
}

/// A normal `path` as servers see it for which these escaped separators part segments. Where dot segments come of it, what they take
/// away is another thing to each server, so that no answer is safe.
fn parted(path: &str, separators: &[&str]) -> Result<String, PathError> {
    let mut slashes = path.to_owned();
    for separator in separators {
        slashes = slashes.replace(separator, "/");
    }
    if slashes
        .split('/')
        .any(|segment| matches!(segment, "." | ".."))
    {
        return Err(PathError::EscapedSeparators);
    }
    let resolved = resolve(slashes.as_bytes())?;
    Ok(String::from_utf8_lossy(&resolved).into_owned())
}

/// Whether a normal `path` has a `/` or `\` that is escaped.
pub fn has_escaped_separators(path: &str) -> bool {
    path.contains('%') && (path.contains("%2F") || path.contains("%5C"))
}

/// A normal `path` as servers see it that know path parameters, such as Tomcat: without what follows `;` in each segment,
/// escaped or not; `None` where there is none. Normal too.
fn without_parameters(path: &str) -> Option<String> {
    parameters(path)?;
    let mut bare = String::with_capacity(path.len());
    let mut ends_in_folder = false;
    for segment in path.split('/') {
        let name = &segment[..parameters(segment).unwrap_or(segment.len())];
        ends_in_folder = name.is_empty();
        if !name.is_empty() {
            bare.push('/');
            bare.push_str(name);
        }
    }
    if ends_in_folder {
        bare.push('/');
    }
    Some(bare)
}

/// Where the parameters of a segment begin, in normal form; such servers take an escaped `;` for a bare one.
pub fn parameters(segment: &str) -> Option<usize> {
    let bytes = segment.as_bytes();
    let begins = |at: &usize| match bytes[*at] {
        b';' => true,
        b'%' => bytes[*at..].starts_with(ESCAPED_SEMICOLON),
        _ => false,
    };
    (0..bytes.len()).find(begins)
}

/// In normal form.
const ESCAPED_SEMICOLON: &[u8] = b"%3B";

/// No escape, no dot segment, no empty segment, no byte to refuse: the common case, in one pass.
fn is_plain(path: &[u8]) -> bool {
    let mut previous = 0;
    for &byte in path {
        let is_slash = byte == b'/';
        if !(is_slash || is_pchar(byte)) || (previous == b'/' && (is_slash || byte == b'.')) {
            return false;
        }
        previous = byte;
    }
    true
}

/// With what `is_bare` unescaped, and all else that is to be escaped.
fn decode(path: &[u8], is_bare: impl Fn(u8) -> bool) -> Result<Vec<u8>, PathError> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            match byte {
                b'/' => out.push(byte),
                _ if is_pchar(byte) => out.push(byte),
                _ if is_sent_bare(byte) => put_escaped(&mut out, byte),
                _ => return Err(PathError::BadByte),
            }
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
            0 => return Err(PathError::EscapedNul),
            plain if is_bare(plain) => out.push(plain),
            other => put_escaped(&mut out, other),
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
            _ if is_dot_with_parameters(segment) => return Err(PathError::DotParameters),
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

fn is_dot_with_parameters(segment: &[u8]) -> bool {
    let dot = segment.strip_prefix(b".");
    let rest = dot.map(|rest| rest.strip_prefix(b".").unwrap_or(rest));
    rest.is_some_and(|rest| rest.starts_with(b";") || rest.starts_with(ESCAPED_SEMICOLON))
}

fn hex(byte: u8) -> Option<u8> {
    (byte as char).to_digit(16).map(|digit| digit as u8)
}

fn put_escaped(out: &mut Vec<u8>, byte: u8) {
    out.extend_from_slice(percent_encode_byte(byte).as_bytes());
}

/// What a path may have unescaped (`pchar` of RFC 3986), but for `%`.
fn is_pchar(byte: u8) -> bool {
    is_unreserved(byte) || b"!$&'()*+,;=:@".contains(&byte)
}

/// What means the same escaped and not (RFC 3986 section 2.3).
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// What browsers send unescaped though it should not be, and what of UTF-8 is written by hand.
fn is_sent_bare(byte: u8) -> bool {
    !byte.is_ascii() || b"[]|^{}\"`".contains(&byte)
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
        check("/v1/x%3Adelete", Ok("/v1/x:delete"));
        check(
            "/%21%24%26%27%28%29%2A%2B%2C%3D%3a%40-%7e",
            Ok("/!$&'()*+,=:@-~"),
        );
        check("/a%3bb;c", Ok("/a%3Bb;c"));
        check("/a%2fb%5c..%2f", Ok("/a%2Fb%5C..%2F"));
        check("/a[b]|{}^\"`", Ok("/a%5Bb%5D%7C%7B%7D%5E%22%60"));
        check("/a%5bb%5d", Ok("/a%5Bb%5D"));
        check("/\u{e4}/%c3%A4", Ok("/%C3%A4/%C3%A4"));
        check("/..\u{e4}", Ok("/..%C3%A4"));
    }

    #[test]
    fn what_is_sent_keeps_reserved_escapes_and_empty_segments() {
        let check = |input: &str, expected: &str| {
            let sent = as_sent(input.as_bytes()).unwrap();
            assert_eq!(String::from_utf8_lossy(&sent), expected, "{input}");
        };
        check("/a+b,c", "/a+b,c");
        check(
            "/%21%24%26%27%28%29%2a%2B%2C%3b%3D%3A%40",
            "/%21%24%26%27%28%29%2A%2B%2C%3B%3D%3A%40",
        );
        check("/%41%2d%2E%5f%7E", "/A-._~");
        check("//a/%2e%2E//b%2fc|", "/b%2Fc%7C");
        check("//a///b//", "/a///b//");
        check("//", "/");
    }

    #[test]
    fn a_path_has_as_many_readings_as_servers_differ() {
        let check = |path: &str, expected: Result<&[(&str, PathError)], PathError>| {
            let read = readings(path);
            let read = read.as_deref().map(|read| {
                read.iter()
                    .map(|(path, error)| (&**path, *error))
                    .collect::<Vec<_>>()
            });
            assert_eq!(
                read.map_err(|error| *error),
                expected.map(<[_]>::to_vec),
                "{path}"
            );
        };
        let (parted, bare) = (PathError::EscapedSeparators, PathError::Parameters);
        check("/a/%41", Ok(&[]));
        check("/a%2Fb", Ok(&[("/a/b", parted)]));
        check(
            "/a%5C%2F",
            Ok(&[("/a%5C/", parted), ("/a/%2F", parted), ("/a/", parted)]),
        );
        check("/a%252Fb", Ok(&[]));
        check("/a;x", Ok(&[("/a", bare)]));
        check(
            "/a;x%2Fb",
            Ok(&[("/a", bare), ("/a;x/b", parted), ("/a/b", bare)]),
        );
        for dots in [
            "/..%2Fa",
            "/x/..%2Fa",
            "/x%5Cy%2F..%2Fa",
            "/a/.%5C",
            "/a/;%2F..%2Fb",
        ] {
            check(dots, Err(parted));
        }
        check("/a%2F..;%2Fb", Err(PathError::DotParameters));
        assert_eq!(most_lenient("/a;x%2Fb"), "/a/b");
        assert_eq!(most_lenient("/a"), "/a");
    }

    #[test]
    fn parameters_are_cut_off_each_segment() {
        let check = |path: &str, expected: Option<&str>| {
            assert_eq!(without_parameters(path).as_deref(), expected, "{path}");
        };
        check("/a/b", None);
        check("/a%3A", None);
        check("/admin;a=b/x", Some("/admin/x"));
        check("/admin%3Ba=b/x;y", Some("/admin/x"));
        check("/a;b%3Bc;d", Some("/a"));
        check("/;x/admin", Some("/admin"));
        check("/admin/;x", Some("/admin/"));
        check("/;", Some("/"));
    }

    #[test]
    fn an_ambiguous_path_is_refused() {
        check("", Err(PathError::NotAbsolute));
        check("admin", Err(PathError::NotAbsolute));
        check("/..", Err(PathError::AboveRoot));
        check("/%2e%2e/x", Err(PathError::AboveRoot));
        check("/a%00", Err(PathError::EscapedNul));
        check("/a\\b", Err(PathError::BadByte));
        check("/a b", Err(PathError::BadByte));
        check("/a%", Err(PathError::BadEscape));
        check("/a%2", Err(PathError::BadEscape));
        check("/a%zz", Err(PathError::BadEscape));
        check("/a/..;/admin", Err(PathError::DotParameters));
        check("/a/%2e;x=1/admin", Err(PathError::DotParameters));
        check("/a/..%3b/admin", Err(PathError::DotParameters));
    }

    proptest! {
        #[test]
        fn normalising_twice_is_normalising_once(path in "/([a-c\u{e4}./%2eEfF5;:|\\[]|%3[aAbB]|%2[b-fB-F]|%5[bBcC]){0,24}") {
            if let Ok(once) = normalise(path.as_bytes()) {
                let text = std::str::from_utf8(&once).expect("a normal path is ASCII");
                let bare = without_parameters(text).unwrap_or(text.to_owned());
                prop_assert_eq!(&*normalise(bare.as_bytes()).expect("so is one without parameters"), bare.as_bytes());
                prop_assert_eq!(without_parameters(&bare), None);
                prop_assert_eq!(normalise(&once).expect("a normal path is accepted"), once.clone());
                for (reading, _) in readings(text).unwrap_or_default() {
                    prop_assert_eq!(&*normalise(reading.as_bytes()).expect("so is each reading"), reading.as_bytes());
                }
                prop_assert_eq!(readings(&most_lenient(text)).map(|read| read.len()).unwrap_or(0), 0);
                let sent = as_sent(path.as_bytes()).expect("it has this form, too");
                prop_assert_eq!(&normalise(&sent).expect("it is a path"), &once);
                prop_assert_eq!(as_sent(&sent).expect("it is a path"), sent.clone());
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
