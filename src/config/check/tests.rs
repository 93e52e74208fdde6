//! The rules of a whole file, as tests.

mod bounds;
mod contradictions;
pub(super) mod fixture;
mod in_one_run;

use self::fixture::read;
use super::*;
use crate::config::Route;
use crate::config::listeners::Address;
use crate::config::matches::Match;
use crate::config::rewrite::{HeaderChanges, Rewrite, To};
use crate::config::upstreams::Source;

#[test]
fn the_short_form_makes_one_of_each() {
    let config = read("listen: 127.0.0.1:8080\nupstream: http://app\n").unwrap();
    assert_eq!(
        config.listeners[0].address,
        Address::Tcp("127.0.0.1:8080".parse().unwrap())
    );
    assert_eq!(config.listeners[0].max_body, 10 << 20);
    assert_eq!(
        config.upstreams[0].endpoints,
        [Source::Fixed("app:80".to_owned())]
    );
    assert_eq!(
        config.routes,
        [Route {
            matches: Match::default(),
            to: To::Upstream(0),
            rewrite: Rewrite::default(),
            request_headers: HeaderChanges::default(),
            response_headers: HeaderChanges::default(),
            hidden: BTreeSet::new(),
            limits: Vec::new(),
            session_limits: Vec::new(),
            session: None,
            audit: Level::None,
            audit_sample: None,
            timeout: None,
            shed: true
        }]
    );
    assert_eq!((config.lanes, config.drain), (None, 25 * SECOND));
    // Load balancers let go of idle connections after 60 s, and so do servers: a client's lives longer, and weir's own less long.
    let idle = (
        config.listeners[0].keep_alive,
        config.upstreams[0].idle_timeout,
    );
    assert_eq!(idle, (75 * SECOND, 50 * SECOND));
}

/// It may be secret, and the log has what is said of a file that is read again.
#[test]
fn what_a_variable_brings_in_is_told_as_it_is_written() {
    let lookup = |name: &str| match name {
        "A" => Some("s3cret value".to_owned()),
        "B" => Some("s3cret//x".to_owned()),
        "U" => Some("https://hooks.example.com/services/T0/s3cret".to_owned()),
        "L" => Some("s3cret by client.ip".to_owned()),
        "N" => Some("x-s3cret".to_owned()),
        "R" => Some("redis://s3cret.example".to_owned()),
        "E" => Some("%73%33%63%72%65%74".to_owned()),
        _ => None,
    };
    for text in [
        "listeners: [{address: '${A}', timeouts: {keep_alive: '${A}'}, limits: {max_body: '${A}', max_headers: '${A}'}}]\nupstream: '${A}'\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limit_defaults: {max_keys: '${A}', lease: {max_share: '${A}'}}\nruntime: {lanes: '${A}'}\n",
        "listen: 127.0.0.1:1\nroutes: [{match: {path: '${A}'}, reply: {status: '${A}'}}, {match: {path: '/${B}'}, redirect: {path: '/${B}'}}]\n",
        "listen: '${A}'\nupstream: '${A}'\nmetrics: {address: 'a${A}'}\n",
        "listen: 127.0.0.1:1\nupstreams: {a: {endpoints: ['${A}', 'http://x'], load_balancing: '${A}', circuit_breaker: '${A}', health: {path: '/h?t=${A}'}}}\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limit: '${A}'\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limits: {a: {limit: '${A}', by: '${A}', overrides: {a: '${A}'}}}\n",
        "listen: 127.0.0.1:1\nroutes: [{upstream: '${A}', session: {use: '${A}'}, rate_limits: ['${A}'], match: {path: '/${A}', methods: ['${A}']}, redirect: {host: '${A}'}}]\n",
        "listen: 127.0.0.1:1\nupstream: http://x\ntelemetry: {traces: {otlp: '${A}'}}\n",
        "listen: 127.0.0.1:1\nupstream: ${U}\nrate_limit: ${L}\n",
        "listen: 127.0.0.1:1\nupstreams: {a: {endpoints: ['${U}']}}\ncircuit_breakers: {b: {failure_on: ['grpc:${A}']}}\nrate_limits: {a: {limit: 1/s, by: 'header:${A}'}}\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nroutes: [{upstream: upstream, request_headers: {remove: ['${N}', '${N}']}}]\n",
        "listeners: [{name: '${N}', address: '127.0.0.1:1'}, {name: '${N}', address: '127.0.0.1:2'}]\nupstream: http://x\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nredis: {mode: cluster, urls: ['${R}', '${R}']}\n",
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limits: {x-s3cret: {limit: 1/s, by: path}}\nroutes: [{upstream: upstream, rate_limits: ['${N}', '${N}']}]\n",
        "listen: 127.0.0.1:1\nroutes: [{match: {path: '/${E}'}, reply: {}}, {redirect: {path: '/${E}'}}]\n",
    ] {
        let said = parse(text, &lookup).unwrap_err();
        let shown = said.iter().map(ToString::to_string).collect::<Vec<_>>();
        let shown = shown.join("\n");
        assert!(
            shown.lines().count() == said.len()
                && shown.contains("${")
                && !shown.contains("s3cret"),
            "{shown}"
        );
    }
}

