//! What a request is called elsewhere: paths with another prefix, and where a redirect sends. Must not know requests.

use crate::config::matches::PathMatch;
use crate::config::rewrite::{NewPath, Redirect, Scheme};
use crate::http1::head::without_port;

/// What stays of a path, with `prefix` in place of what its pattern names. Both are in normal form, and so is what comes of them.
pub fn with_prefix(behind: &str, prefix: &str) -> String {
    match behind {
        "" => prefix.to_owned(),
        rest => prefix.strip_suffix('/').unwrap_or(prefix).to_owned() + rest,
    }
}

/// What is `behind` a prefix of `path`, as it stands in the same path as it is sent: that has the same segments, some spelt otherwise
/// and empty ones between. It begins with one `/`, so that no host comes of it.
pub fn as_sent<'a>(path: &str, behind: &str, sent_path: &'a str) -> &'a str {
    let prefix = &path[..path.len() - behind.len()];
    let mut rest = sent_path;
    for _ in prefix.split('/').filter(|segment| !segment.is_empty()) {
        rest = rest.trim_start_matches('/');
        rest = &rest[rest.find('/').unwrap_or(rest.len())..];
    }
    match behind {
        "" => "",
        _ => {
            let slashes = rest.len() - rest.trim_start_matches('/').len();
            &rest[slashes.saturating_sub(1)..]
        }
    }
}

/// What of `path`, which `pattern` matches, stays behind another prefix.
pub fn behind<'a>(pattern: Option<&PathMatch>, path: &'a str) -> &'a str {
    match pattern {
        None => path,
        Some(PathMatch::Exact(_)) => "",
        // What is left begins with the "/" that the pattern ends in.
        Some(PathMatch::Below(folder)) => path.get(folder.len() - 1..).unwrap_or_default(),
        Some(PathMatch::Tree(wanted)) => path.get(wanted.len()..).unwrap_or_default(),
    }
}

/// A request as a redirect sees it.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Of its route.
    pub pattern: Option<&'a PathMatch>,
    /// Host as sent.
    pub host: &'a str,
    /// In normal form.
    pub path: &'a str,
    /// The path as upstreams would get it.
    pub sent_path: &'a str,
    /// With its `?`, or empty.
    pub query: &'a str,
}

