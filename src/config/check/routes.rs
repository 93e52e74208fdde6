//! Routes, from the file as written to [`Route`]s.

use std::collections::BTreeSet;

use super::rewrite::{Message, RawTo};
use super::unused::RouteAt;
use super::values::field_name;
use super::{Checker, SECOND};
use crate::config::Route;
use crate::config::audit::Level;
use crate::config::matches::{HostMatch, Match, PathMatch};
use crate::config::raw;
use crate::config::rewrite::{HeaderChanges, Rewrite, To};
use crate::config::yaml::{At, Position, told};
use crate::http1::path;

impl Checker {
    pub(super) fn routes(
        &mut self,
        routes: Option<At<Vec<At<raw::Route>>>>,
        upstreams: usize,
        on_every_route: &[usize],
    ) -> Vec<Route> {
        let Some(routes) = routes else {
            if upstreams > 1 {
                let message = "several upstreams need \"routes\" to say which serves what";
                self.say(&Position::top("routes"), message);
            }
            let on_it = on_every_route.to_vec();
            let (limits, session_limits) =
                self.part_limits(&Position::top("rate_limit"), on_it, false);
            return vec![Route {
                matches: Match::default(),
                to: To::Upstream(0),
                rewrite: Rewrite::default(),
                request_headers: HeaderChanges::default(),
                response_headers: HeaderChanges::default(),
                hidden: BTreeSet::new(),
                limits,
                session_limits,
                session: None,
                audit: self.audit_level.unwrap_or(Level::None),
                audit_sample: None,
                timeout: None,
                shed: true,
            }];
        };
        let place = routes.place;
        let routes = routes.value.unwrap_or_default();
        if routes.is_empty() {
            let message = "no route: every request is answered with 404; add one, or leave the key out for all requests to go to the one upstream";
            self.warn(&place, message);
        }
        let mut checked = Vec::with_capacity(routes.len());
        for at in routes {
            let Some(raw) = at.value else { continue };
            let matches = raw.matches.as_ref().and_then(|at| at.value.as_ref());
            self.routes_at.push(RouteAt {
                place: at.place.clone(),
                says_case: matches.is_some_and(|matches| matches.ignore_case.is_some()),
            });
            let answered = RawTo {
                upstream: raw.upstream,
                redirect: raw.redirect,
                reply: raw.reply,
            };
            let to = self.to(&at.place, answered);
            if let To::Redirect(_) | To::Reply(_) = to {
                self.only_with_upstream(raw.timeout.as_ref());
                self.only_with_upstream(raw.rewrite.as_ref());
                self.only_with_upstream(raw.request_headers.as_ref());
            }
            let rewrite = self.rewrite(told(raw.rewrite).unwrap_or_default());
            let request_headers = self.header_changes(raw.request_headers, Message::Request);
            let response_headers = self.header_changes(raw.response_headers, Message::Response);
            let matches = raw.matches.and_then(|at| self.matches(at));
            let timeout = raw.timeout;
            let timeout = timeout.map(|at| self.timeout(Some(at), 5 * SECOND));
            let asks_session = raw.session.is_some();
            let session = self.route_session(raw.session, raw.revalidate_every);
            let mut limits = on_every_route.to_vec();
            limits.extend(self.limits_named(raw.rate_limits));
            let limits_at = at.place.child("rate_limits");
            let (limits, session_limits) = self.part_limits(&limits_at, limits, asks_session);
            let (audit, audit_sample) = self.route_audit(raw.audit);
            checked.push(Route {
                audit,
                audit_sample,
                limits,
                session_limits,
                session,
                matches: matches.unwrap_or_default(),
                to,
                rewrite,
                request_headers,
                response_headers,
                hidden: std::mem::take(&mut self.hidden),
                timeout,
                shed: told(raw.shed).unwrap_or(true),
            });
        }
        checked
    }

