//! Sessions, from the file as written to [`Sessions`], and what routes ask of them.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use super::rewrite::{Message, is_weirs};
use super::unused::Kind;
use super::values::{field_name, time};
use super::{Checker, SECOND};
use crate::config::raw;
use crate::config::sessions::{
    Cache, CookieAttributes, Forward, RouteSession, Sessions, Settings, Shared, TokenSource,
    check_cookie,
};
use crate::config::units::TimeLength;
use crate::config::yaml::{At, Position, told};

/// The cookie that holds the token, unless told.
const COOKIE: &str = "sid";
const MAX_SESSIONS: u64 = 1_000_000;
/// [`RouteSession::revalidate_every`], unless told.
const REVALIDATE_EVERY: Duration = Duration::from_secs(30);

impl Checker {
    /// Reads all sessions, for routes to name.
    pub(super) fn sessions(&mut self, raw: BTreeMap<String, At<raw::Sessions>>) -> Vec<Sessions> {
        let mut sessions = Vec::new();
        let mut places = Vec::new();
        for (name, at) in raw {
            if let Some((raw, place)) = at.told() {
                self.sessions.insert(name.clone(), sessions.len());
                sessions.push(self.session_entry(name, raw, &place));
                places.push(place);
            }
        }
        self.warn_of_shared_cookies(&sessions, &places);
        sessions
    }

    /// Of two cookies of a name a browser keeps one, or sends both, which are no token.
    fn warn_of_shared_cookies(&mut self, sessions: &[Sessions], places: &[Position]) {
        for (index, one) in sessions.iter().enumerate() {
            let path = &one.settings.cookie.path;
            for (other, at) in sessions.iter().zip(places).skip(index + 1) {
                let shared = one.settings.sources.iter().find_map(|source| match source {
                    TokenSource::Cookie(name) if other.settings.sources.contains(source) => {
                        Some(name)
                    }
                    TokenSource::Cookie(_) | TokenSource::Bearer | TokenSource::Header(_) => None,
                });
                if let Some(cookie) = shared
                    && meet(path, &other.settings.cookie.path)
                {
                    let message = format!(
                        "on one host its cookie \"{cookie}\" (path {path}) stands in the way of that of sessions.{}, at line {} (path {}): a log-in to one ends or hides the other; give it a name of its own",
                        other.name, at.line, other.settings.cookie.path
                    );
                    self.warn(&places[index], message);
                }
            }
        }
    }

    fn session_entry(&mut self, name: String, raw: raw::Sessions, place: &Position) -> Sessions {
        let sources = match raw.token {
            None => vec![TokenSource::Cookie(COOKIE.to_owned())],
            Some(at) => self.token_sources(at),
        };
        let cookie = cookie(told(raw.cookie).unwrap_or_default());
        for source in &sources {
            if let TokenSource::Cookie(name) = source
                && let Err(error) = check_cookie(name, &cookie)
            {
                self.say(place, format!("cookie \"{name}\": {error}"));
            }
        }
        let forward = match told(raw.forward) {
            None => {
                let [user, session, claims] = Forward::NAMES.map(|name| Some(name.to_owned()));
                Forward {
                    user,
                    session,
                    claims,
                }
            }
            Some(raw) => {
                let mut name = |at: Option<At<String>>| at.and_then(|at| self.read(at, forwarded));
                Forward {
                    user: name(raw.user),
                    session: name(raw.session),
                    claims: name(raw.claims),
                }
            }
        };
        let idle_at = raw.idle_timeout.as_ref().or(raw.absolute_timeout.as_ref());
        let idle_at = idle_at.map(|at| at.place.sibling("idle_timeout"));
        let idle = time(raw.idle_timeout, 30 * 60 * SECOND);
        let absolute = time(raw.absolute_timeout, 12 * 3600 * SECOND);
        for (key, timeout) in [("idle_timeout", idle), ("absolute_timeout", absolute)] {
            if timeout == Duration::ZERO {
                let message = format!("{key} 0s would end every session at once: use 30m");
                self.say(&place.child(key), message);
            }
        }
        if let Some(place) = idle_at.filter(|_| idle > absolute) {
            let message = format!(
                "{} is longer than absolute_timeout, {}, so that it never ends a session: use a shorter one",
                TimeLength(idle),
                TimeLength(absolute)
            );
            self.warn(&place, message);
        }
        let shared = Shared {
            touch_every: self.touch_every(raw.touch_every, idle),
            cache: self.session_cache(told(raw.cache).unwrap_or_default()),
            grace: grace(told(raw.on_redis_loss).unwrap_or_default()),
        };
        let max_per_user = raw.max_per_user.and_then(|at| {
            let max = NonZeroU32::new(at.value?);
            if max.is_none() {
                let message = "a user with no session cannot log in: use 1 or more, or leave it out for any number";
                self.say(&at.place, message);
            }
            max
        });
        let max_sessions =
            self.count_within(raw.max_sessions, MAX_SESSIONS, 1..=u64::from(u32::MAX));
        Sessions {
            name,
            shared,
            settings: Settings {
                sources,
                idle_timeout: idle,
                absolute_timeout: absolute,
                max_per_user,
                on_max: told(raw.on_max).unwrap_or_default(),
                forward,
                cookie,
            },
            max_sessions,
        }
    }

