//! Which route serves a request: by host, path, method and fields; the first match wins. Sees only normalised paths, so
//! that no spelling of a path walks around a route's policy. Must not know what a route then does.
//!
//! Routes are found by hashes of their host and path patterns, not one after the other, so that ten thousand of them cost
//! a request no more than ten. Routes that differ only in methods or fields are still tried in their order.

use std::borrow::Cow;
use std::hash::{Hash, Hasher};

use hashbrown::{Equivalent, HashMap};

use crate::config::matches::{HostMatch, Match, PathMatch, literal};
use crate::http1::head::{Fields, values, without_port};

/// What routing looks at in a request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// As sent in Host; letter case, a port and a trailing dot do not count.
    pub host: &'a str,
    /// Normalised, without the query.
    pub path: &'a str,
    pub method: &'a str,
    /// In the order sent, as places in `buffer`.
    pub fields: &'a Fields,
    pub buffer: &'a [u8],
}

/// Routes, by what they match. Made once for a plan; a search allocates nothing.
#[derive(Debug, Default)]
pub struct Index {
    hosts: HashMap<Name, Paths>,
    /// Below a name; the key begins with its dot.
    below: HashMap<Name, Paths>,
    /// The most dots in a key of `below`: a host has no more suffixes worth a look, however many its dots.
    most_dots: usize,
    any: Paths,
    /// Whether some route is for some methods alone.
    asks_for_methods: bool,
}

/// The routes of one host pattern.
#[derive(Debug, Default)]
struct Paths {
    as_spelt: Patterns<Box<str>>,
    /// Whatever the case; few have any.
    folded: Option<Box<Patterns<Name>>>,
    any: Vec<Candidate>,
}

/// Routes by their path patterns. One that is for a path and all below it stands in both maps.
#[derive(Debug)]
struct Patterns<K> {
    exact: HashMap<K, Vec<Candidate>>,
    /// Below a folder; the key ends with its slash.
    below: HashMap<K, Vec<Candidate>>,
    /// The most slashes in a key of `below`.
    most_slashes: usize,
}

/// A route whose host and path match, and what else it asks for. Candidates stand in the order of their routes.
#[derive(Debug, Clone)]
struct Candidate {
    route: usize,
    methods: Vec<String>,
    headers: Vec<(String, String)>,
}

impl Index {
    /// Indexes routes that are given in their order.
    pub fn new<'m>(routes: impl IntoIterator<Item = &'m Match>) -> Index {
        let mut index = Index::default();
        for (route, matches) in routes.into_iter().enumerate() {
            let paths = match &matches.host {
                Some(HostMatch::Exact(name)) => index.hosts.entry(Name::new(name)).or_default(),
                Some(HostMatch::Below(suffix)) => {
                    index.most_dots = index.most_dots.max(suffix.matches('.').count());
                    index.below.entry(Name::new(suffix)).or_default()
                }
                None => &mut index.any,
            };
            let candidate = Candidate {
                route,
                methods: matches.all_methods().map(str::to_owned).collect(),
                headers: matches.headers.clone(),
            };
            index.asks_for_methods |= !candidate.methods.is_empty();
            match &matches.path {
                None => paths.any.push(candidate),
                Some(path) if matches.ignore_case => {
                    let folded = paths.folded.get_or_insert_default();
                    folded.put(path, candidate, Name::new);
                }
                Some(path) => paths.as_spelt.put(path, candidate, |path| path.into()),
            }
        }
        index
    }

    /// Whether requests that differ in their method alone may have several routes.
    pub fn asks_for_methods(&self) -> bool {
        self.asks_for_methods
    }

    /// The index of the first route that serves `request`.
    pub fn find(&self, request: &Request<'_>) -> Option<usize> {
        let mut first = First(None);
        if !self.hosts.is_empty() || !self.below.is_empty() {
            self.by_host(request, &mut first);
        }
        self.any.search(request, &mut first);
        first.0
    }

    fn by_host(&self, request: &Request<'_>, first: &mut First) {
        let host = request.host_name();
        let host = &*host;
        if let Some(paths) = self.hosts.get(&Folded(host)) {
            paths.search(request, first);
        }
        let dots = host.rmatch_indices('.').take(self.most_dots);
        // A suffix stands below nothing when it is the whole host.
        for (dot, _) in dots.filter(|(dot, _)| *dot > 0) {
            if let Some(paths) = self.below.get(&Folded(&host[dot..])) {
                paths.search(request, first);
            }
        }
    }
}

