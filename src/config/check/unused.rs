//! What of a file is without effect: names that nothing uses, routes that no request reaches. A policy that is written and not
//! enforced is hardly meant.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::Checker;
use super::places::Places;
use super::upstreams::SHORT_UPSTREAM;
use crate::config::audit::Level;
use crate::config::matches::Match;
use crate::config::rewrite::{Scheme, To};
use crate::config::yaml::{self, At, Position};
use crate::config::{Config, Route};

/// What has a name by which others use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Limit,
    Breaker,
    Sessions,
    Upstream,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Limit => "limit",
            Kind::Breaker => "circuit breaker",
            Kind::Sessions => "sessions",
            Kind::Upstream => "upstream",
        })
    }
}

/// An entry with a name, and where it stands.
pub(super) struct Named {
    kind: Kind,
    name: String,
    place: Position,
}

/// Where a route stands in the file.
pub(super) struct RouteAt {
    pub(super) place: Position,
    /// Whether its `match` says if case counts.
    pub(super) says_case: bool,
}

impl Checker {
    /// Notes where the entries of a section stand.
    pub(super) fn name<T>(&mut self, kind: Kind, section: &BTreeMap<String, At<T>>) {
        self.named.extend(section.iter().map(|(key, at)| {
            // What would be its value is not shown.
            let name = yaml::without_value(key).filter(|_| at.value.is_none());
            Named {
                kind,
                name: name.unwrap_or(key).to_owned(),
                place: at.place.clone(),
            }
        }));
    }

    /// Likewise, of the upstream that the short form makes: beside `routes` it gets no request that none of them sends there.
    pub(super) fn name_short(&mut self, upstream: Option<&At<String>>) {
        self.named.extend(upstream.map(|at| Named {
            kind: Kind::Upstream,
            name: SHORT_UPSTREAM.to_owned(),
            place: at.place.clone(),
        }));
    }

    /// Of the entries of a kind, wrong ones and those of a short form among them.
    pub(super) fn names(&self, kind: Kind) -> BTreeSet<&str> {
        let read: Vec<&String> = match kind {
            Kind::Limit => self.limits.keys().collect(),
            Kind::Breaker => self.breakers.keys().collect(),
            Kind::Sessions => self.sessions.keys().collect(),
            Kind::Upstream => self.upstreams.keys().collect(),
        };
        let written = self.named.iter().filter(|entry| entry.kind == kind);
        let written = written.map(|entry| entry.name.as_str());
        read.into_iter()
            .map(String::as_str)
            .chain(written)
            .collect()
    }

    pub(super) fn warn_of_unused(&mut self, config: &Config) {
        let used = Used::by(config);
        for entry in std::mem::take(&mut self.named) {
            let name = &entry.name;
            let is_short = entry.place.path == SHORT_UPSTREAM;
            // A list without routes is warned of already.
            let is_told = is_short && config.routes.is_empty();
            if is_told || used.of(entry.kind).contains(name.as_str()) {
                continue;
            }
            let message = match entry.kind {
                Kind::Upstream if is_short => {
                    "no route names it, so that no request goes there, and what no route takes is answered with 404: add \"- upstream: upstream\" as the last route, or take it out".to_owned()
                }
                Kind::Limit => format!(
                    "no route names it, so that it limits nothing: add it to a route, as in {{upstream: NAME, rate_limits: [{name}]}}, or take it out"
                ),
                Kind::Breaker => format!(
                    "no upstream names it, so that it breaks nothing: add \"circuit_breaker: {name}\" to one, or take it out"
                ),
                Kind::Sessions => format!(
                    "no route names it, so that no session is asked for: add \"session: {{use: {name}}}\" to one, or take it out"
                ),
                Kind::Upstream => format!(
                    "no route names it, so that no request goes there: add \"upstream: {name}\" to one, or take it out"
                ),
            };
            self.warn(&entry.place, message);
        }
        for (name, place) in std::mem::take(&mut self.trusted) {
            if used.upstreams.contains(name.as_str()) && !used.asked.contains(name.as_str()) {
                let message = "no route to it has a session, so that its responses start and end none: add \"session: {use: NAME, require: false}\" to the route of its log-in, or take this out";
                self.warn(&place, message);
            }
        }
        let reached = self.warn_of_unreached(&config.routes);
        self.warn_of_ways_round(config, &reached);
        self.warn_of_round_redirects(config);
        let keeps = |route: &Route| matches!(route.audit, Level::Headers);
        if let Some(place) = self.captures_at.take()
            && !config.routes.iter().any(keeps)
        {
            let message = "no request is kept with its headers, since no level is headers: add \"level: headers\" to the audit, or \"audit: headers\" to a route";
            self.warn(&place, message);
        }
    }

