//! The rules of `headers`, as tests.

use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::check;
use crate::http1::head::{HeadLimits, parse_request};

fn who(fields: &str, peer: &str, trusted: &[&str]) -> (String, bool) {
    let bytes = format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n").into_bytes();
    let head = parse_request(&bytes, HeadLimits::default())
        .unwrap()
        .unwrap();
    let text = format!(
        "upstream: http://x:1\nlisteners: [{{address: 127.0.0.1:1, client_ip: {{trusted_proxies: {trusted:?}}}}}]\n"
    );
    let listener = &check::parse(&text, &|_| None).unwrap().listeners[0];
    let peer: SocketAddr = peer.parse().unwrap();
    let client = client(&bytes, &head, peer.ip().to_canonical(), listener);
    (client.ip.to_string(), client.behind_trusted)
}

fn sent_up(fields: &str, trusted: bool) -> String {
    sent_up_by(&route(""), fields, trusted)
}

/// The route of requests to the one upstream, with these keys beside it.
fn route(keys: &str) -> Route {
    let text = format!(
        "listen: 127.0.0.1:1\nupstreams: {{app: {{endpoints: ['http://x:1']}}}}\nroutes:\n  - upstream: app\n{keys}"
    );
    check::parse(&text, &|_| None).unwrap().routes.remove(0)
}

fn sent_up_by(route: &Route, fields: &str, trusted: bool) -> String {
    let bytes = format!("GET / HTTP/1.1\r\nHost: x\r\n{fields}\r\n").into_bytes();
    let head = parse_request(&bytes, HeadLimits::default())
        .unwrap()
        .unwrap();
    let client = Client {
        ip: IpAddr::from([1, 2, 3, 4]),
        behind_trusted: trusted,
        certificate_trusted: false,
    };
    let peer = Peer::new(IpAddr::from([1, 2, 3, 4]), Duration::MAX, 0);
    let protocol = upgrade(&bytes, &head);
    let passed = Passed {
        target: b"/",
        route,
        authority: &|| "app:80".to_owned(),
        client: &client,
        request_id: &RequestId::Given("id".to_owned()),
        trace: None,
        identity_fields: &[],
        identity: None,
    };
    let mut out = Vec::new();
    put_request_head(&mut out, &bytes, &head, &passed, &peer, protocol.as_deref());
    String::from_utf8(out).unwrap()
}

