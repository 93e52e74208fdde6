//! What of a request is never written down: values by their names, and what URLs say of users. No I/O.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::http1::path;

/// What stands in place of a redacted value.
pub const REDACTED: &str = "***";

/// The headers whose values are URLs.
const OF_URLS: [&str; 3] = ["referer", "location", "content-location"];

/// The names whose values are never written down, and the segments of paths. Case does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redaction {
    headers: Names,
    query: Names,
    /// In normal form; each segment that is `*` stands for any, and at the end for all that follow.
    paths: BTreeSet<String>,
}

/// Names, and patterns of names, in which each `*` stands for any text; in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Names {
    exact: BTreeSet<String>,
    patterns: BTreeSet<String>,
}

impl Names {
    fn new<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> Names {
        let mut all = Names::default();
        all.add(names);
        all
    }

    fn add<T: AsRef<str>>(&mut self, names: impl IntoIterator<Item = T>) {
        for name in names.into_iter().map(lower) {
            match name.contains('*') {
                true => self.patterns.insert(name),
                false => self.exact.insert(name),
            };
        }
    }

    fn has(&self, name: &str) -> bool {
        let name = lower(name);
        self.exact.contains(&name) || self.patterns.iter().any(|it| is_like(it, &name))
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        self.exact.iter().chain(&self.patterns).map(String::as_str)
    }
}

impl Redaction {
    /// Redacts these headers and these parameters of the query, and nothing else.
    pub fn new<T: AsRef<str>>(
        headers: impl IntoIterator<Item = T>,
        query: impl IntoIterator<Item = T>,
    ) -> Redaction {
        Redaction {
            headers: Names::new(headers),
            query: Names::new(query),
            paths: BTreeSet::new(),
        }
    }

    /// The headers that are redacted, in lower case.
    pub fn headers(&self) -> impl Iterator<Item = &str> {
        self.headers.iter()
    }

    /// The parameters that are redacted, in lower case.
    pub fn query(&self) -> impl Iterator<Item = &str> {
        self.query.iter()
    }

