//! What a request must be for a route to serve it, as the file says it. Owns the patterns' spelling; `policy::routes`
//! asks them.

use std::fmt;
use std::net::Ipv6Addr;

use crate::http1::head::is_host;

/// What a request must be for a route to serve it. An empty list or a `None` asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// In lower case, without a port; `*.example.com` is any name below it. An IPv6 address is as [`literal`] writes it.
    pub host: Option<HostMatch>,
    /// On the normalised path.
    pub path: Option<PathMatch>,
    /// Whether the case of the path's ASCII letters does not count.
    pub ignore_case: bool,
    /// Any of these, as the file has them: [`Match::all_methods`] are those that it takes.
    pub methods: Vec<String>,
    /// All of these: a field name in lower case and its exact value.
    pub headers: Vec<(String, String)>,
}

/// A host name, or all names below one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostMatch {
    Exact(String),
    /// `*.example.com`, kept as `.example.com`; does not match `example.com` itself.
    Below(String),
}

/// A path, or all paths below one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PathMatch {
    Exact(String),
    /// `/pay/*`, kept as `/pay/`; matches `/pay/` and all below it, and not `/pay` nor `/payroll`.
    Below(String),
    /// `/pay/**`, kept as `/pay`; matches `/pay`, too.
    Tree(String),
}

impl Match {
    /// The methods that it takes, where it asks for any: who takes GET takes HEAD, which is a GET without its body.
    pub fn all_methods(&self) -> impl Iterator<Item = &str> {
        let has = |wanted| self.methods.iter().any(|method| method == wanted);
        let head = has("GET") && !has("HEAD");
        let methods = self.methods.iter().map(String::as_str);
        methods.chain(head.then_some("HEAD"))
    }
}

impl HostMatch {
    /// Reads `api.example.com` or `*.example.com`.
    pub fn parse(given: &str) -> Result<HostMatch, String> {
        let (text, below) = match given.strip_prefix('*') {
            Some(rest) => (rest, true),
            None => (given, false),
        };
        let name = text.strip_prefix('.').filter(|_| below).unwrap_or(text);
        let is_ipv6 = !below && name.starts_with('[') && name.ends_with(']');
        // What no request's Host can be would match nothing, and guard nothing.
        let is_a_host = is_host(name.as_bytes()) && !name.ends_with('.');
        if name.is_empty()
            || !is_a_host
            || (name.contains(':') && !is_ipv6)
            || (below && !text.starts_with('.'))
        {
            return Err(format!(
                "\"{given}\" is no host: use one name a route, such as shop.example.com, or \"*.\" and a name; no port, no dot at the end, no \
                 regular expression, and other scripts as xn--"
            ));
        }
        let text = literal(text).unwrap_or_else(|| text.to_ascii_lowercase());
        Ok(if below {
            HostMatch::Below(text)
        } else {
            HostMatch::Exact(text)
        })
    }

    /// Every pattern that means all that this one does, itself among them.
    pub fn wider(&self) -> Vec<HostMatch> {
        let (itself, text, own) = match self {
            HostMatch::Exact(name) => (Some(self.clone()), name, false),
            HostMatch::Below(suffix) => (None, suffix, true),
        };
        let dots = text.match_indices('.').filter(|(at, _)| *at > 0 || own);
        let above = dots.map(|(at, _)| HostMatch::Below(text[at..].to_owned()));
        above.chain(itself).collect()
    }

    /// Whether `host`, without a port or trailing dot, is meant; letter case does not count.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            HostMatch::Exact(name) => host.eq_ignore_ascii_case(name),
            HostMatch::Below(suffix) => {
                host.len() > suffix.len()
                    && host.as_bytes()[host.len() - suffix.len()..]
                        .eq_ignore_ascii_case(suffix.as_bytes())
            }
        }
    }
}

/// An IPv6 address in brackets, as all its spellings are (RFC 5952); `None` for what is none.
pub fn literal(host: &str) -> Option<String> {
    let ip = host.strip_prefix('[')?.strip_suffix(']')?;
    let ip: Ipv6Addr = ip.parse().ok()?;
    Some(format!("[{ip}]"))
}