#[test]
fn the_long_form_is_read_whole() {
    let config = read(
        "version: 1\nlisteners:\n  - {name: in, address: '[::1]:80', limits: {max_headers: 5}, timeouts: {keep_alive: 1m}}\n\
         upstreams:\n  a: {endpoints: ['http://[::1]:3000/'], timeout: 3s}\n  b: {endpoints: ['http://h:1']}\n\
         routes:\n  - match: {host: '*.x.org', path: /p/*, methods: [POST], headers: {X-A: '1'}}\n    upstream: b\n    timeout: 2s\n\
         runtime: {lanes: 2}\nshutdown: {drain: 3s}\n",
    )
    .unwrap();
    assert_eq!(config.listeners[0].head_limits.max_fields, 5);
    assert_eq!(config.listeners[0].keep_alive, 60 * SECOND);
    assert_eq!(
        config.upstreams[0].endpoints,
        [Source::Fixed("[::1]:3000".to_owned())]
    );
    assert_eq!(
        (config.routes[0].upstream(), config.routes[0].timeout),
        (Some(1), Some(2 * SECOND))
    );
    assert_eq!(
        config.routes[0].matches.headers,
        [("x-a".to_owned(), "1".to_owned())]
    );
    assert_eq!(config.lanes.map(usize::from), Some(2));
}

#[test]
fn every_mistake_of_meaning_is_told_in_one_run() {
    let said = read(
        "version: 2\nlisten: nowhere\nupstreams:\n  app: {endpoints: ['ftp://x']}\n  two: {endpoints: []}\n\
         routes:\n  - {upstream: apq}\n  - {match: {path: /a//b, host: '*', methods: [get]}, upstream: app, timeout: 0s}\n",
    )
    .unwrap_err();
    for (line, part) in [
        ("line 1, column 10: version: ", "use 1"),
        ("line 2, column 9: listen: ", "use IP:PORT"),
        ("line 4, ", "use http://HOST:PORT"),
        ("line 5, ", "no endpoint"),
        (
            "line 7, column 16: routes[0].upstream: ",
            "unknown upstream \"apq\"; did you mean \"app\"?",
        ),
        ("line 8, ", "use its normal form, \"/a/b\""),
        ("line 8, ", "routes[1].match.host: "),
        ("line 8, ", "\"get\" is not a method"),
        ("line 8, ", "routes[1].timeout: 0s is over at once"),
    ] {
        assert!(
            said.iter()
                .any(|mistake| mistake.starts_with(line) && mistake.contains(part)),
            "{part}: {said:#?}"
        );
    }
    assert_eq!(said.len(), 9, "{said:#?}");
}

#[test]
fn what_is_no_address_or_no_token_is_one_mistake() {
    for (admin, part) in [
        (
            "{address: localhost:9901}",
            "\"localhost:9901\" is not an address",
        ),
        ("{address: 0.0.0.0:2, token: ''}", "an empty token"),
        ("{address: 0.0.0.0:2, token: '***'}", "a masked secret"),
        ("{address: 0.0.0.0:2, token: $TOKEN}", "write ${TOKEN}"),
        ("{address: 0.0.0.0:2, token: $(TOKEN)}", "write ${TOKEN}"),
        ("{address: 0.0.0.0:2}", "needs admin.token"),
    ] {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x\nadmin: {admin}\n");
        let said = read(&text).unwrap_err();
        assert!(said.len() == 1 && said[0].contains(part), "{said:#?}");
    }
    // What a variable brings in may look like one.
    let text =
        "listen: 127.0.0.1:1\nupstream: http://x\nadmin: {address: 0.0.0.0:2, token: '${TOKEN}'}\n";
    assert!(parse(text, &|_| Some("$ecret".to_owned())).is_ok());
}

#[test]
fn a_file_of_another_proxy_is_told_as_that() {
    let said = |text: &str| read(text).unwrap_err().join("\n");
    let help = |proxy: &str| {
        format!(
            "; this looks like a file of {proxy}: docs/coming-from.md says what stands for what"
        )
    };
    for text in [
        "server {\n  listen 80;\n  location / {\n    proxy_pass http://x;\n  }\n}\n",
        "upstream app {\n  server 10.0.0.1:80;\n}\nmap $a $b {\n  \"~x: y\" 1;\n}\n",
    ] {
        assert!(said(text).ends_with(&help("nginx")), "{}", said(text));
    }
    let text = "static_resources:\n  listeners:\n  - name: a\n";
    assert!(said(text).contains(&help("Envoy")), "{}", said(text));
    let text = "listen: x\nroutes: [{reply: {body: 'server {'}}]\n";
    assert!(!said(text).contains("looks like"), "{}", said(text));
}

#[test]
fn an_empty_file_says_what_it_needs() {
    assert_eq!(read("version: 1\n").unwrap_err().len(), 2);
}