    /// The patterns of paths.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.paths.iter().map(String::as_str)
    }

    /// Redacts these headers and parameters as well.
    pub fn add<T: AsRef<str>>(
        &mut self,
        headers: impl IntoIterator<Item = T>,
        query: impl IntoIterator<Item = T>,
    ) {
        self.headers.add(headers);
        self.query.add(query);
    }

    /// Redacts what these patterns have a `*` for, too; each is a path in normal form.
    pub fn add_paths(&mut self, patterns: impl IntoIterator<Item = String>) {
        self.paths.extend(patterns);
    }

    /// The path, or a URL up to its query, with `***` for what a pattern has a `*` for.
    pub fn redact_path<'a>(&self, path: &'a str) -> Cow<'a, str> {
        if self.paths.is_empty() {
            return Cow::Borrowed(path);
        }
        let start = match path.find("//").filter(|at| !path[..*at].contains('/')) {
            Some(at) if at > 0 => path[at + 2..].find('/').map(|slash| at + 2 + slash),
            _ => Some(0),
        };
        let (origin, asked) = path.split_at(start.unwrap_or(path.len()));
        // What no route has taken is as it was sent.
        let normal = path::normalise(asked.as_bytes()).ok();
        let normal = normal.as_ref().and_then(|path| str::from_utf8(path).ok());
        let mut redacted = None;
        for pattern in &self.paths {
            let path = redacted.as_deref().or(normal).unwrap_or(asked);
            redacted = hidden_by(pattern, path).or(redacted);
        }
        match redacted {
            Some(redacted) => Cow::Owned(origin.to_owned() + &redacted),
            None => Cow::Borrowed(path),
        }
    }

    /// The query with the values of the redacted names as `***`, however the name is percent-encoded. The rest stays
    /// as it is, byte for byte.
    pub fn redact_query(&self, query: &str) -> String {
        let mut redacted = String::with_capacity(query.len());
        for (n, pair) in query.split('&').enumerate() {
            if n > 0 {
                redacted.push('&');
            }
            match self.secret_in(pair) {
                Some(value) => {
                    redacted.push_str(&pair[..value]);
                    redacted.push_str(REDACTED);
                }
                None => redacted.push_str(pair),
            }
        }
        redacted
    }

    /// Whether the values of headers of this name are redacted.
    pub fn hides(&self, name: &str) -> bool {
        self.headers.has(name)
    }

    /// The value, or `***` for a redacted name; a URL without what must not be shown of it.
    pub fn redact_header<'a>(&self, name: &str, value: &'a str) -> Cow<'a, str> {
        if self.hides(name) {
            return Cow::Borrowed(REDACTED);
        }
        match OF_URLS.iter().any(|url| name.eq_ignore_ascii_case(url)) {
            true => Cow::Owned(self.redact_url(value)),
            false => Cow::Borrowed(value),
        }
    }

    /// The URL without a user and password, and with the redacted parameters of its query and its fragment as `***`: an
    /// authorization server puts tokens behind a `#`.
    fn redact_url(&self, url: &str) -> String {
        let is_front = |at: &usize| !url[..*at].contains(['/', '?', '#']);
        let url = match url.find("//").filter(is_front) {
            Some(at) => without_userinfo(url, at + 2),
            None => Cow::Borrowed(url),
        };
        let (whole, fragment) = parted(&url, '#');
        let (path, query) = parted(whole, '?');
        let mut redacted = self.redact_path(path).into_owned();
        if let Some(query) = query {
            redacted.push('?');
            redacted += &self.redact_query(query);
        }
        if let Some(fragment) = fragment {
            redacted.push('#');
            redacted += &match parted(fragment, '?') {
                // Pages find their way by it.
                (path, Some(query)) if !path.contains('=') => {
                    format!("{path}?{}", self.redact_query(query))
                }
                _ => self.redact_query(fragment),
            };
        }
        redacted
    }

    /// Where the secret begins in what stands between two `&`. Some servers also part at `;`, so a name may begin
    /// there; a secret ends only at `&`, because for other servers the `;` belongs to it.
    fn secret_in(&self, pair: &str) -> Option<usize> {
        let mut start = 0;
        for part in pair.split(';') {
            if let Some(equals) = part.find('=')
                && self.query.has(&decode_name(&part[..equals]))
            {
                return Some(start + equals + 1);
            }
            start += part.len() + 1;
        }
        None
    }
}

impl Default for Redaction {
    /// The names that carry secrets nearly everywhere; those of clouds' signed URLs as OpenTelemetry's conventions have them.
    fn default() -> Redaction {
        Redaction::new(
            [
                "authorization",
                "cookie",
                "proxy-authorization",
                "set-cookie",
                "x-amz-security-token",
                "x-api-key",
                "x-weir-session-token",
            ],
            [
                "access_token",
                "api_key",
                "apikey",
                "awsaccesskeyid",
                "client_secret",
                "code",
                "id_token",
                "password",
                "refresh_token",
                "secret",
                "sig",
                "signature",
                "token",
                "x-amz-security-token",
                "x-amz-signature",
                "x-goog-signature",
            ],
        )
    }
}

/// A URL, whose host begins at `authority` or behind a user and password there, without these.
pub fn without_userinfo(url: &str, authority: usize) -> Cow<'_, str> {
    let rest = &url[authority..];
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) => Cow::Owned([&url[..authority], &rest[at + 1..]].concat()),
        None => Cow::Borrowed(url),
    }
}

