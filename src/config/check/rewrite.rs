//! What a route changes on the way and what it answers by itself, from the file as written to [`To`], [`Rewrite`] and
//! [`HeaderChanges`].

use std::collections::{BTreeMap, BTreeSet};

use super::Checker;
use super::values::{before_value, field_name};
use crate::config::raw;
use crate::config::rewrite::{HeaderChanges, NewPath, Redirect, Reply, Rewrite, To};
use crate::config::sessions::Sessions;
use crate::config::yaml::{At, Position, told};
use crate::http1::head::is_host;
use crate::http1::hygiene::{folded, is_folded, is_hop_by_hop};
use crate::http1::path;

/// Of responses, unless told.
const TEXT: &str = "text/plain; charset=utf-8";

/// A message whose fields a route changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    Request,
    Response,
}

/// The three keys of which a route has one.
pub(super) struct RawTo {
    pub upstream: Option<At<String>>,
    pub redirect: Option<At<raw::Redirect>>,
    pub reply: Option<At<raw::Reply>>,
}

impl Checker {
    pub(super) fn to(&mut self, place: &Position, raw: RawTo) -> To {
        let keys = [
            raw.upstream.is_some().then_some("upstream"),
            raw.redirect.is_some().then_some("redirect"),
            raw.reply.is_some().then_some("reply"),
        ];
        let told: Vec<_> = keys.into_iter().flatten().collect();
        if told.len() > 1 {
            let message = format!("has {}: keep one of them", told.join(" and "));
            self.say(place, message);
        }
        match raw {
            RawTo {
                upstream: Some(at), ..
            } => To::Upstream(self.upstream_named(at)),
            RawTo {
                redirect: Some(at), ..
            } => To::Redirect(self.redirect(at)),
            RawTo {
                reply: Some(at), ..
            } => To::Reply(self.reply(at.value)),
            RawTo {
                upstream: None,
                redirect: None,
                reply: None,
            } => {
                let message = "has none of upstream, redirect and reply: say who answers";
                self.say(place, message);
                To::Upstream(0)
            }
        }
    }