    /// Says each redirect to HTTPS that clients of a listener with TLS get as well: it sends them to where they are.
    fn warn_of_round_redirects(&mut self, config: &Config) {
        if !config
            .listeners
            .iter()
            .any(|listener| listener.tls.is_some())
        {
            return;
        }
        let goes_round = |route: &Route| match &route.to {
            To::Redirect(to) => {
                to.scheme == Some(Scheme::Https)
                    && to.host.is_none()
                    && to.port.is_none()
                    && to.path.is_none()
                    && route.matches.headers.is_empty()
            }
            To::Upstream(_) | To::Reply(_) => false,
        };
        let round = config
            .routes
            .iter()
            .zip(&self.routes_at)
            .filter(|(route, _)| goes_round(route));
        let places: Vec<_> = round.map(|(_, at)| at.place.child("redirect")).collect();
        for place in places {
            let message = "clients of the listener with tls are sent to where they are, again and again: routes are of all listeners, so redirect from HTTP by a weir of its own";
            self.warn(&place, message);
        }
    }

    /// Says each route all of whose requests an earlier one takes; returns the others.
    fn warn_of_unreached(&mut self, routes: &[Route]) -> Places {
        let mut earlier = Places::default();
        let mut said = Vec::new();
        for (index, (route, at)) in routes.iter().zip(&self.routes_at).enumerate() {
            let mut candidates = earlier.as_wide(&route.matches).into_iter();
            let taker = candidates.find(|taker| takes_all(&routes[*taker].matches, &route.matches));
            let Some(taker) = taker else {
                earlier.put(&route.matches, index);
                continue;
            };
            let taker = &self.routes_at[taker].place;
            let message = format!(
                "no request reaches it: {}, at line {}, takes all of them before; put this one first, or narrow that one",
                taker.path, taker.line
            );
            said.push((at.place.clone(), message));
        }
        for (place, message) in said {
            self.warn(&place, message);
        }
        earlier
    }
}

/// Whether `earlier`, whose host and path are as wide, takes every request that is for `later`.
fn takes_all(earlier: &Match, later: &Match) -> bool {
    let methods = earlier.methods.is_empty()
        || (!later.methods.is_empty()
            && later
                .all_methods()
                .all(|method| earlier.all_methods().any(|other| other == method)));
    methods
        && earlier
            .headers
            .iter()
            .all(|header| later.headers.contains(header))
}

/// The names that something uses.
struct Used<'c> {
    limits: BTreeSet<&'c str>,
    breakers: BTreeSet<&'c str>,
    sessions: BTreeSet<&'c str>,
    upstreams: BTreeSet<&'c str>,
    /// The upstreams of routes with sessions.
    asked: BTreeSet<&'c str>,
}

