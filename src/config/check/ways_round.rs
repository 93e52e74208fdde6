//! Routes whose session or limits a client gets round by another spelling of the path: one that a later route takes, without
//! them, to the same upstream. Many apps serve `/login`, `/login/` and `/LOGIN` alike.

use std::collections::BTreeSet;

use super::Checker;
use super::places::Places;
use crate::config::limits::Mode;
use crate::config::matches::{Match, PathMatch};
use crate::config::{Config, Route};

/// A spelling that many apps take for a path of the route.
struct Spelling {
    path: String,
    is_case: bool,
}

impl Checker {
    /// `places` has all routes that requests reach.
    pub(super) fn warn_of_ways_round(&mut self, config: &Config, places: &Places) {
        let mut said = Vec::new();
        for (route, at) in config.routes.iter().zip(&self.routes_at) {
            let Some(pattern) = route.matches.path.as_ref() else {
                continue;
            };
            let counts = |spelling: &Spelling| !(spelling.is_case && at.says_case);
            let ways = spellings(pattern).into_iter().filter(counts);
            let ways = ways.filter_map(|way| {
                let taker = taker(config, places, route, &way.path)?;
                Some((way, taker))
            });
            let ways: Vec<_> = ways.collect();
            let Some((_, (taker, lacks))) = ways.first() else {
                continue;
            };
            let ways = ways.iter().filter(|(_, (other, _))| other == taker);
            let ways: Vec<_> = ways.map(|(way, _)| way).collect();
            let paths: Vec<_> = ways.iter().map(|way| way.path.as_str()).collect();
            let mut mends = Vec::new();
            if ways.iter().any(|way| !way.is_case) {
                mends.push(format!("\"path: {}\"", tree(pattern)));
            }
            if ways.iter().any(|way| way.is_case) {
                mends.push(
                    "\"ignore_case: true\" (or false, where the app's paths have a case)"
                        .to_owned(),
                );
            }
            let verb = if paths.len() == 1 { "goes" } else { "go" };
            let taker = &self.routes_at[*taker].place;
            let message = format!(
                "{}, which many apps take for the same, {verb} to {}, at line {}, without {}: write {}",
                paths.join(" and "),
                taker.path,
                taker.line,
                lacks.join(", "),
                mends.join(" and ")
            );
            said.push((at.place.clone(), message));
        }
        for (place, message) in said {
            self.warn(&place, message);
        }
    }
}

/// The first route that takes `path` to the upstream of `route` by a method that `route` is for, if it lacks anything of it, and
/// what.
fn taker(
    config: &Config,
    places: &Places,
    route: &Route,
    path: &str,
) -> Option<(usize, Vec<String>)> {
    let asked = Match {
        host: route.matches.host.clone(),
        path: Some(PathMatch::Exact(path.to_owned())),
        ..Match::default()
    };
    let wanted: BTreeSet<_> = route.matches.all_methods().collect();
    let mut taken = BTreeSet::new();
    for index in places.as_wide(&asked) {
        let taker = &config.routes[index];
        // Those that ask for more fields take some of the requests alone.
        let has_field = |field| route.matches.headers.contains(field);
        if !taker.matches.headers.iter().all(has_field) {
            continue;
        }
        let methods: BTreeSet<_> = taker.matches.all_methods().collect();
        let is_new = |method: &&str| {
            !taken.contains(method) && (wanted.is_empty() || wanted.contains(method))
        };
        if !methods.is_empty() && !methods.iter().any(is_new) {
            continue;
        }
        let lacks = lacking(config, route, taker);
        if route.upstream().is_some() && taker.upstream() == route.upstream() && !lacks.is_empty() {
            return Some((index, lacks));
        }
        if methods.is_empty() {
            return None;
        }
        taken.extend(methods);
        if !wanted.is_empty() && wanted.is_subset(&taken) {
            return None;
        }
    }
    None
}