    fn redirect(&mut self, at: At<raw::Redirect>) -> Redirect {
        let place = &at.place;
        let mut redirect = Redirect {
            status: 302,
            scheme: None,
            host: None,
            port: None,
            path: None,
            strip_query: false,
        };
        let Some(raw) = at.value else {
            return redirect;
        };
        let goes_elsewhere = raw.scheme.is_some()
            || raw.host.is_some()
            || raw.port.is_some()
            || raw.path.is_some()
            || raw.path_prefix.is_some();
        if !goes_elsewhere {
            let message =
                "would send clients to where they are: add host, scheme, port, path or path_prefix";
            self.say(place, message);
        }
        if raw.path.is_some() && raw.path_prefix.is_some() {
            let message = "has path and path_prefix: keep one of them";
            self.say(place, message);
        }
        if let Some(at) = raw.status
            && let Some(status) = at.value
        {
            redirect.status = status;
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                let message = format!("{status} is no redirect: use 301, 302, 303, 307 or 308");
                self.say(&at.place, message);
            }
        }
        redirect.scheme = told(raw.scheme);
        redirect.host = raw.host.and_then(|at| self.read(at, host_alone));
        let port = raw.port;
        redirect.port = port.map(|at| self.count_within(Some(at), 443, 1..=65_535));
        let whole = raw.path.and_then(|at| self.read(at, normal_path));
        let prefix = raw.path_prefix;
        let prefix = prefix.and_then(|at| self.read(at, normal_path));
        redirect.path = whole.map(NewPath::Whole).or(prefix.map(NewPath::Prefix));
        redirect.strip_query = told(raw.strip_query).unwrap_or(false);
        redirect
    }

    fn reply(&mut self, raw: Option<raw::Reply>) -> Reply {
        let mut reply = Reply {
            status: 200,
            body: String::new(),
            content_type: TEXT.to_owned(),
            headers: Vec::new(),
        };
        let Some(raw) = raw else {
            return reply;
        };
        reply.body = told(raw.body).unwrap_or_default();
        if let Some(at) = raw.status
            && let Some(status) = at.value
        {
            reply.status = status;
            self.final_status(&at.place, status, &reply.body);
        }
        if let Some(at) = raw.content_type {
            let told = self.read(at, field_value);
            reply.content_type = told.unwrap_or_default();
        }
        for (name, at) in &raw.headers {
            if name.eq_ignore_ascii_case("content-type") {
                let message = "use content_type";
                self.say(&at.place, message);
            }
        }
        reply.headers = self.fields(raw.headers, Message::Response);
        reply
    }

    /// Of a reply that the file words, with this body.
    pub(super) fn final_status(&mut self, place: &Position, status: u16, body: &str) {
        let message = match status {
            // RFC 9110 sections 15.3.5, 15.3.6 and 15.4.5.
            204 | 205 | 304 if !body.is_empty() => {
                format!("{status} has no body: leave the body empty")
            }
            200..=599 => return,
            _ => format!("{status} is not a final status: use 200 to 599"),
        };
        self.say(place, message);
    }

    pub(super) fn rewrite(&mut self, raw: raw::Rewrite) -> Rewrite {
        let path_prefix = raw.path_prefix;
        Rewrite {
            path_prefix: path_prefix.and_then(|at| self.read(at, normal_path)),
            host: raw.host.and_then(|at| {
                self.read(at, |text| match is_host(text.as_bytes()) && !text.is_empty() {
                    true => Ok(text.to_owned()),
                    false => Err(format!(
                        "\"{text}\" is not a host: use, for example, app.internal or app.internal:8080"
                    )),
                })
            }),
        }
    }

    pub(super) fn header_changes(
        &mut self,
        at: Option<At<raw::HeaderChanges>>,
        of: Message,
    ) -> HeaderChanges {
        let Some((raw, place)) = at.and_then(At::told) else {
            return HeaderChanges::default();
        };
        // In which order `set`, `add` and `remove` are done must not matter.
        let mut names = BTreeSet::new();
        let mut named_once = |checker: &mut Checker, name: &str, at: &At<String>| {
            if !names.insert(folded(name.as_bytes())) {
                let message = format!("\"{name}\" is named twice: keep one of them");
                checker.say(&at.place.named(&place.path), message);
            }
        };
        for (name, at) in raw.set.iter().chain(&raw.add) {
            named_once(self, name, at);
        }
        let set = self.fields(raw.set, of);
        let add = self.fields(raw.add, of);
        let mut remove = Vec::new();
        for at in raw.remove {
            if let Some(name) = &at.value {
                named_once(self, name, &at);
            }
            let identity = self.identity_fields.clone();
            remove.extend(self.read(at, |text| {
                // It passes as it came, and only announces others.
                match is_folded(text.as_bytes(), b"trailer") {
                    true => Ok(text.to_owned()),
                    false => changeable(text, of, &identity),
                }
            }));
        }
        HeaderChanges::new(set, add, remove)
    }

    fn fields(&mut self, raw: BTreeMap<String, At<String>>, of: Message) -> Vec<(String, String)> {
        let mut fields = Vec::with_capacity(raw.len());
        for (name, at) in raw {
            if let Err(message) = changeable(&name, of, &self.identity_fields) {
                let path = at.place.path.strip_suffix(&*name);
                let path = path.map(|of| format!("{of}{}", before_value(&name)));
                let place = path.map(|path| at.place.named(&path));
                self.say(place.as_ref().unwrap_or(&at.place), message);
                continue;
            }
            if self.is_spelt(&at) && at.value.as_deref().is_some_and(has_variable) {
                let message = "the value is sent as it stands: there are no variables in it, as nginx, HAProxy and Envoy have; what weir itself tells the app is in docs/security.md";
                self.warn(&at.place, message);
            }
            let value = self.shown_value(&name, at, field_value);
            fields.extend(value.map(|value| (name, value)));
        }
        fields
    }

    /// A route that goes to no upstream has no use for these keys.
    pub(super) fn only_with_upstream<T>(&mut self, at: Option<&At<T>>) {
        if let Some(at) = at {
            let message = "is for a route with an upstream: take it out";
            self.say(&at.place, message);
        }
    }
}