impl Paths {
    fn search(&self, request: &Request<'_>, first: &mut First) {
        self.as_spelt.search(request, Spelt, first);
        if let Some(folded) = &self.folded {
            folded.search(request, Folded, first);
        }
        first.among(&self.any, request);
    }
}

impl<K: Hash + Eq> Patterns<K> {
    fn put(&mut self, pattern: &PathMatch, candidate: Candidate, key: impl Fn(&str) -> K) {
        let (exact, below) = match pattern {
            PathMatch::Exact(path) => (Some(path), None),
            PathMatch::Below(folder) => (None, Some(folder.clone())),
            PathMatch::Tree(path) => (Some(path), Some(format!("{path}/"))),
        };
        if let Some(path) = exact {
            let candidates = self.exact.entry(key(path)).or_default();
            candidates.push(candidate.clone());
        }
        if let Some(folder) = below {
            self.most_slashes = self.most_slashes.max(folder.matches('/').count());
            self.below.entry(key(&folder)).or_default().push(candidate);
        }
    }

    fn search<'p, Q: Hash + Equivalent<K>>(
        &self,
        request: &Request<'p>,
        as_key: impl Fn(&'p str) -> Q,
        first: &mut First,
    ) {
        let path = request.path;
        if let Some(candidates) = self.exact.get(&as_key(path)) {
            first.among(candidates, request);
        }
        for (slash, _) in path.match_indices('/').take(self.most_slashes) {
            if let Some(candidates) = self.below.get(&as_key(&path[..=slash])) {
                first.among(candidates, request);
            }
        }
    }
}

impl<K> Default for Patterns<K> {
    fn default() -> Patterns<K> {
        Patterns {
            exact: HashMap::default(),
            below: HashMap::default(),
            most_slashes: 0,
        }
    }
}

/// The first route found so far.
struct First(Option<usize>);

impl First {
    fn among(&mut self, candidates: &[Candidate], request: &Request<'_>) {
        let earlier = candidates
            .iter()
            .take_while(|candidate| self.0.is_none_or(|route| candidate.route < route));
        let found = earlier
            .map(|candidate| candidate.serves(request).then_some(candidate.route))
            .find(Option::is_some);
        self.0 = found.flatten().or(self.0);
    }
}

impl Candidate {
    fn serves(&self, request: &Request<'_>) -> bool {
        (self.methods.is_empty() || self.methods.iter().any(|method| method == request.method))
            && self.headers.iter().all(|(name, value)| {
                values(request.buffer, request.fields, name).any(|sent| sent == value.as_bytes())
            })
    }
}

/// A text looked up as it is spelt.
#[derive(Hash)]
struct Spelt<'a>(&'a str);

impl Equivalent<Box<str>> for Spelt<'_> {
    fn equivalent(&self, text: &Box<str>) -> bool {
        *self.0 == **text
    }
}

/// A host name, the end of one, or a path, in lower case.
#[derive(Debug, PartialEq, Eq)]
struct Name(Box<str>);

/// A [`Name`] as a client spells it, looked up without a copy.
struct Folded<'a>(&'a str);

impl Name {
    fn new(text: &str) -> Name {
        Name(text.to_ascii_lowercase().into())
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Folded(&self.0).hash(state);
    }
}

impl Hash for Folded<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for byte in self.0.bytes() {
            state.write_u8(byte.to_ascii_lowercase());
        }
    }
}

impl Equivalent<Name> for Folded<'_> {
    fn equivalent(&self, name: &Name) -> bool {
        self.0.eq_ignore_ascii_case(&name.0)
    }
}

