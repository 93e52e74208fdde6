//! Mistakes of form and of meaning are told together, and none that would only follow from another.

use serde_json::{Value, json};

use super::super::parse;
use crate::config::yaml::Mistake;

const EVERY_KEY: &str = include_str!("../../every_key.yaml");

fn mistakes(text: &str) -> Vec<Mistake> {
    parse(text, &|_| None).err().unwrap_or_default()
}

#[test]
fn form_and_meaning_are_told_in_one_run() {
    let said = mistakes(
        "listen: 0.0.0.0:8080\nupstreams:\n  app: {endpoints: ['http://x'], timeout: 5}\nroutes:\n  \
         - {match: {path: /a//b, hots: x}, upstream: apq, timeout: 0s}\n  - {upstream: app, rate_limits: [free]}\n",
    );
    let said: Vec<_> = said.iter().map(Mistake::to_string).collect();
    let expected = [
        "line 3, column 43: upstreams.app.timeout: ",
        "line 5, column 20: routes[0].match.path: ",
        "line 5, column 27: routes[0].match.hots: unknown key",
        "line 5, column 47: routes[0].upstream: unknown upstream \"apq\"; did you mean \"app\"?",
        "line 5, column 61: routes[0].timeout: 0s is over at once",
        "line 6, column 35: routes[1].rate_limits[0]: unknown limit \"free\"",
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (said, expected) in said.iter().zip(expected) {
        assert!(said.starts_with(expected), "{said} / {expected}");
    }
}

#[test]
fn a_misspelt_section_hides_no_mistake_of_another() {
    let said = mistakes(
        "listeners: [{address: '127.0.0.1:1', client_ip: {ipv6_prefix: 0}}]\nupstream: http://x\nrate_limits: {a: {limit: 5 s, by: path}}\n\
         sessions: {web: {max_per_user: 0}}\nroutes: [{redirect: {status: 200, path: /}}]\nworkr: {}\n",
    );
    let said: Vec<_> = said.iter().map(Mistake::to_string).collect();
    let expected = [
        "line 1, column 63: listeners[0].client_ip.ipv6_prefix: 0 bits",
        "line 3, column 26: rate_limits.a.limit: \"5 s\" is not a rate",
        "line 4, column 32: sessions.web.max_per_user: a user with no session",
        "line 5, column 30: routes[0].redirect.status: 200 is no redirect",
        "line 6, column 1: workr: unknown key \"workr\"; did you mean \"worker\"?",
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (said, expected) in said.iter().zip(expected) {
        assert!(said.starts_with(expected), "{said} / {expected}");
    }
}

#[test]
fn what_may_be_under_a_misspelt_key_is_not_said_to_lack() {
    for (text, alone) in [
        (
            "listen: 0.0.0.0:1\nupstrams: {a: {endpoints: 'http://x'}}\nroutes: [{upstream: a}]\n",
            "upstrams",
        ),
        ("lisen: 0.0.0.0:1\nupstream: http://x\n", "lisen"),
        (
            "listen: 0.0.0.0:1\nupstream: http://x\nroutes: [{upstraem: upstream}]\n",
            "routes[0].upstraem",
        ),
        (
            "listen: 0.0.0.0:1\nupstreams: {a: {endpoint: 'http://x'}}\nroutes: [{upstream: a}]\n",
            "upstreams.a.endpoint",
        ),
    ] {
        let said = mistakes(text);
        let of_form = |mistake: &&Mistake| mistake.message.contains("is missing");
        let beside: Vec<_> = said.iter().filter(|told| !of_form(told)).collect();
        assert!(
            beside.len() == 1 && beside[0].place.path == alone,
            "{said:#?}"
        );
    }
}

#[test]
fn what_follows_from_another_mistake_is_not_said() {
    let by_session = "rate_limits: {u: {limit: 1/s, by: session.user}}\n";
    let by_client = "rate_limits: {c: {limit: 1/s, by: client.ip, overrides: {'2001:db8::1': 5/s, '2001:db8::2': 6/s}}}\n";
    let route = "upstream: http://x\nroutes: [{upstream: upstream, session: {use: web}, rate_limits: [u]}]\n";
    for (text, alone) in [
        (
            format!("listen: 0.0.0.0:1\nsesions: {{web: {{}}}}\n{by_session}{route}"),
            "sesions",
        ),
        (
            format!("listen: 0.0.0.0:1\nsessions: {{wbe: {{}}}}\n{by_session}{route}"),
            "routes[0].session.use",
        ),
        (
            format!(
                "listen: 0.0.0.0:1\nlistners: [{{address: '0.0.0.0:2', client_ip: {{ipv6_prefix: 128}}}}]\nupstream: http://x\n{by_client}"
            ),
            "listners",
        ),
    ] {
        let said = mistakes(&text);
        assert!(
            said.len() == 1 && said[0].place.path == alone,
            "{alone}: {said:#?}"
        );
    }
}

/// What is written without a space behind the colon may be a password.
#[test]
fn a_value_within_a_key_is_not_told_where_names_are() {
    let said = mistakes(
        "listen: 0.0.0.0:1\nupstream: http://x\nsessions: {w:s3cret}\nroutes: [{upstream: upstream, session: {use: web}}]\n",
    );
    assert!(
        said.len() == 2 && !format!("{said:?}").contains("s3cret"),
        "{said:#?}"
    );
}

/// Each value of a file: where it is as a JSON pointer (RFC 6901), and as a mistake's path.
fn places(value: &Value, at: &str, path: &str, found: &mut Vec<(String, String)>) {
    let mut add = |name: &str, path: String, of: &Value| {
        let place = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        places(of, &place, &path, found);
        found.push((place, path));
    };
    match value {
        Value::Object(entries) => entries.iter().for_each(|(key, of)| {
            let path = format!("{path}.{key}");
            add(key, path.trim_start_matches('.').to_owned(), of);
        }),
        Value::Array(items) => items.iter().enumerate().for_each(|(index, of)| {
            add(&index.to_string(), format!("{path}[{index}]"), of);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn a_value_of_the_wrong_form_is_the_only_mistake() {
    let whole: Value = serde_saphyr::from_str(EVERY_KEY).unwrap();
    let mut found = Vec::new();
    places(&whole, "", "", &mut found);
    assert!(found.len() > 300, "{}", found.len());
    for (place, here) in found {
        let mut file = whole.clone();
        *file.pointer_mut(&place).unwrap() = json!([[[]]]);
        let said = mistakes(&file.to_string());
        let is_apart = |told: &&Mistake| {
            let path = &told.place.path;
            !path.starts_with(&here) && !here.starts_with(path)
        };
        let apart: Vec<_> = said.iter().filter(is_apart).collect();
        assert!(apart.is_empty() && said.len() <= 1, "{here}: {said:#?}");
    }
}

#[test]
fn an_unknown_key_is_the_only_mistake_but_for_what_it_leaves_missing() {
    let whole: Value = serde_saphyr::from_str(EVERY_KEY).unwrap();
    let mut found = Vec::new();
    places(&whole, "", "", &mut found);
    for (place, _) in found {
        let (of, key) = place.rsplit_once('/').unwrap();
        let mut file = whole.clone();
        let Some(entries) = file.pointer_mut(of).unwrap().as_object_mut() else {
            continue;
        };
        let value = entries.remove(key).unwrap();
        entries.insert(format!("{key}zz"), value);
        let said = mistakes(&file.to_string());
        // A name may be any, and what uses it is told then.
        if !said
            .iter()
            .any(|told| told.message.starts_with("unknown key"))
        {
            continue;
        }
        let missing = format!("\"{key}\" is missing: add it");
        let follows: Vec<_> = said
            .iter()
            .filter(|told| !told.message.starts_with("unknown key") && told.message != missing)
            .collect();
        assert!(follows.is_empty(), "{place}: {said:#?}");
    }
}

#[test]
fn a_variable_that_is_not_set_is_the_only_mistake() {
    let whole: Value = serde_saphyr::from_str(EVERY_KEY).unwrap();
    let mut found = Vec::new();
    places(&whole, "", "", &mut found);
    for (place, here) in found {
        let mut file = whole.clone();
        let value = file.pointer_mut(&place).unwrap();
        if !value.is_object() && !value.is_array() {
            *value = json!("${UNSET}");
            let said = mistakes(&file.to_string());
            assert!(
                said.len() == 1 && said[0].place.path == here,
                "{here}: {said:#?}"
            );
        }
    }
}

#[test]
fn sections_of_the_wrong_kind_hide_nothing() {
    let said = mistakes(
        "listen: nowhere\nrate_limits:\nupstreams: [{name: app}]\nroutes: [{timeot: 3, match: {methods: GET, headers: x}}]\nadmin: {adress: 1}\n",
    );
    let said: Vec<_> = said.iter().map(Mistake::to_string).collect();
    let expected = [
        "line 1, column 9: listen: \"nowhere\" is not an address",
        "line 2, column 12: rate_limits: nothing stands behind the key",
        "line 3, column 12: upstreams: a list stands where a map is needed",
        "line 4, column 11: routes[0].timeot: unknown key",
        "line 4, column 39: routes[0].match.methods: a text stands where a list is needed",
        "line 4, column 53: routes[0].match.headers: a text stands where a map is needed",
        "line 5, column 9: admin.adress: unknown key",
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (said, expected) in said.iter().zip(expected) {
        assert!(said.starts_with(expected), "{said} / {expected}");
    }
}