/// What of `route` is asked of requests, and not by `other`.
fn lacking(config: &Config, route: &Route, other: &Route) -> Vec<String> {
    let mut lacks = Vec::new();
    if let Some(session) = route.session.as_ref().filter(|session| session.require) {
        let same = other.session.as_ref().filter(|other| {
            let has = |(name, value)| other.claims.get(name) == Some(value);
            other.require && other.sessions == session.sessions && session.claims.iter().all(has)
        });
        if same.is_none() {
            lacks.push("its session".to_owned());
        }
    }
    let limits = |route: &Route| -> BTreeSet<usize> {
        let all = route.limits.iter().chain(&route.session_limits);
        all.copied().collect()
    };
    for index in limits(route).difference(&limits(other)) {
        // An index leads nowhere where its name was a mistake.
        let limit = config.limits.get(*index);
        if let Some(limit) = limit.filter(|limit| !matches!(limit.mode, Mode::Disabled)) {
            lacks.push(format!("limit {}", limit.name));
        }
    }
    lacks
}

fn spellings(pattern: &PathMatch) -> Vec<Spelling> {
    let (path, by_slash) = match pattern {
        PathMatch::Exact(path) => match path.strip_suffix('/') {
            Some(bare) => (path, bare.to_owned()),
            None => (path, format!("{path}/")),
        },
        PathMatch::Below(folder) => (folder, folder.trim_end_matches('/').to_owned()),
        PathMatch::Tree(path) => (path, String::new()),
    };
    let by_slash = Some(by_slash).filter(|path| !path.is_empty());
    let by_slash = by_slash.map(|path| Spelling {
        path,
        is_case: false,
    });
    let by_case = other_case(path).map(|path| Spelling {
        path,
        is_case: true,
    });
    by_slash.into_iter().chain(by_case).collect()
}

/// In capitals or, if it is, in small letters; escapes stay. `None`: it has no letters.
fn other_case(path: &str) -> Option<String> {
    let spelt = |change: fn(&char) -> char| {
        let mut escaped = 0;
        let letters = path.chars().map(|letter| {
            if letter == '%' {
                escaped = 3;
            }
            let is_plain = escaped == 0;
            escaped = u8::saturating_sub(escaped, 1);
            if is_plain { change(&letter) } else { letter }
        });
        Some(letters.collect::<String>()).filter(|spelt| spelt != path)
    };
    spelt(char::to_ascii_uppercase).or_else(|| spelt(char::to_ascii_lowercase))
}