impl<'a> Request<'a> {
    /// Host without its port and trailing dot (RFC 9110 section 7.2); an IPv6 literal keeps its brackets, and has one spelling.
    pub fn host_name(&self) -> Cow<'a, str> {
        let name = without_port(self.host);
        match literal(name) {
            Some(literal) => literal.into(),
            None => name.strip_suffix('.').unwrap_or(name).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    /// What the index must agree with: each route asked, one after the other.
    fn scan(routes: &[Match], request: &Request<'_>) -> Option<usize> {
        let host = request.host_name();
        routes.iter().position(|route| {
            let rest = Candidate {
                route: 0,
                methods: route.all_methods().map(str::to_owned).collect(),
                headers: route.headers.clone(),
            };
            route.path.iter().all(|path| match route.ignore_case {
                false => path.matches(request.path),
                true => path.folded().matches(&request.path.to_ascii_lowercase()),
            }) && route.host.iter().all(|wanted| wanted.matches(&host))
                && rest.serves(request)
        })
    }

    fn find(routes: &[Match], request: &Request<'_>) -> Option<usize> {
        let found = Index::new(routes).find(request);
        assert_eq!(found, scan(routes, request), "{routes:?} {request:?}");
        found
    }

    fn serves(host: &str, path: &str, request_host: &str, request_path: &str) -> bool {
        serves_case(host, path, false, request_host, request_path)
    }

    fn serves_case(
        host: &str,
        path: &str,
        ignore_case: bool,
        request_host: &str,
        request_path: &str,
    ) -> bool {
        let route = Match {
            host: Some(HostMatch::parse(host).unwrap()),
            path: Some(PathMatch::parse(path).unwrap()),
            ignore_case,
            ..Match::default()
        };
        let request = Request {
            host: request_host,
            path: request_path,
            method: "GET",
            fields: &[],
            buffer: b"",
        };
        find(&[route], &request).is_some()
    }

    #[test]
    fn host_matches_without_case_port_or_trailing_dot() {
        assert!(serves("api.example.com", "/*", "API.example.com:8080", "/"));
        assert!(serves("api.example.com", "/*", "api.example.com.", "/"));
        assert!(serves("[::1]", "/*", "[::1]:80", "/"));
        // However an address is spelt.
        assert!(serves("[::1]", "/*", "[0:0:0:0:0:0:0:1]:80", "/"));
        assert!(serves("[0::FE80:0:1]", "/*", "[0:0:0:0:0:fe80::1]", "/"));
        assert!(serves("[::ffff:10.0.0.1]", "/*", "[::FFFF:a00:1]", "/"));
        assert!(!serves("[::ffff:10.0.0.1]", "/*", "10.0.0.1", "/"));
        assert!(serves("*.example.com", "/*", "a.b.example.com", "/"));
        assert!(!serves("*.example.com", "/*", "example.com", "/"));
        assert!(!serves("*.example.com", "/*", ".example.com", "/"));
        assert!(!serves("*.example.com", "/*", "badexample.com", "/"));
    }

    /// As nginx's `limit_except` and most frameworks have it.
    #[test]
    fn who_takes_get_takes_head() {
        let of = |methods: &[&str]| Match {
            methods: methods.iter().map(|method| (*method).to_owned()).collect(),
            ..Match::default()
        };
        let check = |routes: &[&[&str]], method: &str, expected: Option<usize>| {
            let routes: Vec<_> = routes.iter().map(|methods| of(methods)).collect();
            let request = Request {
                host: "x",
                path: "/",
                method,
                fields: &[],
                buffer: b"",
            };
            assert_eq!(find(&routes, &request), expected, "{routes:?} {method}");
        };
        check(&[&["POST", "GET"]], "HEAD", Some(0));
        check(&[&["GET"], &["HEAD"]], "HEAD", Some(0));
        check(&[&["HEAD"], &["GET"]], "HEAD", Some(0));
        check(&[&["HEAD"]], "GET", None);
        check(&[&["GET"]], "OPTIONS", None);
        check(&[&["POST"]], "HEAD", None);
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
    fn a_tree_is_a_path_and_all_below_it() {
        for path in ["/pay", "/pay/", "/pay/a/b"] {
            assert!(serves("x", "/pay/**", "x", path), "{path}");
        }
        for path in ["/", "/payroll", "/PAY", "/a/pay"] {
            assert!(!serves("x", "/pay/**", "x", path), "{path}");
        }
        assert!(serves("x", "/**", "x", "/") && serves("x", "/**", "x", "/a"));
    }

    #[test]
    fn case_counts_unless_a_route_ignores_it() {
        for (pattern, path) in [("/Pay", "/pAY"), ("/pay/*", "/PAY/a"), ("/pay/**", "/Pay")] {
            assert!(!serves("x", pattern, "x", path), "{pattern} {path}");
            assert!(
                serves_case("x", pattern, true, "x", path),
                "{pattern} {path}"
            );
        }
        assert!(!serves_case("x", "/pay", true, "x", "/pays"));
        // Only letters have a case: these differ in the same bit.
        assert!(!serves_case("x", "/a@", true, "x", "/a`"));
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
        let at = |routes: &[Match], method, beta: &[(&str, &str)]| {
            let (buffer, fields) = places(beta);
            find(
                routes,
                &Request {
                    host: "x",
                    path: "/",
                    method,
                    fields: &fields,
                    buffer: &buffer,
                },
            )
        };
        assert_eq!(at(&routes, "POST", &[("X-Beta", "1")]), Some(0));
        assert_eq!(at(&routes, "GET", &[("X-Beta", "1")]), Some(1));
        assert_eq!(at(&routes, "GET", &[("X-Beta", "2")]), Some(2));
        assert_eq!(at(&routes[..2], "GET", &[]), None);
    }

    type Places = Vec<(Range<usize>, Range<usize>)>;

    /// Fields as they stand in a head.
    fn places(fields: &[(&str, &str)]) -> (Vec<u8>, Places) {
        let mut buffer = Vec::new();
        let mut put = |text: &str| {
            let start = buffer.len();
            buffer.extend_from_slice(text.as_bytes());
            start..buffer.len()
        };
        let fields = fields.iter().map(|(name, value)| (put(name), put(value)));
        let fields = fields.collect();
        (buffer, fields)
    }

    /// Few pieces, so that patterns and requests often meet; with the names that are hard to tell apart.
    fn route() -> impl Strategy<Value = Match> {
        let host = select(vec![
            "a.b", "*.b", "*.a.b", "b", "*.a.a.b", "[::1]", "*.c", "A.B",
        ]);
        let path = vec(select(vec!["a", "b", "ab", "A"]), 0..4);
        let path = (path, select(vec!["", "/", "/*", "/**"]))
            .prop_map(|(parts, end)| format!("/{}{end}", parts.join("/")).replace("//", "/"));
        let headers = vec(
            (
                Just("x-a".to_owned()),
                select(vec!["1".to_owned(), "2".to_owned()]),
            ),
            0..2,
        );
        let methods = vec(select(vec!["GET".to_owned(), "PUT".to_owned()]), 0..2);
        (
            option::of(host),
            option::of(path),
            any::<bool>(),
            methods,
            headers,
        )
            .prop_map(|(host, path, ignore_case, methods, headers)| Match {
                host: host.map(|host| HostMatch::parse(host).unwrap()),
                path: path.map(|path| PathMatch::parse(&path).unwrap()),
                ignore_case,
                methods,
                headers,
            })
    }

    proptest! {
        #[test]
        fn the_index_finds_what_a_scan_finds(
            routes in vec(route(), 0..30),
            host in "(A|a|b|c|\\.){0,3}(\\.b|\\.a\\.b)?(:80|\\.)?",
            path in "(/(a|b|ab|A|B)){0,4}/?",
            method in select(vec!["GET", "PUT", "POST"]),
            fields in vec((select(vec!["X-A", "x-b"]), select(vec!["1", "2"])), 0..3),
        ) {
            let (buffer, fields) = places(&fields);
            let request = Request { host: &host, path: &path, method, fields: &fields, buffer: &buffer };
            find(&routes, &request);
        }
    }
}
