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
    let text = "global\n    maxconn 100\nfrontend web\n    bind :80\nbackend app\n    server a 10.0.0.1:80\n";
    assert!(said(text).ends_with(&help("HAProxy")), "{}", said(text));
    for text in [
        "http:\n  routers:\n    r: {rule: Path(`/a`)}\n",
        "entryPoints:\n  web: {address: ':80'}\n",
    ] {
        assert!(said(text).ends_with(&help("Traefik")), "{}", said(text));
    }
    let text = "apiVersion: v1\nkind: ConfigMap\ndata: {weir.yaml: x}\n";
    assert!(
        said(text).contains("a manifest of Kubernetes"),
        "{}",
        said(text)
    );
    let text = "listen: x\nroutes: [{reply: {body: 'server {'}}]\n";
    assert!(!said(text).contains("looks like"), "{}", said(text));
}

/// Of nginx, HAProxy, Envoy, Traefik and the shell.
#[test]
fn what_is_written_as_elsewhere_is_told_with_how_it_is_written_here() {
    let listen = "listen: 127.0.0.1:1\n";
    let short = "listen: 127.0.0.1:1\nupstream: http://127.0.0.1:2\n";
    let long = "listen: 127.0.0.1:1\nupstreams:\n  app:\n    endpoints: http://127.0.0.1:2\n";
    for (begin, text, told) in [
        (long, "    read_timeout: 5s", "did you mean \"timeout\"?"),
        (
            long,
            "    proxy_read_timeout: 5s",
            "did you mean \"timeout\"?",
        ),
        (
            long,
            "    load_balancing: LEAST_REQUEST",
            "did you mean \"least_request\"?",
        ),
        (
            long,
            "    load_balancing: least_conn",
            "did you mean \"least_request\"?",
        ),
        (long, "    protocol: h2c", "did you mean \"http2\"?"),
        (
            long,
            "    max_fails: 3",
            "did you mean \"outlier_detection\"?",
        ),
        (
            listen,
            "upstreams: {a: {servers: [http://x]}}",
            "did you mean \"endpoints\"?",
        ),
        (
            short,
            "telemetry: {log: {level: WARN}}",
            "did you mean \"warn\"?",
        ),
        (short, "runtime: {workers: 4}", "did you mean \"lanes\"?"),
        (
            short,
            "rate_limits: {a: {rate: 1/s, by: host}}",
            "did you mean \"limit\"?",
        ),
        (
            short,
            "routes: [{match: {prefix: /a}}]",
            "did you mean \"path\"?",
        ),
        (
            listen,
            "upstream: http://$APP_HOST:80",
            "write an environment variable as ${APP_HOST}",
        ),
        (
            listen,
            "upstream: http://unix:/run/app.sock:/",
            "use unix:/run/app.sock",
        ),
        (
            listen,
            "upstream: [http://a, http://b]",
            "a list stands where a text is needed: for several, or one with settings, write upstreams: {app:",
        ),
        (
            "upstream: http://x\n",
            "listen: [127.0.0.1:1]",
            "for several, or one with settings, write listeners: [",
        ),
        (
            "upstream: http://x\n",
            "listen: ':::8080'",
            "an IPv6 address stands in [], as in \"[::]:8080\"",
        ),
        (
            "upstream: http://x\n",
            "listen: ::1:8080",
            "an IPv6 address stands in [], as in \"[::1]:8080\"",
        ),
        (
            "upstream: http://x\n",
            "listen: 8443",
            "use IP:PORT, for example 0.0.0.0:8443",
        ),
        (
            "upstream: http://x\n",
            "listen: :8443",
            "use IP:PORT, for example 0.0.0.0:8443",
        ),
        (
            "upstream: http://x\n",
            "listen: localhost:8443",
            "use IP:PORT, for example 127.0.0.1:8443",
        ),
        (
            listen,
            "upstreams:\n  app:\n  endpoints: [http://x]",
            "nothing stands where keys are needed, indented below it; known here: endpoints",
        ),
    ] {
        let said = read(&format!("{begin}{text}\n")).unwrap_err();
        let told = said.iter().filter(|said| said.contains(told)).count();
        assert_eq!(told, 1, "{text}: {said:#?}");
    }
}

/// Who names an upstream by a word of another proxy does not mean that proxy's.
#[test]
fn names_that_the_file_gives_are_told_by_a_slip_alone() {
    let text = "listen: 127.0.0.1:1\n\
        upstreams: {server: {endpoints: [http://x]}, endpoints: {endpoints: [http://y]}, сервер1: {endpoints: [http://z]}}\n\
        routes: [{match: {path: /a}, upstream: servers}, {upstream: хутор1}]\n";
    let said = read(text).unwrap_err().join("\n");
    assert!(said.contains("did you mean \"server\"?"), "{said}");
    assert!(!said.contains("did you mean \"сервер1\"?"), "{said}");
}

/// They would be sent as they stand, to every app.
#[test]
fn what_looks_like_a_variable_of_another_proxy_is_warned_of() {
    let warned = |value: &str| {
        let text = format!(
            "listen: 127.0.0.1:1\nupstream: http://x\nroutes: [{{request_headers: {{set: {{x-a: '{value}'}}}}, upstream: upstream}}]\n"
        );
        fixture::warned(&text).join("\n")
    };
    for value in [
        "$remote_addr",
        "$scheme://$host",
        "for=$remote_addr",
        "%[src]",
        "%DOWNSTREAM_REMOTE_ADDRESS%",
        "%REQ(x-id)%",
    ] {
        let said = warned(value);
        let start =
            "line 3, column 40: routes[0].request_headers.set.x-a: the value is sent as it stands";
        assert!(said.starts_with(start) && !said.contains(value), "{said}");
    }
    for value in [
        "$5", "a$b", "US$", "100%", "%41%42", "%%", "$${a}", "a%20b", "ü$", "%A", "%CE%B1",
    ] {
        assert_eq!(warned(value), "", "{value}");
    }
}

#[test]
fn an_empty_file_says_what_it_needs() {
    assert_eq!(read("version: 1\n").unwrap_err().len(), 2);
}