/// The value of Location (RFC 9110 section 10.2.2): as short a reference as will do, so that what is not told is as the
/// client knows it, whatever stands before weir. `None` where it would take a host that the request does not name.
pub fn location(redirect: &Redirect, asked: &Asked<'_>) -> Option<String> {
    let mut location = String::new();
    let Redirect {
        scheme, host, port, ..
    } = redirect;
    if scheme.is_some() || host.is_some() || port.is_some() {
        location.push_str(match scheme {
            Some(Scheme::Http) => "http:",
            Some(Scheme::Https) => "https:",
            None => "",
        });
        // The request's port is that of another scheme.
        let host = host.as_deref().unwrap_or_else(|| without_port(asked.host));
        if host.is_empty() {
            return None;
        }
        location.push_str("//");
        location.push_str(host);
        if let Some(port) = port {
            location.push(':');
            location.push_str(&port.to_string());
        }
    }
    match &redirect.path {
        None => location.push_str(asked.sent_path),
        Some(NewPath::Whole(path)) => location.push_str(path),
        Some(NewPath::Prefix(prefix)) => {
            let behind = behind(asked.pattern, asked.path);
            let behind = as_sent(asked.path, behind, asked.sent_path);
            location.push_str(&with_prefix(behind, prefix));
        }
    }
    if !redirect.strip_query {
        location.push_str(asked.query);
    }
    Some(location)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http1::path::normalise;

    #[test]
    fn a_prefix_is_that_of_the_pattern_and_no_more() {
        let check = |pattern: Option<&str>, path: &str, prefix: &str, expected: &str| {
            let pattern = pattern.map(|pattern| PathMatch::parse(pattern).unwrap());
            let got = with_prefix(behind(pattern.as_ref(), path), prefix);
            assert_eq!(got, expected, "{pattern:?} {path} {prefix}");
        };
        check(Some("/pay/*"), "/pay/x/y", "/v2", "/v2/x/y");
        check(Some("/pay/*"), "/pay/x", "/v2/", "/v2/x");
        check(Some("/pay/*"), "/pay/", "/v2", "/v2/");
        check(Some("/pay/*"), "/pay/x", "/", "/x");
        check(Some("/pay/*"), "/pay/", "/", "/");
        check(Some("/pay/*"), "/pay/pay/x", "/v2", "/v2/pay/x");
        check(Some("/pay"), "/pay", "/v2", "/v2");
        check(Some("/pay"), "/pay", "/v2/", "/v2/");
        check(Some("/pay"), "/pay", "/", "/");
        check(Some("/pay/**"), "/pay", "/v2", "/v2");
        check(Some("/pay/**"), "/pay/", "/v2", "/v2/");
        check(Some("/pay/**"), "/pay/pay", "/v2", "/v2/pay");
        check(Some("/pay/**"), "/pay/x", "/", "/x");
        check(Some("/*"), "/x", "/v2", "/v2/x");
        check(Some("/*"), "/", "/v2", "/v2/");
        check(None, "/x", "/v2", "/v2/x");
        check(None, "/x", "/", "/x");
    }

    #[test]
    fn what_stays_is_spelt_as_it_is_sent() {
        let check = |pattern: Option<&str>, sent_path: &str, expected: &str| {
            let pattern = pattern.map(|pattern| PathMatch::parse(pattern).unwrap());
            let path = normalise(sent_path.as_bytes()).unwrap().into_owned();
            let path = String::from_utf8(path).unwrap();
            let got = as_sent(&path, behind(pattern.as_ref(), &path), sent_path);
            assert_eq!(got, expected, "{pattern:?} {sent_path}");
        };
        check(None, "/a%2Bb/c", "/a%2Bb/c");
        check(Some("/a+b/**"), "/a%2Bb/c%40d/", "/c%40d/");
        check(Some("/a+b/**"), "/a%2Bb", "");
        check(Some("/a+b/*"), "/a%2Bb/", "/");
        check(Some("/a+b"), "/a%2Bb", "");
        check(Some("/p/*"), "/p/a%2Fb%2C/c", "/a%2Fb%2C/c");
        check(Some("/p/**"), "/p//a///b//", "/a///b//");
        check(Some("/p/q/**"), "/p///q", "");
        check(Some("/p/*"), "/p//", "/");
        check(None, "/a//b", "/a//b");
    }

    #[test]
    fn a_redirect_says_no_more_than_it_must() {
        let as_sent = Redirect {
            status: 302,
            scheme: None,
            host: None,
            port: None,
            path: None,
            strip_query: false,
        };
        let pattern = PathMatch::parse("/a/*").unwrap();
        let check = |redirect: Redirect, host: &str, expected: Option<&str>| {
            let asked = Asked {
                pattern: Some(&pattern),
                host,
                path: "/a/b,c",
                sent_path: "/a/b%2Cc",
                query: "?q=1",
            };
            let got = location(&redirect, &asked);
            assert_eq!(got.as_deref(), expected, "{redirect:?} {host}");
        };
        let scheme = Redirect {
            scheme: Some(Scheme::Https),
            ..as_sent.clone()
        };
        check(scheme.clone(), "x.org", Some("https://x.org/a/b%2Cc?q=1"));
        check(
            scheme.clone(),
            "x.org:8080",
            Some("https://x.org/a/b%2Cc?q=1"),
        );
        check(
            scheme.clone(),
            "[::1]:80",
            Some("https://[::1]/a/b%2Cc?q=1"),
        );
        check(scheme.clone(), "[::1]", Some("https://[::1]/a/b%2Cc?q=1"));
        check(scheme.clone(), "", None);
        let port = Redirect {
            port: Some(8443),
            ..scheme
        };
        check(port, "x.org:80", Some("https://x.org:8443/a/b%2Cc?q=1"));
        let host = Redirect {
            host: Some("y.org".to_owned()),
            ..as_sent.clone()
        };
        check(host.clone(), "x.org:8080", Some("//y.org/a/b%2Cc?q=1"));
        let stripped = Redirect {
            strip_query: true,
            ..host
        };
        check(stripped, "", Some("//y.org/a/b%2Cc"));
        let path = |path| Redirect {
            path: Some(path),
            ..as_sent.clone()
        };
        let whole = path(NewPath::Whole("/z".to_owned()));
        check(whole, "x.org", Some("/z?q=1"));
        let prefix = path(NewPath::Prefix("/".to_owned()));
        check(prefix, "", Some("/b%2Cc?q=1"));
    }

    proptest! {
        #[test]
        fn a_normal_path_stays_normal(
            folder in "(/[a-c.]{1,3}){0,2}",
            below in "(/[a-c.;%/]{0,3}){0,3}",
            prefix in "(/[a-c.]{1,3}){0,2}/?",
        ) {
            let path = format!("{folder}/{below}");
            let (Ok(path), Ok(prefix)) = (normalise(path.as_bytes()), normalise(prefix.as_bytes())) else {
                return Ok(());
            };
            let (path, prefix) = (String::from_utf8_lossy(&path), String::from_utf8_lossy(&prefix));
            let pattern = PathMatch::parse(&format!("{folder}/*")).unwrap();
            prop_assume!(pattern.matches(&path));
            let made = with_prefix(behind(Some(&pattern), &path), &prefix);
            prop_assert_eq!(&*normalise(made.as_bytes()).expect("it is a path"), made.as_bytes());
            prop_assert!(made.starts_with(&*prefix) || made.starts_with(prefix.trim_end_matches('/')));
        }
    }
}