    fn touch_every(&mut self, at: Option<At<TimeLength>>, idle: Duration) -> Duration {
        let half = u64::try_from(idle.as_millis() / 2).unwrap_or(u64::MAX);
        let default = Duration::from_millis(half).min(60 * SECOND);
        let Some((TimeLength(every), place)) = at.and_then(At::told) else {
            return default;
        };
        if every >= idle && !idle.is_zero() {
            let message = format!(
                "{} is not below idle_timeout, {}, so that sessions in use would end: use, for example, {}",
                TimeLength(every),
                TimeLength(idle),
                TimeLength(default)
            );
            self.say(&place, message);
        }
        every
    }

    fn session_cache(&mut self, raw: raw::SessionCache) -> Cache {
        const ENTRIES: usize = 100_000;
        let max_entries = raw.max_entries.map_or(ENTRIES, |at| {
            if at.value == Some(0) {
                let message = "a cache of no entries: use 1 or more, or ttl and negative_ttl 0s to remember nothing";
                self.say(&at.place, message);
            }
            at.value.map_or(ENTRIES, |max| max as usize)
        });
        Cache {
            ttl: time(raw.ttl, 2 * SECOND),
            negative_ttl: time(raw.negative_ttl, SECOND),
            max_entries,
        }
    }

    fn token_sources(&mut self, at: At<Vec<At<raw::TokenSource>>>) -> Vec<TokenSource> {
        let mut sources = Vec::new();
        for (raw, place) in at.value.into_iter().flatten().filter_map(At::told) {
            let source = match (raw.cookie, told(raw.bearer), raw.header) {
                (Some(name), None, None) => name.value.map(TokenSource::Cookie),
                (None, Some(true), None) => Some(TokenSource::Bearer),
                (None, None, Some(At { value, place: at })) => {
                    let place = at.named(place.path);
                    let name = self.read(At { value, place }, field_name);
                    name.map(TokenSource::Header)
                }
                _ => {
                    let message = "use one of {cookie: NAME}, {bearer: true} and {header: NAME}";
                    self.say(&place, message);
                    None
                }
            };
            sources.extend(source);
        }
        if sources.is_empty() {
            let message = "no place to find a token: add one, for example {cookie: sid}";
            self.say(&at.place, message);
        }
        sources
    }