/// The request fields that tell upstreams who asks, as [`folded`].
pub(super) fn identity_fields(sessions: &[Sessions]) -> Vec<Vec<u8>> {
    let told = sessions.iter().flat_map(|entry| {
        let forward = &entry.settings.forward;
        [&forward.user, &forward.session, &forward.claims]
    });
    told.flatten().map(|name| folded(name.as_bytes())).collect()
}

/// Whether a field is weir's to say: one of framing or of a hop, or one that weir answers for.
pub(super) fn is_weirs(name: &[u8], of: Message) -> bool {
    /// Beside those of a hop and weir's own.
    const OF_REQUESTS: [&[u8]; 15] = [
        b"content-length",
        b"expect",
        b"forwarded",
        b"host",
        b"http2-settings",
        b"max-forwards",
        b"proxy",
        b"traceparent",
        b"tracestate",
        b"trailer",
        b"x-forwarded-client-cert",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-request-id",
    ];
    const OF_RESPONSES: [&[u8]; 3] = [b"content-length", b"date", b"trailer"];
    let answered_for: &[&[u8]] = match of {
        Message::Request => &OF_REQUESTS,
        Message::Response => &OF_RESPONSES,
    };
    let name = folded(name);
    name.starts_with(b"x-weir-") || answered_for.contains(&name.as_slice()) || is_hop_by_hop(&name)
}

/// A name of a field that a file may put in or take out.
fn changeable(text: &str, of: Message, identity: &[Vec<u8>]) -> Result<String, String> {
    let name = field_name(text)?;
    let bytes = name.as_bytes();
    let tells_who_asks = match of {
        Message::Request if name.eq_ignore_ascii_case("host") => {
            return Err("\"host\" is changed by rewrite: use rewrite.host".to_owned());
        }
        Message::Request if is_folded(bytes, b"x-real-ip") => {
            return Err(format!(
                "\"{name}\" cannot be changed, since a value of the file is one for all clients: take it out; apps find the client's address in X-Forwarded-For, which weir answers for"
            ));
        }
        Message::Request => identity.iter().any(|other| is_folded(bytes, other)),
        Message::Response => false,
    };
    match tells_who_asks || is_weirs(bytes, of) {
        true => Err(format!(
            "\"{name}\" is weir's to say, and cannot be changed: take it out"
        )),
        false => Ok(name),
    }
}

/// RFC 9110 section 5.5; white space at an end would be cut off by some and not by others.
fn field_value(text: &str) -> Result<String, String> {
    let is_control = |byte: u8| byte.is_ascii_control() && byte != b'\t';
    match text.bytes().any(is_control) || text.trim_matches([' ', '\t']) != text {
        true => Err(
            "a value has no line end, no other control character, and no space at its ends: take them out"
                .to_owned(),
        ),
        false => Ok(text.to_owned()),
    }
}

/// Whether it has `$remote_addr`, `%[src]` or `%REQ(…)%`.
fn has_variable(text: &str) -> bool {
    let begins_word = |at: usize| !text[..at].ends_with(|c: char| c.is_ascii_alphanumeric());
    let of_nginx = |(at, _): (usize, &str)| {
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        begins_word(at) && text[at + 1..].starts_with(is_name)
    };
    let of_envoy = |(at, _): (usize, &str)| {
        let behind = &text[at + 1..];
        let name = behind.trim_start_matches(|c: char| c.is_ascii_uppercase() || c == '_');
        // Two letters may be an escaped byte, and the next one begins behind them.
        let letters = behind.len() - name.len();
        behind.starts_with('[')
            || (letters > 0 && name.starts_with('('))
            || (letters > 2 && name.starts_with('%'))
    };
    text.match_indices('$').any(of_nginx) || text.match_indices('%').any(of_envoy)
}