/// The pattern that takes a path with and without a slash behind it.
fn tree(pattern: &PathMatch) -> PathMatch {
    match pattern {
        PathMatch::Exact(path) | PathMatch::Below(path) => {
            PathMatch::Tree(path.trim_end_matches('/').to_owned())
        }
        PathMatch::Tree(_) => pattern.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;

    /// Routes in lines of their own, behind upstreams `a` and `b`.
    fn warned(routes: &[&str]) -> Vec<String> {
        let routes = routes.iter().map(|route| format!("  - {{{route}}}\n"));
        let text = format!(
            "listen: 127.0.0.1:1\nsessions: {{web: {{}}, other: {{}}}}\nrate_limits: {{l: {{limit: 1/s, by: client.ip}}, m: {{limit: 2/s, by: client.ip}}}}\nupstreams: {{a: {{endpoints: 'http://x:1'}}, b: {{endpoints: 'http://x:2'}}}}\nroutes:\n{}",
            routes.collect::<String>()
        );
        let said = fixture::warned(&text).into_iter();
        said.filter(|said| said.contains("which many apps"))
            .collect()
    }

    /// The route in front of `rest`, and which spellings of its path are warned of.
    fn check(route: &str, rest: &[&str], expected: &str) {
        let routes: Vec<_> = [&[route], rest].concat();
        let said = warned(&routes);
        let spellings = said.first().map_or("", |said| {
            let said = said.split_once("routes[0]: ").unwrap().1;
            said.split_once(", which").unwrap().0
        });
        assert_eq!(spellings, expected, "{routes:#?} {said:#?}");
    }

    #[test]
    fn a_way_round_is_told_with_where_it_leads_and_its_mend() {
        assert_eq!(
            warned(&[
                "match: {path: /login, methods: [POST]}, upstream: a, rate_limits: [l, m]",
                "match: {path: /in/*}, upstream: a, session: {use: web}, rate_limits: [m]",
                "match: {path: /out/**}, upstream: a, session: {use: web}",
                "upstream: a, rate_limits: [m], session: {use: web, require: false}",
            ]),
            [
                "line 6, column 5: routes[0]: /login/ and /LOGIN, which many apps take for the same, go to routes[3], at line 9, without limit l: write \"path: /login/**\" and \"ignore_case: true\" (or false, where the app's paths have a case)",
                "line 7, column 5: routes[1]: /in and /IN/, which many apps take for the same, go to routes[3], at line 9, without its session: write \"path: /in/**\" and \"ignore_case: true\" (or false, where the app's paths have a case)",
                "line 8, column 5: routes[2]: /OUT, which many apps take for the same, goes to routes[3], at line 9, without its session: write \"ignore_case: true\" (or false, where the app's paths have a case)",
            ]
        );
    }

    #[test]
    fn what_a_pattern_takes_is_no_way_round() {
        let behind = "upstream: a, rate_limits: [l]";
        let of = |matches: &str, expected: &str| {
            let route = format!("match: {{{matches}}}, upstream: a, rate_limits: [l, m]");
            check(&route, &[behind], expected);
        };
        of("path: /x", "/x/ and /X");
        of("path: /x, ignore_case: true", "/x/");
        // Said, so that it is meant.
        of("path: /x, ignore_case: false", "/x/");
        of("path: /X/", "/X and /x/");
        of("path: /x/**", "/X");
        of("path: /x/**, ignore_case: true", "");
        of("path: /x/**, ignore_case: false", "");
        of("path: /1", "/1/");
        of("path: /1%C3%A9/**", "");
        of("path: /", "");
        of("path: /*", "");
        of("methods: [PUT]", "");
        of("host: x.org", "");
    }

    #[test]
    fn only_a_route_to_the_same_upstream_without_the_same_is_a_way_round() {
        let route = "match: {host: a.x.org, path: /1, headers: {h: '1'}, methods: [GET, PUT]}, upstream: a, session: {use: web, claims: {c: 1}}, rate_limits: [l]";
        let same = "upstream: a, session: {use: web, claims: {c: 1, d: 2}}, rate_limits: [m, l]";
        check(route, &[same], "");
        for behind in [
            "upstream: a",
            "upstream: a, rate_limits: [l]",
            "upstream: a, session: {use: web, claims: {c: 1}}",
            "upstream: a, rate_limits: [l], session: {use: web}",
            "upstream: a, rate_limits: [l], session: {use: other, claims: {c: 1}}",
            "upstream: a, match: {host: '*.x.org'}",
            "upstream: a, match: {path: /1/, headers: {h: '1'}}",
            "upstream: a, match: {methods: [PUT]}",
        ] {
            check(route, &[behind, same], "/1/");
        }
        for behind in [
            "upstream: b",
            "reply: {status: 404}",
            "upstream: a, match: {host: b.x.org}",
            "upstream: a, match: {path: /2/*}",
            "upstream: a, match: {headers: {h: '2'}}",
            "upstream: a, match: {methods: [POST]}",
        ] {
            check(route, &[behind, same], "");
        }
        let each =
            ["GET", "PUT"].map(|method| format!("upstream: b, match: {{methods: [{method}]}}"));
        check(route, &[&each[0], &each[1], "upstream: a"], "");
        check(route, &[&each[0], "upstream: a"], "/1/");
        // Who takes GET takes HEAD.
        let head = "match: {path: /1, methods: [HEAD]}, upstream: a, rate_limits: [l]";
        check(head, &["upstream: a, match: {methods: [GET]}"], "/1/");
        check(head, &[&each[0], "upstream: a"], "");
        check(
            "match: {path: /1}, reply: {status: 200}, rate_limits: [l]",
            &["upstream: a"],
            "",
        );
        check(
            "match: {path: /1}, upstream: a, session: {use: web, require: false}",
            &["upstream: a"],
            "",
        );
    }

    #[test]
    fn an_earlier_route_is_a_way_round_as_well() {
        let said = warned(&[
            "match: {path: /1/}, upstream: a",
            "match: {path: /1}, upstream: a, rate_limits: [l]",
        ]);
        assert!(
            said.len() == 1 && said[0].contains("routes[1]: /1/, which"),
            "{said:#?}"
        );
    }
}