/// Whether `text` is `pattern` with some text for each `*`.
fn is_like(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let begins = parts.next().and_then(|start| text.strip_prefix(start));
    let (Some(rest), Some(end)) = (begins, parts.next_back()) else {
        return pattern == text;
    };
    let Some(mut rest) = rest.strip_suffix(end) else {
        return false;
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// The path with `***` for what the pattern has a `*` for, where it begins as the pattern does. A segment's parameters do not count.
fn hidden_by(pattern: &str, path: &str) -> Option<String> {
    let mut wanted = pattern.strip_prefix('/')?.split('/').peekable();
    let mut rest = Some(path.strip_prefix('/')?);
    let mut redacted = String::with_capacity(path.len());
    while let Some(wants) = wanted.next() {
        let here = rest?;
        redacted.push('/');
        if wants == "*" && wanted.peek().is_none() {
            redacted.push_str(REDACTED);
            return (!here.is_empty()).then_some(redacted);
        }
        let (segment, behind) = parted(here, '/');
        let name = segment.split(';').next().unwrap_or_default();
        match wants {
            "*" => redacted.push_str(REDACTED),
            _ if name.eq_ignore_ascii_case(wants) => redacted.push_str(segment),
            _ => return None,
        }
        rest = behind;
    }
    if let Some(rest) = rest {
        redacted.push('/');
        redacted.push_str(rest);
    }
    Some(redacted)
}

/// What stands before the mark, and what behind it, where it is there.
fn parted(text: &str, mark: char) -> (&str, Option<&str>) {
    match text.split_once(mark) {
        Some((before, behind)) => (before, Some(behind)),
        None => (text, None),
    }
}

fn lower(name: impl AsRef<str>) -> String {
    name.as_ref().to_lowercase()
}

/// A parameter's name as a server reads it: `%XX` and `+` undone; a broken escape stands for itself.
fn decode_name(name: &str) -> Cow<'_, str> {
    if !name.contains(['%', '+']) {
        return Cow::Borrowed(name);
    }
    let mut decoded = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, behind @ ..] = rest {
        let (byte, behind) = match (first, behind) {
            (b'%', [high, low, behind @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                (hex(*high) << 4 | hex(*low), behind)
            }
            (b'+', behind) => (b' ', behind),
            (byte, behind) => (*byte, behind),
        };
        decoded.push(byte);
        rest = behind;
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

/// The value of a hexadecimal digit.
fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn redacted_parameters_keep_their_name_and_lose_their_value() {
        let redaction = Redaction::new(["Authorization"], ["token", "a b"]);
        let check = |query: &str, expected: &str| {
            assert_eq!(redaction.redact_query(query), expected, "{query}");
        };
        check("", "");
        check("a=1&b=2", "a=1&b=2");
        check("token=s&b=2", "token=***&b=2");
        check("b=2&TOKEN=s", "b=2&TOKEN=***");
        check("%74oke%6E=s", "%74oke%6E=***");
        check("a+b=s&a%20b=s", "a+b=***&a%20b=***");
        check("token=s=t;u", "token=***");
        check("a=1;token=s;t", "a=1;token=***");
        check("token", "token");
        check("%zz=1&%=2&%7=3", "%zz=1&%=2&%7=3");
        assert_eq!(redaction.redact_header("AUTHORIZATION", "Bearer s"), "***");
        assert_eq!(redaction.redact_header("accept", "*/*"), "*/*");
    }

    #[test]
    fn urls_in_headers_show_no_secret() {
        let redaction = Redaction::default();
        let check = |url: &str, expected: &str| {
            for name in ["Referer", "location", "Content-Location"] {
                assert_eq!(redaction.redact_header(name, url), expected, "{name}");
            }
        };
        check("https://a/b", "https://a/b");
        check(
            "https://a/?x=1&access_token=s",
            "https://a/?x=1&access_token=***",
        );
        check("/cb?code=s#x", "/cb?code=***#x");
        check("/cb?a=1#id_token=s&b=2", "/cb?a=1#id_token=***&b=2");
        check("/#/cb?code=s", "/#/cb?code=***");
        check("/?token=a?b#token=a?b", "/?token=***#token=***");
        check("/a?x=//b@c", "/a?x=//b@c");
        check("https://ann:s@a:1/b@c?d=@", "https://a:1/b@c?d=@");
        check("//ann@a/b", "//a/b");
        check("ann@b", "ann@b");
        check("", "");
        assert_eq!(redaction.redact_header("x-url", "/?code=1"), "/?code=1");
    }

    #[test]
    fn names_are_redacted_by_pattern() {
        let check = |pattern: &str, name: &str, expected: bool| {
            let redaction = Redaction::new([pattern], [pattern]);
            assert_eq!(redaction.hides(name), expected, "{pattern} {name}");
            let query = redaction.redact_query(&format!("{name}=s"));
            assert_eq!(query.ends_with("=***"), expected, "{pattern} {name}");
        };
        check("x-secret-*", "X-Secret-Key", true);
        check("x-secret-*", "x-secret-", true);
        check("x-secret-*", "x-secret", false);
        check("*_Token", "reset_token", true);
        check("*_token", "reset_token2", false);
        check("*pin*", "my-pin-1", true);
        check("a*b*c", "abc", true);
        check("a*b*c", "acb", false);
        check("a*a", "a", false);
        check("*", "a", true);
        check("a.c", "abc", false);
    }

    #[test]
    fn paths_are_redacted_by_pattern() {
        let mut redaction = Redaction::default();
        let patterns = ["/reset/*", "/users/*/keys/*", "/u/*/x"];
        redaction.add_paths(patterns.map(str::to_owned));
        let check = |path: &str, expected: &str| {
            assert_eq!(redaction.redact_path(path), expected, "{path}");
        };
        check("/reset/s", "/reset/***");
        check("/reset/s/t;u", "/reset/***");
        check("/Reset;a=b/s", "/Reset;a=b/***");
        check("/reset/", "/reset/");
        check("/reset", "/reset");
        check("/resets/s", "/resets/s");
        check("/users/ann/keys/s", "/users/***/keys/***");
        check("/users/ann/keys", "/users/ann/keys");
        check("/u/ann/x/y/", "/u/***/x/y/");
        check("/u/ann/x", "/u/***/x");
        check("/u/ann", "/u/ann");
        check("//reset/./%73", "/reset/***");
        check("/reset/%2f", "/reset/***");
        check("https://a/reset/s", "https://a/reset/***");
        check("https://a", "https://a");
        check("", "");
        check("/", "/");
        assert_eq!(
            redaction.redact_header("Referer", "https://a/reset/s?code=t"),
            "https://a/reset/***?code=***"
        );
        let none = Redaction::default();
        assert!(matches!(none.redact_path("/reset/s"), Cow::Borrowed(_)));
    }

    #[test]
    fn what_signs_the_urls_of_clouds_is_hidden() {
        for name in [
            "X-Amz-Signature",
            "X-Amz-Security-Token",
            "X-Goog-Signature",
            "AWSAccessKeyId",
        ] {
            let redacted = Redaction::default().redact_query(&format!("{name}=s"));
            assert_eq!(redacted, format!("{name}=***"));
        }
        for name in ["X-Weir-Session-Token", "X-Amz-Security-Token"] {
            assert!(Redaction::default().hides(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_redacted_name_shows_its_value(
            before in "[a-z=;%+]{0,8}",
            escaped in proptest::collection::vec(any::<bool>(), 5),
            secret in "[0-9;=]{6,12}",
        ) {
            let name: String = "token".chars().zip(escaped).map(|(c, escaped)| {
                if escaped { format!("%{:02x}", u32::from(c)) } else { c.to_string() }
            }).collect();
            let redacted = Redaction::default().redact_query(&format!("{before}&{name}={secret}&z=1"));
            prop_assert!(!redacted.contains(&secret), "{}", redacted);
            prop_assert!(redacted.ends_with(&format!("{name}=***&z=1")), "{}", redacted);
        }

        #[test]
        fn a_query_without_redacted_names_is_kept_byte_for_byte(query in any::<String>()) {
            prop_assert_eq!(Redaction::new::<&str>([], []).redact_query(&query), query);
        }

        #[test]
        fn a_url_without_secrets_is_kept_byte_for_byte(url in "[a-z:/?#=&.]{0,24}") {
            prop_assert_eq!(Redaction::new::<&str>([], []).redact_url(&url), url);
        }
    }
}