/// A path that goes out as it is written.
fn normal_path(text: &str) -> Result<String, String> {
    match path::normalise(text.as_bytes()) {
        Ok(normal) if *normal == *text.as_bytes() => Ok(text.to_owned()),
        Ok(normal) => Err(format!(
            "\"{text}\" is not in normal form: use \"{}\"",
            String::from_utf8_lossy(&normal)
        )),
        Err(error) => Err(format!("\"{text}\": {error}: use, for example, /v2")),
    }
}

fn host_alone(text: &str) -> Result<String, String> {
    let has_port = !text.ends_with(']') && text.contains(':');
    match is_host(text.as_bytes()) && !text.is_empty() && !has_port {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "\"{text}\" is not a host without a port: use, for example, www.example.com, and port"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixture;
    use super::*;
    use crate::config::Route;
    use crate::config::rewrite::Scheme;

    fn read(route: &str) -> Result<Route, String> {
        let text = format!(
            "listen: 127.0.0.1:1\nupstreams: {{app: {{endpoints: ['http://x:1']}}}}\nsessions: {{web: {{}}}}\nroutes:\n  - {{{route}}}\n"
        );
        fixture::read(&text)
            .map(|mut config| config.routes.remove(0))
            .map_err(|said| said.join("\n"))
    }

    #[test]
    fn what_a_route_changes_is_read() {
        let route = read(
            "upstream: app, rewrite: {path_prefix: /v2, host: 'app.internal:80'}, request_headers: {set: {X-Env: prod}, remove: [x-debug]}, \
             response_headers: {add: {vary: 'a, b'}, remove: [Server]}",
        )
        .unwrap();
        assert_eq!(route.to, To::Upstream(0));
        assert_eq!(route.rewrite.path_prefix.as_deref(), Some("/v2"));
        assert_eq!(route.rewrite.host.as_deref(), Some("app.internal:80"));
        let request = &route.request_headers;
        for (name, dropped) in [("x_env", true), ("X-Debug", true), ("x-envy", false)] {
            assert_eq!(request.drops(name.as_bytes()), dropped, "{name}");
        }
        assert_eq!(request.set(), [("X-Env".to_owned(), "prod".to_owned())]);
        let response = &route.response_headers;
        assert!(response.drops(b"server") && !response.drops(b"vary"));
    }

    #[test]
    fn redirects_and_replies_need_no_upstream() {
        let text =
            "listen: 127.0.0.1:1\nroutes: [{reply: {body: hello}}, {redirect: {scheme: https}}]\n";
        let config = fixture::read(text).unwrap();
        let To::Reply(reply) = &config.routes[0].to else {
            panic!("{:?}", config.routes);
        };
        assert_eq!((reply.status, &*reply.content_type), (200, TEXT));
        let To::Redirect(redirect) = &config.routes[1].to else {
            panic!("{:?}", config.routes);
        };
        assert_eq!(
            (redirect.status, redirect.scheme),
            (302, Some(Scheme::Https))
        );
    }

    #[test]
    fn no_field_of_framing_or_trust_can_be_changed() {
        for name in [
            "Content-Length",
            "content_length",
            "Transfer-Encoding",
            "connection",
            "TE",
            "upgrade",
            "X-Weir-Session-Start",
        ] {
            for key in ["request_headers", "response_headers"] {
                for change in [
                    format!("{{set: {{{name}: x}}}}"),
                    format!("{{add: {{{name}: x}}}}"),
                    format!("{{remove: [{name}]}}"),
                ] {
                    let said = read(&format!("upstream: app, {key}: {change}")).unwrap_err();
                    assert!(said.contains("is weir's to say"), "{said}");
                }
            }
        }
        for name in [
            "X-Forwarded-For",
            "X-Forwarded-Client-Cert",
            "x_forwarded_for",
            "Forwarded",
            "X-Request-Id",
            "x_real_ip",
            "X-Auth-User",
            "x.auth.claims",
            "expect",
            "traceparent",
            "Max_Forwards",
        ] {
            let said = read(&format!(
                "upstream: app, request_headers: {{remove: [{name}]}}"
            ));
            assert!(said.is_err(), "{name}");
            let said = read(&format!(
                "upstream: app, response_headers: {{remove: [{name}]}}"
            ));
            assert!(said.is_ok(), "{name}");
        }
        // It passes as it came, so that it can be kept from doing so.
        for key in ["request_headers", "response_headers"] {
            for (change, is_read) in [
                ("{set: {trailer: x}}", false),
                ("{add: {Trailer: x}}", false),
                ("{remove: [Trailer]}", true),
            ] {
                let said = read(&format!("upstream: app, {key}: {change}"));
                assert_eq!(said.is_ok(), is_read, "{key} {change}: {said:?}");
            }
        }
        let said = read("reply: {headers: {content-length: 5}}").unwrap_err();
        assert!(
            said.contains("routes[0].reply.headers.content-length"),
            "{said}"
        );
    }

    #[test]
    fn what_cannot_be_meant_says_the_mend() {
        for (route, part) in [
            ("audit: none", "has none of upstream, redirect and reply"),
            (
                "upstream: app, reply: {}",
                "routes[0]: has upstream and reply: keep one of them",
            ),
            (
                "redirect: {}",
                "add host, scheme, port, path or path_prefix",
            ),
            (
                "redirect: {path: /a, path_prefix: /b}",
                "has path and path_prefix",
            ),
            (
                "upstream: app, request_headers: {set: {X-Real-IP: 10.0.0.1}}",
                "apps find the client's address in X-Forwarded-For",
            ),
            ("redirect: {status: 304, path: /a}", "304 is no redirect"),
            (
                "redirect: {host: 'x:80'}",
                "routes[0].redirect.host: \"x:80\"",
            ),
            ("redirect: {port: 0}", "use 1 to 65535"),
            ("redirect: {schema: https}", "did you mean \"scheme\"?"),
            ("redirect: {path: '//evil.org'}", "use \"/evil.org\""),
            ("redirect: {path: '/a?b'}", "must be escaped"),
            (
                "redirect: {path: /a}, timeout: 5s",
                "routes[0].timeout: is for",
            ),
            ("reply: {}, rewrite: {host: x}", "routes[0].rewrite: is for"),
            ("reply: {status: 99}", "use 200 to 599"),
            ("reply: {status: 204, body: x}", "204 has no body"),
            (
                "reply: {headers: {Content-Type: a/b}}",
                "routes[0].reply.headers.Content-Type: use content_type",
            ),
            (
                "upstream: app, rewrite: {path_prefix: v2}",
                "does not begin with",
            ),
            (
                "upstream: app, rewrite: {path_prefix: /a/../b}",
                "use \"/b\"",
            ),
            ("upstream: app, rewrite: {host: 'a b'}", "is not a host"),
            (
                "upstream: app, request_headers: {set: {host: x}}",
                "use rewrite.host",
            ),
            (
                "upstream: app, request_headers: {set: {x-a: \"b\\r\\nx: c\"}}",
                "routes[0].request_headers.set.x-a: a value has no line end",
            ),
            (
                "upstream: app, response_headers: {add: {x-a: \"b\\0\"}}",
                "a value has no line end",
            ),
            (
                "upstream: app, response_headers: {set: {x-a: ' b'}}",
                "no space at its ends",
            ),
            (
                "upstream: app, response_headers: {remove: ['x a']}",
                "is not a header's name",
            ),
            (
                "upstream: app, request_headers: {set: {Authorization=Bearer s3cret: x}}",
                "routes[0].request_headers.set.Authorization=…: \"Authorization=…\" is not a header's name",
            ),
            (
                "upstream: app, request_headers: {set: {x-a: b}, remove: [X_A]}",
                "\"X_A\" is named twice",
            ),
        ] {
            let said = read(route).unwrap_err();
            assert!(said.contains(part), "{route}: {said}");
        }
    }
}