    fn matches(&mut self, at: At<raw::Match>) -> Option<Match> {
        let headers_path = at.place.child("headers").path;
        let raw = at.value?;
        let host = raw.host.and_then(|at| self.read(at, HostMatch::parse));
        let path_at = raw.path.as_ref().map(|at| at.place.clone());
        let pattern = raw.path.and_then(|at| self.read(at, path_pattern));
        if let (Some(pattern), Some(place)) = (&pattern, &path_at)
            && pattern.to_string().contains("/:")
        {
            let message = format!(
                "a path has no parameters, so that {pattern} is matched letter by letter: use all below one, as in /users/*"
            );
            self.warn(place, message);
        }
        if let (Some(at), None) = (&raw.ignore_case, path_at) {
            let message = "only a path's case can be ignored, and there is no \"path\"";
            self.say(&at.place, message);
        }
        let methods = self.each(raw.methods, |text| {
            match text.bytes().all(|b| b.is_ascii_uppercase()) {
                true if !text.is_empty() => Ok(text.to_owned()),
                _ => Err(format!(
                    "\"{text}\" is not a method: use capital letters, for example GET"
                )),
            }
        });
        for (name, at) in &raw.headers {
            if let Err(message) = field_name(name) {
                self.say(&at.place.named(&headers_path), message);
            }
        }
        let mut headers = Vec::with_capacity(raw.headers.len());
        let mut names = BTreeSet::new();
        for (name, at) in raw.headers {
            if !names.insert(name.to_ascii_lowercase()) {
                let message = format!("\"{name}\" is named twice: keep one of them");
                self.say(&at.place.named(&headers_path), message);
            }
            let value = self.shown_value(&name, at, |text| Ok(text.to_owned()));
            headers.extend(value.map(|value| (name.to_ascii_lowercase(), value)));
        }
        Some(Match {
            host,
            path: pattern,
            ignore_case: told(raw.ignore_case).unwrap_or(false),
            methods,
            headers,
        })
    }
}

/// Those who come from other proxies write expressions and parameters.
fn path_pattern(text: &str) -> Result<PathMatch, String> {
    let is_expression = text.starts_with(['^', '~'])
        || text.ends_with('$')
        || text.contains(['{', '[', '\\', '|'])
        || text.contains(".*");
    normal_pattern(text).map_err(|message| match is_expression {
        true => format!(
            "\"{text}\" is not a path: there are no regular expressions and no parameters; use the path itself, or all below one as in /users/*"
        ),
        false => message,
    })
}

/// A pattern that is not in normal form would never match, since requests are matched in theirs.
fn normal_pattern(text: &str) -> Result<PathMatch, String> {
    let pattern = PathMatch::parse(text)?;
    let plain = text.trim_end_matches('*');
    match path::normalise(plain.as_bytes()) {
        Ok(normal) if *normal == *plain.as_bytes() => Ok(pattern),
        Ok(normal) => Err(format!(
            "path would never match: use its normal form, \"{}\"",
            String::from_utf8_lossy(&normal)
        )),
        Err(error) => Err(format!("{error}: such a request is refused")),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::check::checked;

    /// Mistakes, or warnings.
    fn said(path: &str) -> String {
        let text = format!(
            "listen: 127.0.0.1:1\nupstream: http://x:1\nroutes:\n  - match: {{path: '{path}'}}\n    upstream: upstream\n"
        );
        let said = match checked(&text, &|_| None) {
            Ok(checked) => checked.warnings,
            Err(mistakes) => mistakes,
        };
        let said: Vec<_> = said.iter().map(ToString::to_string).collect();
        said.join("\n")
    }

    #[test]
    fn an_expression_is_told_apart_from_a_path_that_is_wrong() {
        for path in [
            "^/a.*",
            "~ ^/a.*$",
            "/users/{id}",
            "/a.*",
            "/a$",
            "/a/[0-9]",
        ] {
            let expected = format!(
                "line 4, column 19: routes[0].match.path: \"{path}\" is not a path: there are no regular expressions and no parameters; use the path itself, or all below one as in /users/*"
            );
            let is_path = path == "/a$";
            assert_eq!(
                said(path),
                if is_path { String::new() } else { expected },
                "{path}"
            );
        }
        assert!(said("users").contains("use \"/users\""));
        assert!(said("/a//b").contains("use its normal form, \"/a/b\""));
        assert!(said("/a//**").contains("use its normal form, \"/a/\""));
    }

    #[test]
    fn a_case_to_ignore_needs_a_path() {
        let text = "listen: 127.0.0.1:1\nroutes: [{match: {host: x.org, ignore_case: true}, reply: {status: 200}}]\n";
        let said: Vec<_> = checked(text, &|_| None).err().unwrap_or_default();
        let said: Vec<_> = said.iter().map(ToString::to_string).collect();
        assert!(
            said.len() == 1 && said[0].contains("routes[0].match.ignore_case: only a path's case"),
            "{said:#?}"
        );
    }

    #[test]
    fn a_parameter_is_warned_of() {
        assert_eq!(
            said("/users/:id"),
            "line 4, column 19: routes[0].match.path: a path has no parameters, so that /users/:id is matched letter by letter: use all below one, as in /users/*"
        );
        assert_eq!(said("/users/a:b"), "");
    }
}
