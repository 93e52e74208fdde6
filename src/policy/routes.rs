//! Which route serves a request: by host, path, method and fields; the first match wins. Sees only normalised paths, so
//! that no spelling of a path walks around a route's policy. Must not know what a route then does.

/// What a request must be for a route to serve it. An empty list or a `None` asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// In lower case, without a port; `*.example.com` is any name below it.
    pub host: Option<HostMatch>,
    /// On the normalised path.
    pub path: Option<PathMatch>,
    /// Any of these.
    pub methods: Vec<String>,
    /// All of these: a field name in lower case and its exact value.
    pub headers: Vec<(String, String)>,
}

/// A host name, or all names below one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostMatch {
    Exact(String),
    /// `*.example.com`, kept as `.example.com`; does not match `example.com` itself.
    Below(String),
}

/// A path, or all paths below one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    Exact(String),
    /// `/pay/*`, kept as `/pay/`; matches `/pay/` and all below it, and not `/pay` nor `/payroll`.
    Below(String),
}

/// What routing looks at in a request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// As sent in Host; letter case, a port and a trailing dot do not count.
    pub host: &'a str,
    /// Normalised, without the query.
    pub path: &'a str,
    pub method: &'a str,
    /// Names in any case, in the order sent.
    pub fields: &'a [(&'a str, &'a str)],
}

/// The index of the first of `routes` that serves `request`.
pub fn find(routes: &[Match], request: &Request<'_>) -> Option<usize> {
    let host = host_name(request.host);
    routes.iter().position(|route| {
        route
            .path
            .as_ref()
            .is_none_or(|path| path.matches(request.path))
            && route
                .host
                .as_ref()
                .is_none_or(|wanted| wanted.matches(host))
            && (route.methods.is_empty()
                || route.methods.iter().any(|method| method == request.method))
            && route.headers.iter().all(|(name, value)| {
                request
                    .fields
                    .iter()
                    .any(|(n, v)| n.eq_ignore_ascii_case(name) && v == value)
            })
    })
}

impl HostMatch {
    /// Reads `api.example.com` or `*.example.com`.
    pub fn parse(text: &str) -> Result<HostMatch, String> {
        let (text, below) = match text.strip_prefix('*') {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let name = text.strip_prefix('.').filter(|_| below).unwrap_or(text);
        let is_ipv6 = !below && name.starts_with('[') && name.ends_with(']');
        if name.is_empty()
            || name.contains(['*', '/'])
            || (name.contains(':') && !is_ipv6)
            || (below && !text.starts_with('.'))
        {
            return Err("host must be a name, or \"*.\" and a name, without a port".to_owned());
        }
        let text = text.to_ascii_lowercase();
        Ok(if below {
            HostMatch::Below(text)
        } else {
            HostMatch::Exact(text)
        })
    }

    fn matches(&self, host: &str) -> bool {
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

impl PathMatch {
    /// Reads `/pay` or `/pay/*`.
    pub fn parse(text: &str) -> Result<PathMatch, String> {
        if !text.starts_with('/') {
            return Err(format!("path must begin with \"/\": use \"/{text}\""));
        }
        match text.strip_suffix("/*") {
            Some(below) if !below.contains('*') => Ok(PathMatch::Below(format!("{below}/"))),
            None if !text.contains('*') => Ok(PathMatch::Exact(text.to_owned())),
            _ => Err("\"*\" may stand only at the end, behind a \"/\"".to_owned()),
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(wanted) => path == wanted,
            PathMatch::Below(folder) => path.starts_with(folder.as_str()),
        }
    }
}

/// Host without its port and trailing dot (RFC 9110 section 7.2); an IPv6 literal keeps its brackets.
fn host_name(host: &str) -> &str {
    let end = match host.rfind(']') {
        Some(bracket) => bracket + 1,
        None => host.rfind(':').unwrap_or(host.len()),
    };
    let name = &host[..end];
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serves(host: &str, path: &str, request_host: &str, request_path: &str) -> bool {
        let route = Match {
            host: Some(HostMatch::parse(host).unwrap()),
            path: Some(PathMatch::parse(path).unwrap()),
            ..Match::default()
        };
        let request = Request {
            host: request_host,
            path: request_path,
            method: "GET",
            fields: &[],
        };
        find(&[route], &request).is_some()
    }

    #[test]
    fn host_matches_without_case_port_or_trailing_dot() {
        assert!(serves("api.example.com", "/*", "API.example.com:8080", "/"));
        assert!(serves("api.example.com", "/*", "api.example.com.", "/"));
        assert!(serves("[::1]", "/*", "[::1]:80", "/"));
        assert!(serves("*.example.com", "/*", "a.b.example.com", "/"));
        assert!(!serves("*.example.com", "/*", "example.com", "/"));
        assert!(!serves("*.example.com", "/*", "badexample.com", "/"));
    }

    #[test]
    fn a_prefix_ends_at_a_segment() {
        assert!(serves("x", "/pay/*", "x", "/pay/"));
        assert!(serves("x", "/pay/*", "x", "/pay/a/b"));
        assert!(!serves("x", "/pay/*", "x", "/pay"));
        assert!(!serves("x", "/pay/*", "x", "/payroll"));
        assert!(serves("x", "/pay", "x", "/pay"));
        assert!(!serves("x", "/pay", "x", "/pay/"));
    }

    #[test]
    fn the_first_route_that_matches_wins() {
        let post = Match {
            methods: vec!["POST".into()],
            ..Match::default()
        };
        let beta = Match {
            headers: vec![("x-beta".into(), "1".into())],
            ..Match::default()
        };
        let routes = [post, beta, Match::default()];
        let at = |method, fields| {
            find(
                &routes,
                &Request {
                    host: "x",
                    path: "/",
                    method,
                    fields,
                },
            )
        };
        assert_eq!(at("POST", &[("X-Beta", "1")]), Some(0));
        assert_eq!(at("GET", &[("X-Beta", "1")]), Some(1));
        assert_eq!(at("GET", &[("X-Beta", "2")]), Some(2));
        assert_eq!(
            find(
                &routes[..2],
                &Request {
                    host: "x",
                    path: "/",
                    method: "GET",
                    fields: &[]
                }
            ),
            None
        );
    }

    #[test]
    fn a_pattern_that_could_mislead_is_refused() {
        for host in ["", "*", "*.", "*example.com", "a.*.com", "example.com:80"] {
            assert!(HostMatch::parse(host).is_err(), "{host}");
        }
        for path in ["pay", "/pay*", "/*/x", "/a*/*"] {
            assert!(PathMatch::parse(path).is_err(), "{path}");
        }
    }
}