impl PathMatch {
    /// Reads `/pay`, `/pay/*` or `/pay/**`.
    pub fn parse(text: &str) -> Result<PathMatch, String> {
        if !text.starts_with('/') {
            // As nginx spells an exact and a preferred match, and Spring and others a suffix.
            let path = text.trim_start_matches(['=', '^', '~', '*', ' ']);
            let mend = match path.strip_prefix('/') {
                Some(path) => format!("use \"/{path}\""),
                None if text.starts_with('*') => {
                    "there are no suffixes: use a path, or all below one, such as \"/x/*\""
                        .to_owned()
                }
                None => format!("use \"/{text}\""),
            };
            return Err(format!("path must begin with \"/\": {mend}"));
        }
        let plain = text.trim_end_matches('*');
        let folder = plain.strip_suffix('/');
        match (&text[plain.len()..], folder) {
            _ if plain.contains('*') => None,
            ("", _) => Some(PathMatch::Exact(text.to_owned())),
            // Nothing is above "/", so that it is all below it.
            ("*", Some(_)) | ("**", Some("")) => Some(PathMatch::Below(plain.to_owned())),
            ("**", Some(folder)) => Some(PathMatch::Tree(folder.to_owned())),
            _ => None,
        }
        .ok_or_else(|| {
            format!(
                "\"{text}\": \"*\" and \"**\" stand at the end alone, behind a \"/\": use, for example, \"/x/*\""
            )
        })
    }

    /// The same pattern in small letters.
    pub fn folded(&self) -> PathMatch {
        match self {
            PathMatch::Exact(path) => PathMatch::Exact(path.to_ascii_lowercase()),
            PathMatch::Below(folder) => PathMatch::Below(folder.to_ascii_lowercase()),
            PathMatch::Tree(path) => PathMatch::Tree(path.to_ascii_lowercase()),
        }
    }

    /// Every pattern that means all that this one does, itself among them.
    pub fn wider(&self) -> Vec<PathMatch> {
        let (itself, text) = match self {
            PathMatch::Exact(path) => (vec![self.clone(), PathMatch::Tree(path.clone())], path),
            PathMatch::Below(folder) => (vec![], folder),
            PathMatch::Tree(path) => (vec![self.clone()], path),
        };
        let above = text.match_indices('/').flat_map(|(at, _)| {
            let tree = PathMatch::Tree(text[..at].to_owned());
            [PathMatch::Below(text[..=at].to_owned()), tree]
        });
        above.chain(itself).collect()
    }

    /// Whether `path`, normalised, is meant.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(wanted) => path == wanted,
            PathMatch::Below(folder) => path.starts_with(folder.as_str()),
            PathMatch::Tree(wanted) => {
                let rest = path.strip_prefix(wanted.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl fmt::Display for HostMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostMatch::Exact(name) => f.write_str(name),
            HostMatch::Below(suffix) => write!(f, "*{suffix}"),
        }
    }
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathMatch::Exact(path) => f.write_str(path),
            PathMatch::Below(folder) => write!(f, "{folder}*"),
            PathMatch::Tree(path) => write!(f, "{path}/**"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_that_could_mislead_is_refused() {
        for host in [
            "",
            "*",
            "*.",
            "*example.com",
            ".example.com",
            "*..example.com",
            "a.*.com",
            "example.com:80",
            "example.com.",
            "~^www\\d+\\.example\\.com$",
            "(a|b).com",
            "a.com b.com",
            "a.com,b.com",
            "b\u{fc}cher.example",
            "[::1",
        ] {
            assert!(HostMatch::parse(host).is_err(), "{host}");
        }
        for path in ["pay", "/pay*", "/pay**", "/*/x", "/a*/*", "/**/x", "/a/***"] {
            assert!(PathMatch::parse(path).is_err(), "{path}");
        }
    }
}
