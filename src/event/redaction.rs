//! What of a request is never written down: values by their names, and what URLs say of users. No I/O.

use std::borrow::Cow;
use std::collections::BTreeSet;

use percent_encoding::percent_decode_str;
use smallvec::SmallVec;

use super::{LONGEST, start_of};
use crate::http1::path;

/// What stands in place of a redacted value.
pub const REDACTED: &str = "***";

/// How often a URL within a URL may be escaped.
const ESCAPED: usize = 2;

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
    /// The same without what parts their words: `accessToken` and `access-token` are as secret as `access_token`.
    joined: BTreeSet<String>,
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
                false => {
                    self.joined.insert(joined(&name));
                    self.exact.insert(name)
                }
            };
        }
    }

    fn has(&self, name: &str) -> bool {
        if self.joined.contains(&joined(name)) {
            return true;
        }
        let is_like = |name: String| self.patterns.iter().any(|it| is_like(it, &name));
        !self.patterns.is_empty() && is_like(lower(name))
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

    /// A request's path, or its URL up to the query, with `***` for what a pattern has a `*` for.
    pub fn redact_path<'a>(&self, path: &'a str) -> Cow<'a, str> {
        // Unlike in a header, `//` begins a path.
        let start = match path.starts_with('/') {
            true => 0,
            false => origin_end(path),
        };
        self.redact_behind(start, path)
    }

    /// Of a path that is `asked` for elsewhere, as `moved`, whose last segments, as many as are `kept`, are those of `asked`:
    /// without what is hidden of either. Both are in normal form.
    pub fn redact_moved<'a>(&self, asked: &str, moved: &'a str, kept: usize) -> Cow<'a, str> {
        if self.paths.is_empty() {
            return Cow::Borrowed(moved);
        }
        if let Some(redacted) = self
            .where_parted(moved)
            .or_else(|| self.where_parted(asked))
        {
            return Cow::Owned(redacted);
        }
        let mut mask = self.mask(moved);
        let count = |path: &str| path.split('/').count();
        let (before, now) = (count(asked), count(moved));
        let start = before.saturating_sub(kept);
        let moved_to = |n: usize| (n + now).saturating_sub(before);
        let of_asked = self.mask(asked);
        let behind = of_asked.hidden.into_iter().filter(|n| *n >= start);
        mask.hidden.extend(behind.map(moved_to));
        if let Some(rest) = of_asked.rest {
            mask.hide_from(moved_to(rest.max(start)));
        }
        mask.put_on(moved).map_or(Cow::Borrowed(moved), Cow::Owned)
    }

    /// The URL up to its query, of which the path begins at `start`.
    fn redact_behind<'a>(&self, start: usize, url: &'a str) -> Cow<'a, str> {
        let (origin, path) = url.split_at(start);
        if self.paths.is_empty() || path.is_empty() {
            return Cow::Borrowed(url);
        }
        // Of what `..` takes away the normal form tells nothing.
        if takes_away(path)
            && let Some(redacted) = self.unsure(path)
        {
            return Cow::Owned(origin.to_owned() + &redacted);
        }
        let normal = path::normalise(path.as_bytes()).ok();
        let redacted = match normal.as_deref().map(str::from_utf8) {
            Some(Ok(path)) => self
                .where_parted(path)
                .or_else(|| self.mask(path).put_on(path)),
            _ => self.unsure(path),
        };
        redacted.map_or(Cow::Borrowed(url), |path| {
            Cow::Owned(origin.to_owned() + &path)
        })
    }

    /// What of a path in normal form is hidden, by all patterns together.
    fn mask(&self, path: &str) -> Mask {
        let segments: SmallVec<[_; 16]> = path.split('/').enumerate().skip(1).collect();
        // For servers that know parameters `/;x/a` is `/a`.
        let is_named = |it: &str| it.is_empty() || !name(it).is_empty();
        let named = segments.iter().copied().filter(|(_, it)| is_named(it));
        let mut mask = Mask::default();
        for pattern in &self.paths {
            mask.add(pattern, segments.iter().copied());
            mask.add(pattern, named.clone());
        }
        mask
    }

    /// What is told of a path in normal form that some servers part where others do not.
    fn where_parted(&self, path: &str) -> Option<String> {
        let is_unsure = path::has_escaped_separators(path);
        is_unsure.then(|| self.unsure(path)).flatten()
    }

    /// What is told of a path without a normal form, which one server reads so and another so, or of which the normal form is not all, where it
    /// may have what is hidden: nothing of it, but how the pattern begins.
    fn unsure(&self, path: &str) -> Option<String> {
        let read = decoded(path);
        let is_in = |head: &str| {
            let wanted = decoded(head.rsplit('/').next().unwrap_or_default());
            let mut segments = read.split(['/', '\\']);
            head.is_empty() || segments.any(|it| name(it).eq_ignore_ascii_case(name(&wanted)))
        };
        let mut heads = self.paths.iter().filter_map(|it| it.split_once("/*"));
        let (head, _) = heads.find(|(head, _)| is_in(head))?;
        Some(format!("{head}/{REDACTED}"))
    }

    /// The query with the values of the redacted names as `***`, however the name is percent-encoded. The rest stays
    /// as it is, byte for byte, up to [`LONGEST`] bytes and the parameter that passes them.
    pub fn redact_query(&self, query: &str) -> String {
        let mut redacted = String::with_capacity(query.len().min(LONGEST));
        for (n, pair) in query.split('&').enumerate() {
            match n {
                0 => {}
                _ if redacted.len() > LONGEST => break,
                _ => redacted.push('&'),
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
        let url = match authority(url) {
            Some(at) => without_userinfo(url, at),
            None => Cow::Borrowed(url),
        };
        let (whole, fragment) = parted(&url, '#');
        let (path, query) = parted(whole, '?');
        let start = origin_end(path);
        // What it is relative to is not known here.
        let is_relative = start == 0 && !path.is_empty() && !path.starts_with('/');
        let mut redacted = match is_relative && !self.paths.is_empty() {
            true => REDACTED.to_owned(),
            false => self.redact_behind(start, path).into_owned(),
        };
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
    /// there; a secret ends only at `&`, because for other servers the `;` belongs to it. What is not kept passes for one.
    fn secret_in(&self, pair: &str) -> Option<usize> {
        let mut start = 0;
        for part in pair.split(';') {
            if let Some(equals) = part.find('=')
                && (start + equals > LONGEST
                    || self.is_secret(&decode_name(&part[..equals]))
                    || self.is_in_url(&part[equals + 1..]))
            {
                return Some(start + equals + 1);
            }
            start += part.len() + 1;
        }
        None
    }

    /// Whether a value is a URL with a secret, as where to go on after a log-in often is, escaped once or twice.
    fn is_in_url(&self, value: &str) -> bool {
        // What is behind is not kept.
        let mut value = Cow::Borrowed(start_of(value, LONGEST));
        for _ in 0..=ESCAPED {
            // Before the first of these there is no parameter.
            let parameters = value.split(['?', '#', '&', ';']).skip(1);
            let mut names = parameters.filter_map(|it| it.split_once('=').map(|(name, _)| name));
            if value.contains(['?', '#']) && names.any(|name| self.is_secret(&decode_name(name))) {
                return true;
            }
            if !value.contains('%') {
                break;
            }
            value = Cow::Owned(decoded(&value).into_owned());
        }
        false
    }

    /// Whether a parameter's value is: by its name, or where that is nested (`user[password]`, `token[]`) by a part of it.
    fn is_secret(&self, name: &str) -> bool {
        let mut parts = name.split(['[', ']']).filter(|part| !part.is_empty());
        self.query.has(name) || (name.contains('[') && parts.any(|part| self.query.has(part)))
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
                "assertion",
                "awsaccesskeyid",
                "client_secret",
                "code",
                "id_token",
                "jwt",
                "passwd",
                "password",
                "pwd",
                "refresh_token",
                "saml_response",
                "samlresponse",
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

/// Which segments of a path are hidden, counted from 1.
#[derive(Debug, Default)]
struct Mask {
    hidden: SmallVec<[usize; 8]>,
    /// The first of those at the end that are hidden together.
    rest: Option<usize>,
}

impl Mask {
    /// Hides what the pattern has a `*` for, where the segments begin as it does.
    fn add<'a>(&mut self, pattern: &str, mut segments: impl Iterator<Item = (usize, &'a str)>) {
        let before = self.hidden.len();
        let mut wanted = pattern.split('/').skip(1).peekable();
        while let Some(wants) = wanted.next() {
            let is_last = wanted.peek().is_none();
            match (segments.next(), wants) {
                (Some((n, here)), "*") if is_last && !here.is_empty() => self.hide_from(n),
                (Some((n, _)), "*") if !is_last => self.hidden.push(n),
                (Some((_, here)), _) if name(here).eq_ignore_ascii_case(name(wants)) => {}
                _ => return self.hidden.truncate(before),
            }
        }
    }

    fn hide_from(&mut self, n: usize) {
        self.rest = Some(self.rest.map_or(n, |rest| rest.min(n)));
    }

    /// The path with `***` for what is hidden; `None` where nothing is.
    fn put_on(&self, path: &str) -> Option<String> {
        let mut shown = String::with_capacity(path.len());
        let mut is_whole = true;
        for (n, segment) in path.split('/').enumerate().skip(1) {
            let is_rest = self.rest.is_some_and(|rest| n >= rest);
            let is_hidden = is_rest || self.hidden.contains(&n);
            shown.push('/');
            shown.push_str(if is_hidden { REDACTED } else { segment });
            is_whole &= !is_hidden;
            if is_rest {
                break;
            }
        }
        (!is_whole).then_some(shown)
    }
}

/// Whether a path has a `..`, however it is spelt.
fn takes_away(path: &str) -> bool {
    let may = path.contains("..") || path.contains('%');
    may && decoded(path).split(['/', '\\']).any(|it| it == "..")
}

/// A segment without its parameters.
fn name(segment: &str) -> &str {
    &segment[..path::parameters(segment).unwrap_or(segment.len())]
}

/// Where the host of a URL begins, or a user and password before it.
fn authority(url: &str) -> Option<usize> {
    let (scheme, _) = url.split_once("//")?;
    let is_front = scheme.is_empty() || scheme.ends_with(':') && !scheme.contains(['/', '?', '#']);
    is_front.then_some(scheme.len() + 2)
}

/// Where the path of a URL begins.
fn origin_end(url: &str) -> usize {
    authority(url).map_or(0, |at| {
        // Browsers take a `\` for a `/`.
        let slash = url[at..].find(['/', '\\']);
        slash.map_or(url.len(), |slash| at + slash)
    })
}

/// What stands before the mark, and what behind it, where it is there.
fn parted(text: &str, mark: char) -> (&str, Option<&str>) {
    match text.split_once(mark) {
        Some((before, behind)) => (before, Some(behind)),
        None => (text, None),
    }
}

/// A name in lower case without what parts words in it; one that has nothing else is itself.
fn joined(name: &str) -> String {
    let is_kept = |char: &char| !matches!(char, '-' | '_' | '.');
    let kept = name.chars().filter(is_kept);
    let mut joined = String::with_capacity(name.len());
    joined.extend(kept.flat_map(char::to_lowercase));
    match joined.is_empty() {
        true => name.to_owned(),
        false => joined,
    }
}

fn lower(name: impl AsRef<str>) -> String {
    name.as_ref().to_lowercase()
}

/// A parameter's name as a server reads it.
fn decode_name(name: &str) -> Cow<'_, str> {
    match name.contains(['%', '+']) {
        true => Cow::Owned(decoded(&name.replace('+', " ")).into_owned()),
        false => Cow::Borrowed(name),
    }
}

/// With each `%XX` undone; a broken escape stands for itself.
fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

#[cfg(test)]
mod tests;
