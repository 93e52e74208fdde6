//! Which route serves a request: by host, path, method and fields; the first match wins. Sees only normalised paths, so
//! that no spelling of a path walks around a route's policy. Must not know what a route then does.

use crate::config::matches::Match;

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
pub fn find<'a>(
    routes: impl IntoIterator<Item = &'a Match>,
    request: &Request<'_>,
) -> Option<usize> {
    let host = request.host_name();
    routes.into_iter().position(|route| {
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

impl<'a> Request<'a> {
    /// Host without its port and trailing dot (RFC 9110 section 7.2); an IPv6 literal keeps its brackets.
    pub fn host_name(&self) -> &'a str {
        let end = match self.host.rfind(']') {
            Some(bracket) => bracket + 1,
            None => self.host.rfind(':').unwrap_or(self.host.len()),
        };
        let name = &self.host[..end];
        name.strip_suffix('.').unwrap_or(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::matches::{HostMatch, PathMatch};

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
}