#[test]
fn a_hop_with_its_port_is_the_hops_address() {
    for (hop, address) in [
        ("203.0.113.7:4711", "203.0.113.7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("[::ffff:203.0.113.7]:80", "203.0.113.7"),
        ("203.0.113.7:4711, 10.0.0.2:99", "203.0.113.7"),
        // What is none ends the walk.
        ("203.0.113.7:", "10.0.0.1"),
        ("[203.0.113.7", "10.0.0.1"),
        ("name:80", "10.0.0.1"),
    ] {
        let fields = format!("X-Forwarded-For: {hop}\r\n");
        let (found, _) = who(&fields, "10.0.0.1:5", &["10.0.0.0/8"]);
        assert_eq!(found, address, "{hop}");
    }
}

#[test]
fn a_field_goes_out_in_one_form_however_it_was_spaced() {
    for sent in ["A: 1", "A:1", "A:  1", "A:\t1", "A: 1 ", "A:1\t"] {
        let up = sent_up(&format!("{sent}\r\nB: 2\r\n"), false);
        assert!(up.contains("\r\nA: 1\r\nB: 2\r\n"), "{sent:?}: {up}");
    }
    for sent in ["A:", "A: ", "A:\t "] {
        let up = sent_up(&format!("{sent}\r\nB: 2\r\n"), false);
        assert!(up.contains("\r\nA: \r\nB: 2\r\n"), "{sent:?}: {up}");
    }
}

#[test]
fn no_other_spelling_smuggles_a_field_that_is_believed() {
    for name in [
        "X_Forwarded_For",
        "x-forwarded_FOR",
        "X.Forwarded.For",
        "X_Forwarded_Proto",
        "X~Forwarded-Host",
        "X_Forwarded_Prefix",
        "X-Forwarded_Port",
        "X_Real-IP",
        "X_Original_URL",
        // No proxy of note says them or takes them out, and frameworks route by them.
        "X-Original-URL",
        "x-rewrite-url",
        // Believed where the listener says so alone.
        "X-Forwarded-Client-Cert",
        "X_Request_Id",
        "Content_Length",
        "content.length",
        "Transfer_Encoding",
        "Transfer!Encoding",
        "Proxy",
        "proxy",
    ] {
        for trusted in [true, false] {
            let sent = sent_up(&format!("{name}: 6.6.6.6\r\n"), trusted);
            assert!(!sent.contains("6.6.6.6"), "{name} {trusted}: {sent}");
        }
    }
    for name in [
        "X_Other",
        "X-Forwarded",
        "X-Forward-For",
        "Proxy-X",
        "Hos_t",
    ] {
        let field = format!("{name}: 6.6.6.6\r\n");
        assert!(sent_up(&field, false).contains(&field), "{name}");
    }
    assert!(sent_up("X-Real-IP: 6.6.6.6\r\n", true).contains("X-Real-IP: 6.6.6.6\r\n"));
}

#[test]
fn what_proxies_say_is_believed_of_trusted_ones_alone() {
    let names = [
        "X-Forwarded-Prefix",
        "x-forwarded-port",
        "X-Forwarded-Ssl",
        "X-Forwarded-Scheme",
        "X-Forwarded-Server",
        "X-Forwarded-Uri",
        "X-Forwarded-Method",
        "X-Forwarded-Of-Another-Kind",
    ];
    for name in names {
        let field = format!("{name}: 6.6.6.6\r\n");
        assert!(!sent_up(&field, false).contains("6.6.6.6"), "{name}");
        assert!(sent_up(&field, true).contains(&field), "{name}");
    }
    // What the route says stands.
    let set = route(
        "    request_headers: {set: {X-Forwarded-Prefix: /api}, add: {X-Forwarded-Port: '443'}}\n",
    );
    let forged = "X-Forwarded-Prefix: //evil\r\nX-Forwarded-Port: 81\r\n";
    let sent = sent_up_by(&set, forged, false);
    assert!(sent.contains("\r\nX-Forwarded-Prefix: /api\r\n"), "{sent}");
    assert!(sent.contains("\r\nX-Forwarded-Port: 443\r\n"), "{sent}");
    assert!(!sent.contains("evil") && !sent.contains("81"), "{sent}");
}

#[test]
fn what_a_route_sets_cannot_be_forged() {
    let route = route(
        "    rewrite: {host: 'app:80'}\n    request_headers: {set: {X-Env: prod}, add: {x-tag: weir}, remove: [x-debug]}\n",
    );
    let fields = "x-env: a\r\nX_ENV: b\r\nX-Debug: c\r\nx.debug: d\r\nX-Tag: e\r\nX-Forwarded-Host: evil\r\n";
    let sent = sent_up_by(&route, fields, false);
    assert_eq!(sent.to_lowercase().matches("x-env: ").count(), 1, "{sent}");
    assert!(sent.contains("X-Env: prod\r\n") && !sent.contains(": b\r\n"));
    assert!(!sent.contains(": c\r\n") && !sent.contains(": d\r\n"));
    assert!(sent.contains("X-Tag: e\r\n") && sent.contains("x-tag: weir\r\n"));
    assert!(sent.contains("\r\nHost: app:80\r\n") && !sent.contains("\r\nHost: x\r\n"));
    assert!(sent.contains("X-Forwarded-Host: x\r\n") && !sent.contains("evil"));
    let trusted = sent_up_by(&route, "X-Forwarded-Host: edge\r\n", true);
    assert!(trusted.contains("X-Forwarded-Host: edge\r\n"), "{trusted}");
    assert_eq!(trusted.matches("X-Forwarded-Host").count(), 1);
}

#[test]
fn a_chain_of_trusted_proxies_goes_on_and_others_begin_anew() {
    let chain = "X-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6;proto=https\r\n";
    let sent = sent_up(chain, true);
    assert!(
        sent.contains("X-Forwarded-For: 6.6.6.6, 1.2.3.4\r\n"),
        "{sent}"
    );
    assert!(
        sent.contains("Forwarded: for=6.6.6.6;proto=https, for=1.2.3.4\r\n"),
        "{sent}"
    );
    let sent = sent_up(chain, false);
    assert!(!sent.contains("6.6.6.6") && sent.contains("X-Forwarded-For: 1.2.3.4\r\n"));
}

/// RFC 9110 section 5.2: the fields of a list are one.
#[test]
fn all_protocols_that_a_client_offers_are_offered_on() {
    let asks = |fields: &str| sent_up(&format!("Connection: upgrade\r\n{fields}"), false);
    let sent = asks("Upgrade: x/1\r\nUpgrade: y, websocket\r\n");
    assert!(sent.contains("Upgrade: x/1, y, websocket\r\n"), "{sent}");
    let sent = asks("Upgrade: websocket\r\nUpgrade: h2c\r\n").to_ascii_lowercase();
    assert!(!sent.contains("upgrade"), "{sent}");
}

#[test]
fn a_switch_to_another_http_is_not_passed_on() {
    let asks = |protocol: &str| {
        let fields = format!("Connection: Upgrade\r\nUpgrade: {protocol}\r\n");
        sent_up(&fields, false).contains("\r\nUpgrade: ")
    };
    assert!(asks("websocket"));
    assert!(asks("x, y/1"));
    for protocol in [
        "h2c",
        "H2C",
        "websocket, h2c",
        "h2",
        "h2c/1",
        "HTTP/2.0",
        "TLS/1.2",
        "",
    ] {
        assert!(!asks(protocol), "{protocol}");
    }
}

#[test]
fn a_client_is_what_trusted_proxies_say_and_no_one_else() {
    let proxies = ["10.0.0.0/8", "fd00::/8"];
    let check = |fields: &str, peer: &str, ip: &str, behind| {
        assert_eq!(
            who(fields, peer, &proxies),
            (ip.to_owned(), behind),
            "{fields:?} from {peer}"
        );
    };
    check("", "1.2.3.4:5", "1.2.3.4", false);
    check(
        "X-Forwarded-For: 6.6.6.6\r\n",
        "1.2.3.4:5",
        "1.2.3.4",
        false,
    );
    check(
        "X-Forwarded-For: 6.6.6.6\r\n",
        "10.0.0.1:5",
        "6.6.6.6",
        true,
    );
    check(
        "X-Forwarded-For: 9.9.9.9, 6.6.6.6, 10.0.0.2\r\n",
        "10.0.0.1:5",
        "6.6.6.6",
        true,
    );
    check(
        "X-Forwarded-For: 9.9.9.9\r\nX-Forwarded-For: 6.6.6.6\r\n",
        "[fd00::1]:5",
        "6.6.6.6",
        true,
    );
    check(
        "X-Forwarded-For: 6.6.6.6, nonsense\r\n",
        "10.0.0.1:5",
        "10.0.0.1",
        true,
    );
    check(
        "X-Forwarded-For: ::ffff:6.6.6.6\r\n",
        "[::ffff:10.0.0.1]:5",
        "6.6.6.6",
        true,
    );
    check("", "10.0.0.1:5", "10.0.0.1", true);
}

#[test]
fn an_empty_member_of_expect_expects_nothing() {
    let check = |fields: &str, expected| {
        let bytes = format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n{fields}\r\n");
        let head = parse_request(bytes.as_bytes(), HeadLimits::default());
        let expects = expects_continue(bytes.as_bytes(), &head.unwrap().unwrap());
        assert_eq!(expects.map_err(|_| "refused"), expected, "{fields}");
    };
    check("Expect:\r\n", Ok(false));
    check("Expect: , ,\r\n", Ok(false));
    check("Expect: , 100-Continue\r\n", Ok(true));
    check("Expect: 100-continue\r\nExpect:\r\n", Ok(true));
    check("Expect: 100-continue, 200-ok\r\n", Err("refused"));
}

/// Names and values that mean something to a proxy, and others.
fn field() -> impl Strategy<Value = String> {
    let name = "(Connection|connection|X-Forwarded-For|X_FORWARDED_FOR|Upgrade|TE|Forwarded|X-Request-Id|Expect|X-A|Keep-Alive|[a-zA-Z!#_-]{1,8})";
    let value = "(close|x-a, host|upgrade|websocket|h2c|keep-alive|content-length|[ -~]{0,12})";
    (name, value).prop_map(|(name, value)| format!("{name}: {value}\r\n"))
}

proptest! {
    #[test]
    fn what_goes_up_is_one_head_that_names_its_client_once(fields in prop::collection::vec(field(), 0..8), trusted: bool) {
        let sent = sent_up(&fields.concat(), trusted).into_bytes();
        let head = parse_request(&sent, HeadLimits::default()).unwrap().unwrap();
        prop_assert_eq!(head.len, sent.len());
        let count = |wanted: &str| head.fields.iter().filter(|(name, _)| is(&sent, name, wanted)).count();
        prop_assert_eq!((count("x-forwarded-for"), count("host")), (1, 1));
        prop_assert_eq!(count("connection"), count("upgrade"));
        for hop in ["te", "keep-alive", "transfer-encoding", "expect"] {
            prop_assert_eq!(count(hop), 0, "{}", hop);
        }
        if !trusted {
            prop_assert_eq!((count("x-request-id"), count("forwarded")), (1, 0));
        }
    }
}

/// Who names them a hop's would have weir tell the upstream less of the client, or another thing (CVE-2021-33197).
#[test]
fn connection_takes_away_nothing_that_weir_says_or_trusts() {
    let said = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Host: edge\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Prefix: /p\r\n\
                X-Real-IP: 6.6.6.6\r\nX-Request-Id: given\r\nForwarded: for=6.6.6.6\r\nVia: 1.1 edge\r\n";
    let named = "Connection: X-Forwarded-For, x-forwarded-host, x-forwarded-proto, x-forwarded-prefix, host, x-a\r\n\
                 Connection: x-real-ip, x-request-id, forwarded, via\r\nX-A: gone\r\n";
    for trusted in [true, false] {
        let sent = sent_up(&format!("{named}{said}"), trusted);
        assert_eq!(sent, sent_up(said, trusted), "{trusted}");
        assert!(!sent.contains("gone") && sent.contains("\r\nVia: 1.1 edge\r\n"));
    }
}