impl<'c> Used<'c> {
    fn by(config: &'c Config) -> Used<'c> {
        let routes = &config.routes;
        let limits = routes
            .iter()
            .flat_map(|route| route.limits.iter().chain(&route.session_limits));
        let breakers = config
            .upstreams
            .iter()
            .filter_map(|upstream| upstream.circuit_breaker.as_ref());
        let sessions = routes.iter().filter_map(|route| route.session.as_ref());
        let upstreams = routes.iter().filter_map(Route::upstream);
        let asked = routes.iter().filter(|route| route.session.is_some());
        let asked = asked.filter_map(Route::upstream);
        let upstream_name = |index: usize| Some(config.upstreams.get(index)?.name.as_str());
        // An index leads nowhere where its name was a mistake.
        Used {
            limits: limits
                .filter_map(|index| Some(config.limits.get(*index)?.name.as_str()))
                .collect(),
            breakers: breakers.map(|breaker| breaker.name.as_str()).collect(),
            sessions: sessions
                .filter_map(|asks| Some(config.sessions.get(asks.sessions)?.name.as_str()))
                .collect(),
            upstreams: upstreams.filter_map(upstream_name).collect(),
            asked: asked.filter_map(upstream_name).collect(),
        }
    }

    fn of(&self, kind: Kind) -> &BTreeSet<&'c str> {
        match kind {
            Kind::Limit => &self.limits,
            Kind::Breaker => &self.breakers,
            Kind::Sessions => &self.sessions,
            Kind::Upstream => &self.upstreams,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;

    fn warned(text: &str) -> Vec<String> {
        fixture::warned(&format!("listen: 127.0.0.1:1\n{text}"))
    }

    #[test]
    fn names_that_nothing_uses_are_warned_of() {
        let said = warned(
            "upstream: http://x:1\nrate_limits:\n  per_client: {limit: 1/s, by: client.ip}\n\
             circuit_breakers:\n  b: {}\nsessions:\n  web: {}\n",
        );
        let expected = [
            "line 4, column 15: rate_limits.per_client: no route names it, so that it limits nothing: add it to a route, as in {upstream: NAME, rate_limits: [per_client]}, or take it out",
            "line 6, column 6: circuit_breakers.b: no upstream names it",
            "line 8, column 8: sessions.web: no route names it",
        ];
        assert_eq!(said.len(), expected.len(), "{said:#?}");
        for (said, expected) in said.iter().zip(expected) {
            assert!(said.starts_with(expected), "{said}");
        }
        let said = warned(
            "upstreams: {a: {endpoints: 'http://x:1'}, b: {endpoints: 'http://x:2'}}\nroutes: [{upstream: a}]\n",
        );
        assert!(
            said.len() == 1 && said[0].contains("upstreams.b: no route names it"),
            "{said:#?}"
        );
        // What no route takes is answered with 404, and goes there no more.
        let said =
            warned("upstream: http://x:1\nroutes: [{match: {path: /a}, reply: {status: 403}}]\n");
        assert!(
            said.len() == 1
                && said[0].starts_with("line 2, column 11: upstream: no route names it"),
            "{said:#?}"
        );
    }

    #[test]
    fn a_redirect_to_where_clients_are_is_warned_of() {
        let file = |address: &str, redirect: &str| {
            let text = format!(
                "listeners: [{{address: '127.0.0.1:2'{address}}}]\nupstream: http://x:1\nroutes: [{{redirect: {redirect}}}, {{upstream: upstream}}]\n"
            );
            let warned = fixture::warned(&text);
            warned.iter().any(|said| said.contains("again and again"))
        };
        let tls = ", tls: {certificates: [{cert: a, key: b}]}";
        assert!(file(tls, "{scheme: https}"));
        assert!(!file("", "{scheme: https}"));
        assert!(!file(tls, "{scheme: https, host: www.example.com}"));
    }

    #[test]
    fn names_that_are_used_are_not() {
        let said = warned(
            "rate_limit: 1/s by client.ip\nupstreams: {a: {endpoints: 'http://x:1', circuit_breaker: b}}\n\
             rate_limits: {c: {limit: 1/s, by: client.ip}, u: {limit: 1/s, by: session.user}}\n\
             circuit_breakers: {b: {}}\nsessions: {web: {}}\n\
             routes: [{upstream: a, session: {use: web}, rate_limits: [c, u]}]\n",
        );
        assert!(said.is_empty(), "{said:#?}");
    }

    #[test]
    fn an_upstream_whose_session_headers_no_route_reads_is_warned_of() {
        let with_routes = |routes: &str| {
            warned(&format!(
                "upstreams: {{a: {{endpoints: 'http://x:1', trust_session_headers: true}}}}\nsessions: {{web: {{}}}}\nroutes: [{routes}]\n"
            ))
        };
        let asked = "{match: {path: /in}, upstream: a, session: {use: web, require: false}}";
        assert!(with_routes(&format!("{asked}, {{upstream: a}}")).is_empty());
        let elsewhere = "{match: {path: /in}, reply: {status: 200}, session: {use: web}}";
        let said = with_routes(&format!("{elsewhere}, {{upstream: a}}"));
        assert!(
            said.len() == 1
                && said[0]
                    .contains("upstreams.a.trust_session_headers: no route to it has a session"),
            "{said:#?}"
        );
    }

    /// Each route is `match`'s content; the numbers are those of the routes that are never reached.
    fn unreached(routes: &[&str], expected: &[usize]) {
        let list = routes
            .iter()
            .map(|route| format!("  - {{match: {{{route}}}, reply: {{status: 200}}}}\n"));
        let list: String = list.collect();
        let said = warned(&format!(
            "upstream: http://x:1\nroutes:\n{list}  - {{match: {{path: /last}}, upstream: upstream}}\n"
        ));
        let numbers = said.iter().map(|said| {
            let (_, behind) = said.split_once("routes[").unwrap();
            behind.split_once(']').unwrap().0.parse().unwrap()
        });
        let numbers: Vec<usize> = numbers.filter(|number| *number < routes.len()).collect();
        assert_eq!(numbers, expected, "{routes:?}: {said:#?}");
    }

    #[test]
    fn a_route_behind_one_that_takes_all_its_requests_is_warned_of() {
        unreached(&["", "path: /admin"], &[1]);
        unreached(&["path: /*", "path: /admin/*"], &[1]);
        unreached(&["path: /a", "path: /a", "path: /a"], &[1, 2]);
        unreached(
            &["path: /a/*", "path: /a/b/*", "path: /a", "path: /a/"],
            &[1, 3],
        );
        unreached(
            &[
                "path: /a/**",
                "path: /a",
                "path: /a/",
                "path: /a/b/**",
                "path: /ab",
            ],
            &[1, 2, 3],
        );
        unreached(
            &["path: /a/*", "path: /a/**", "path: /**", "path: /b"],
            &[3],
        );
        unreached(
            &[
                "path: /A, ignore_case: true",
                "path: /a",
                "path: /a, ignore_case: true",
                "path: /b",
                "path: /b, ignore_case: true",
            ],
            &[1, 2],
        );
        unreached(&["path: /1/*", "path: /1/a, ignore_case: true"], &[1]);
        unreached(&["path: /admin", ""], &[]);
        unreached(&["path: /pay/*", "path: /payroll"], &[]);
        unreached(
            &[
                "host: '*.x.org'",
                "host: a.b.x.org",
                "host: x.org",
                "host: '*.b.x.org'",
            ],
            &[1, 3],
        );
        unreached(&["host: x.org", "path: /a", "host: X.org, path: /a"], &[2]);
        unreached(
            &[
                "methods: [GET, POST]",
                "methods: [GET]",
                "methods: [GET, PUT]",
                "",
            ],
            &[1],
        );
        unreached(&["methods: [GET]", "methods: [HEAD]", ""], &[1]);
        unreached(
            &[
                "headers: {a: '1'}",
                "headers: {a: '1', b: '2'}",
                "headers: {a: '2'}",
                "",
            ],
            &[1],
        );
    }

    #[test]
    fn the_route_that_takes_the_requests_is_named() {
        let said = warned(
            "upstream: http://x:1\nroutes:\n  - upstream: upstream\n  - match: {path: /admin}\n    upstream: upstream\n",
        );
        assert_eq!(
            said,
            [
                "line 5, column 5: routes[1]: no request reaches it: routes[0], at line 4, takes all of them before; put this one first, or narrow that one"
            ]
        );
    }

    #[test]
    fn a_file_with_an_empty_list_of_routes_serves_nothing() {
        let said = warned("upstream: http://x:1\nroutes: []\n");
        assert!(
            said[0].starts_with(
                "line 3, column 9: routes: no route: every request is answered with 404"
            ),
            "{said:#?}"
        );
    }

    #[test]
    fn ten_thousand_routes_of_as_many_hosts_are_looked_at_in_seconds_even_unoptimised() {
        let mut text = "upstream: http://x:1\nroutes:\n".to_owned();
        for index in 0..10_000 {
            text.push_str(&format!(
                "  - {{match: {{host: h{index}.x.org, path: /a/b}}, upstream: upstream}}\n"
            ));
        }
        assert!(warned(&text).is_empty());
    }
}