    /// Reads `session` of a route, and what goes with it.
    pub(super) fn route_session(
        &mut self,
        at: Option<At<raw::RouteSession>>,
        revalidate_every: Option<At<TimeLength>>,
    ) -> Option<RouteSession> {
        let has_session = at.is_some();
        let revalidate_every = revalidate_every.map_or(REVALIDATE_EVERY, |at| {
            let told = at.value.map_or(REVALIDATE_EVERY, |span| span.0);
            if !has_session {
                let message = "this route has no session to look at again: add \"session: {use: NAME}\", or leave this out";
                self.say(&at.place, message);
            } else if told.is_zero() {
                let message = "0s would look without end: use, for example, 30s";
                self.say(&at.place, message);
            }
            told
        });
        let at = at?;
        let raw = at.value?;
        let name = raw.uses.value?;
        let claims: BTreeMap<_, _> = raw
            .claims
            .into_iter()
            .filter_map(|(claim, at)| Some((claim, at.value?)))
            .collect();
        let require = told(raw.require);
        if require == Some(false) && !claims.is_empty() {
            let message = "claims need a session: leave out \"require: false\", or the claims";
            self.say(&at.place, message);
        }
        let Some(sessions) = self.sessions.get(&name).copied() else {
            self.say_unknown(Kind::Sessions, &raw.uses.place, &name);
            return None;
        };
        Some(RouteSession {
            sessions,
            require: require.unwrap_or(true),
            claims,
            revalidate_every,
        })
    }

    /// Parts the limits of a route into those that need no session and those that do; the latter need a route that has one.
    pub(super) fn part_limits(
        &mut self,
        place: &Position,
        named: Vec<usize>,
        has_session: bool,
    ) -> (Vec<usize>, Vec<usize>) {
        let (of_session, others): (Vec<_>, Vec<_>) = named
            .into_iter()
            .partition(|limit| self.of_session.contains_key(limit));
        if let (Some(limit), false) = (of_session.first(), has_session) {
            let message = format!(
                "limit \"{}\" counts by the session, and this route has none: add \"session: {{use: NAME}}\"",
                self.of_session[limit]
            );
            self.say_of_file(place, message);
        }
        (others, of_session)
    }
}

fn grace(raw: raw::SessionLoss) -> Duration {
    match told(raw.action) {
        Some(raw::SessionLossAction::Deny) | None => time(raw.grace, 30 * SECOND),
    }
}

fn cookie(raw: raw::Cookie) -> CookieAttributes {
    CookieAttributes {
        secure: told(raw.secure).unwrap_or(true),
        http_only: told(raw.http_only).unwrap_or(true),
        same_site: told(raw.same_site).unwrap_or_default(),
        path: told(raw.path).unwrap_or_else(|| "/".to_owned()),
    }
}

/// A field that tells who asks.
fn forwarded(text: &str) -> Result<String, String> {
    let name = field_name(text)?;
    match is_weirs(name.as_bytes(), Message::Request) {
        true => Err(format!(
            "\"{name}\" has a meaning of its own, of framing or of what weir says: use another, for example X-Auth-User"
        )),
        false => Ok(name),
    }
}

/// Whether a request can have both cookies, by the paths that they are set with (RFC 6265 section 5.1.4).
fn meet(one: &str, other: &str) -> bool {
    let covers = |path: &str, below: &str| {
        let rest = below.strip_prefix(path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || path.ends_with('/'))
    };
    covers(one, other) || covers(other, one)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::fixture;
    use super::*;
    use crate::config::Config;
    use crate::config::sessions::OnMax;

    fn read(text: &str) -> Result<Config, Vec<String>> {
        let text = format!(
            "listen: 127.0.0.1:1\nupstreams: {{app: {{endpoints: ['http://x:1'], trust_session_headers: true}}}}\n{text}"
        );
        fixture::read(&text)
    }

    #[test]
    fn sessions_are_read_with_their_defaults() {
        let config =
            read("sessions: {web: {}}\nroutes: [{upstream: app, session: {use: web}}]\n").unwrap();
        let Settings {
            sources,
            idle_timeout,
            max_per_user,
            forward,
            cookie,
            ..
        } = &config.sessions[0].settings;
        assert_eq!(*sources, [TokenSource::Cookie("sid".into())]);
        assert_eq!((*idle_timeout, *max_per_user), (1800 * SECOND, None));
        assert_eq!(forward.user.as_deref(), Some("X-Auth-User"));
        assert!(cookie.secure && cookie.http_only);
        assert!(config.routes[0].session.as_ref().unwrap().require);
        assert!(config.upstreams[0].trust_session_headers);
    }

    #[test]
    fn the_long_form_is_read_whole() {
        let config = read(
            "sessions:\n  web:\n    token: [{cookie: s}, {bearer: true}, {header: x-s}]\n    idle_timeout: 1m\n    absolute_timeout: 1h\n\
             \x20   max_per_user: 5\n    on_max: reject_new\n    max_sessions: 7\n    forward: {user: X-U}\n\
             \x20   cookie: {secure: false, http_only: false, same_site: strict, path: /a}\n\
             rate_limits: {u: {limit: 1/s, by: [session.user, session.claims.tenant]}, c: {limit: 1/s, by: client.ip}}\n\
             routes: [{upstream: app, session: {use: web, claims: {role: admin, tier: 2}}, rate_limits: [u, c]}]\n",
        )
        .unwrap();
        let web = &config.sessions[0];
        assert_eq!(
            (web.max_sessions, web.settings.on_max),
            (7, OnMax::RejectNew)
        );
        assert_eq!(
            web.settings.forward,
            Forward {
                user: Some("X-U".into()),
                ..Forward::default()
            }
        );
        let route = &config.routes[0];
        assert_eq!((route.limits.len(), route.session_limits.len()), (1, 1));
        let claims = &route.session.as_ref().unwrap().claims;
        assert_eq!(json!(claims), json!({"role": "admin", "tier": 2}));
    }

    #[test]
    fn what_is_shared_has_its_defaults() {
        let shared =
            |web: &str| read(&format!("sessions: {{web: {web}}}")).unwrap().sessions[0].shared;
        let default = Shared {
            touch_every: 60 * SECOND,
            cache: Cache {
                ttl: 2 * SECOND,
                negative_ttl: SECOND,
                max_entries: 100_000,
            },
            grace: 30 * SECOND,
        };
        assert_eq!(shared("{}"), default);
        let touched = |web: &str| shared(web).touch_every;
        assert_eq!(touched("{idle_timeout: 1m}"), 30 * SECOND);
        assert_eq!(touched("{idle_timeout: 5s, touch_every: 4s}"), 4 * SECOND);
        assert_eq!(touched("{touch_every: 0s}"), Duration::ZERO);
        assert_eq!(
            shared("{cache: {ttl: 0s, max_entries: 1}, on_redis_loss: {action: deny, grace: 0s}}"),
            Shared {
                cache: Cache {
                    ttl: Duration::ZERO,
                    max_entries: 1,
                    ..default.cache
                },
                grace: Duration::ZERO,
                ..default
            }
        );
    }

    #[test]
    fn a_route_with_a_session_looks_at_it_again() {
        let check = |route: &str, expected| {
            let text = format!("sessions: {{web: {{}}}}\nroutes: [{{upstream: app{route}}}]");
            let session = read(&text).unwrap().routes[0].session.clone();
            assert_eq!(session.map(|session| session.revalidate_every), expected);
        };
        check("", None);
        check(", session: {use: web}", Some(30 * SECOND));
        let told = ", session: {use: web, require: false}, revalidate_every: 5s";
        check(told, Some(5 * SECOND));
    }

    #[test]
    fn two_entries_that_would_overwrite_each_others_cookie_are_warned_of() {
        let warned = |web: &str, ops: &str| {
            let text = format!(
                "listen: 127.0.0.1:1\nupstreams: {{app: {{endpoints: ['http://x:1']}}}}\nsessions:\n  web: {{{web}}}\n  ops: {{{ops}}}\n\
                 routes: [{{match: {{path: /a}}, upstream: app, session: {{use: web}}}}, {{upstream: app, session: {{use: ops}}}}]\n"
            );
            let warnings = super::super::checked(&text, &|_| None).unwrap().warnings;
            let said = warnings.iter().map(ToString::to_string);
            said.filter(|said| said.contains("cookie"))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            warned("", "token: [{bearer: true}, {cookie: sid}]"),
            [
                "line 5, column 8: sessions.ops: on one host its cookie \"sid\" (path /) stands in the way of that of sessions.web, at line 4 (path /): a log-in to one ends or hides the other; give it a name of its own"
            ]
        );
        assert_eq!(warned("", "cookie: {path: /ops}").len(), 1);
        for (web, ops) in [
            ("", "token: [{cookie: ops}]"),
            ("", "token: [{bearer: true}]"),
            ("cookie: {path: /op}", "cookie: {path: /ops}"),
        ] {
            assert_eq!(warned(web, ops), [""; 0], "{web} {ops}");
        }
    }

    #[test]
    fn identity_is_forwarded_in_no_field_that_weir_or_a_hop_answers_for() {
        for name in [
            "Content-Length",
            "transfer_encoding",
            "Host",
            "Connection",
            "X-Forwarded-For",
            "traceparent",
            "X-Weir-User",
        ] {
            for key in ["user", "session", "claims"] {
                let said = read(&format!(
                    "sessions: {{web: {{forward: {{{key}: {name}}}}}}}"
                ));
                let said = said.map(|_| ()).unwrap_err().join("\n");
                let path = format!("sessions.web.forward.{key}: \"{name}\" ");
                assert!(said.contains(&path), "{said}");
            }
        }
        read("sessions: {web: {forward: {user: X-User, session: X-Session, claims: Remote-Claims}}}\nroutes: [{upstream: app, session: {use: web}}]")
            .unwrap();
    }

    #[test]
    fn mistakes_are_told_with_their_mend() {
        let check = |text: &str, part: &str| {
            let said = read(text).unwrap_err().join("\n");
            assert!(said.contains(part), "{said}");
        };
        check("sessions: {web: {token: []}}", "no place to find a token");
        check("sessions: {web: {token: [{bearer: false}]}}", "use one of");
        check(
            "sessions: {web: {token: [{header: 'a b'}]}}",
            "is not a header's name",
        );
        check(
            "sessions: {web: {idle_timeout: 0s}}",
            "would end every session at once",
        );
        check(
            "sessions: {web: {idle_timeout: 30s, touch_every: 30s}}",
            "sessions.web.touch_every: 30s is not below idle_timeout, 30s, so that sessions in use would end: use, for example, 15s",
        );
        check(
            "sessions: {web: {cache: {max_entries: 0}}}",
            "line 3, column 39: sessions.web.cache.max_entries: a cache of no entries: use 1 or more",
        );
        check(
            "sessions: {web: {max_per_user: 0}}",
            "line 3, column 32: sessions.web.max_per_user: a user with no session cannot log in: use 1 or more, or leave it out for any number",
        );
        check("sessions: {web: {cache: {ttl: 2}}}", "is not a duration");
        check(
            "sessions: {web: {on_redis_loss: {action: allow}}}",
            "unknown name \"allow\"",
        );
        check(
            "sessions: {web: {on_redis_loss: {grace: -1s}}}",
            "is not a duration",
        );
        check(
            "routes: [{upstream: app, revalidate_every: 30s}]",
            "routes[0].revalidate_every: this route has no session to look at again",
        );
        check(
            "sessions: {web: {}}\nroutes: [{upstream: app, session: {use: web}, revalidate_every: 0s}]",
            "0s would look without end",
        );
        check(
            "sessions: {web: {cookie: {same_site: none, secure: false}}}",
            "browsers drop a cookie",
        );
        check(
            "sessions: {web: {}}\nroutes: [{upstream: app, session: {use: wep}}]",
            "unknown sessions \"wep\"; did you mean \"web\"?",
        );
        check(
            "sessions: {web: {}}\nroutes: [{upstream: app, session: {use: web, require: false, claims: {a: b}}}]",
            "claims need a session",
        );
        check(
            "rate_limits: {u: {limit: 1/s, by: session.user}}\nroutes: [{upstream: app, rate_limits: [u]}]",
            "counts by the session, and this route has none",
        );
    }
}
