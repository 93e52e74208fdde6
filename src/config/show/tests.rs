//! The rules of `show`, as tests.

use serde_json::json;

use super::{json, yaml};
use crate::config::Config;
use crate::config::rewrite::To;
use crate::config::{check, schema};

const EVERY_KEY: &str = include_str!("../every_key.yaml");

fn read(text: &str) -> Config {
    check::parse(text, &|_| None).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{text}"))
}

#[test]
fn what_is_printed_is_the_same_configuration() {
    for text in [
        EVERY_KEY,
        "listen: 127.0.0.1:1\nupstream: http://x\nrate_limit: 100/s by client.ip\n",
    ] {
        let config = read(text);
        let printed = yaml(&config);
        let mut again = read(&unmasked(&printed));
        // Masked, so that they cannot come back.
        if config.admin.token.is_some() {
            again.admin.token.clone_from(&config.admin.token);
            again.audit.clone_from(&config.audit);
            let set = &config.routes[0].request_headers;
            again.routes[0].request_headers.clone_from(set);
            again.redis.clone_from(&config.redis);
            let (Some(again), Some(postgres)) = (&mut again.postgres, &config.postgres) else {
                panic!("{printed}");
            };
            again.write.clone_from(&postgres.write);
            again.read.clone_from(&postgres.read);
        }
        assert_eq!(again, config, "{printed}");
        assert_eq!(yaml(&again), printed);
    }
}

/// As the schema has it: editors take what is printed.
#[test]
fn a_number_is_printed_as_one() {
    let shown = json(&read(EVERY_KEY));
    assert_eq!(shown["runtime"]["lanes"], 3);
    assert_eq!(shown["rate_limit_defaults"]["max_keys"], 12);
    let definitions = &schema()["$defs"];
    let lanes = &definitions["Lanes"]["anyOf"][1];
    assert_eq!(
        (&lanes["minimum"], &lanes["maximum"]),
        (&json!(1), &json!(4096))
    );
    let largest = &definitions["Sessions"]["properties"]["max_sessions"]["maximum"];
    assert_eq!(*largest, json!(u32::MAX));
}

#[test]
fn a_number_in_quotes_is_none_to_the_check_as_to_the_schema() {
    for (key, lanes) in [
        ("runtime.lanes", "{runtime: {lanes: \"3\"}}"),
        (
            "rate_limit_defaults.max_keys",
            "{rate_limit_defaults: {max_keys: \"12\"}}",
        ),
    ] {
        let text = format!(
            "{{listen: '127.0.0.1:1', upstream: 'http://x', {}",
            &lanes[1..]
        );
        let said = check::parse(&text, &|_| None).unwrap_err();
        let said: Vec<_> = said.iter().map(ToString::to_string).collect();
        assert!(
            said.len() == 1 && said[0].contains(key) && said[0].contains("auto or a"),
            "{said:?}"
        );
        let with_variable = text
            .replace("\"3\"", "\"${N}\"")
            .replace("\"12\"", "\"${N}\"");
        check::parse(&with_variable, &|_| Some("3".to_owned())).unwrap();
    }
    let keys = &schema()["$defs"]["MaxKeys"]["anyOf"][1];
    assert_eq!(keys["minimum"], json!(1));
}

#[test]
fn a_literal_dollar_and_brace_is_printed_so_that_it_is_read_again() {
    let text = "listen: 127.0.0.1:1\nroutes: [{reply: {body: 'a $${b} ${C} $$${d}'}}]\n";
    let lookup = |name: &str| (name == "C").then(|| "${c}".to_owned());
    let config = check::parse(text, &lookup).unwrap();
    let To::Reply(reply) = &config.routes[0].to else {
        panic!("{config:?}");
    };
    assert_eq!(&*reply.body, "a ${b} ${c} $${d}");
    assert_eq!(read(&yaml(&config)), config);
}

/// With words in place of the masks, which would be refused.
fn unmasked(printed: &str) -> String {
    printed.replace("***", "a-secret")
}

/// The places in the file that are as a secret is shown.
#[test]
fn a_masked_secret_is_refused_where_it_stands() {
    let mistakes = check::parse(&yaml(&read(EVERY_KEY)), &|_| None).unwrap_err();
    let said: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
    let of = |path: &str| {
        said.iter()
            .find(|said| said.contains(&format!(": {path}: ")))
    };
    for path in [
        "routes[0].request_headers.set.Authorization",
        "redis.password",
        "redis.rate_limit.password",
        "redis.sessions.password",
        "audit.integrity.key",
        "postgres.write",
        "postgres.read[0]",
        "postgres.read[1]",
        "admin.token",
    ] {
        let said = of(path).unwrap_or_else(|| panic!("{path}: {said:#?}"));
        assert!(said.ends_with("put the real one here"), "{said}");
    }
    assert_eq!(said.len(), 9, "{said:#?}");
    for (more, is_refused) in [
        ("redis: {urls: 'redis://***@h'}", true),
        ("redis: {urls: 'redis://ann:***@h'}", true),
        ("redis: {urls: 'redis://ann:a***@h'}", false),
        ("admin: {token: '****'}", false),
        (
            "audit: {}\nredis: {urls: 'redis://h'}\npostgres: {write: 'postgres://ann:***@h/weir'}",
            true,
        ),
        (
            "audit: {}\nredis: {urls: 'redis://h'}\npostgres: {write: 'host=h password=***'}",
            true,
        ),
        (
            "audit: {}\nredis: {urls: 'redis://h'}\npostgres: {write: 'postgres://ann:a***@h/weir'}",
            false,
        ),
    ] {
        let text = format!("listen: 127.0.0.1:1\nupstream: http://x\n{more}\n");
        let said = check::parse(&text, &|_| None)
            .map(drop)
            .map_err(|said| said[0].to_string());
        let is_masked = said
            .as_ref()
            .is_err_and(|said| said.contains("a masked secret"));
        assert_eq!(is_masked, is_refused, "{text}: {said:?}");
        assert!(is_refused || said.is_ok(), "{text}: {said:?}");
    }
}

/// What does nothing is left out unless someone has set it.
#[test]
fn what_is_printed_is_warned_of_no_more_than_what_was_read() {
    let text = "listen: 127.0.0.1:1\nupstream: http://x\nredis: {urls: 'redis://h'}\naudit: {}\n\
                postgres: {write: 'postgres://h/weir'}\n";
    let checked = |text: &str| match check::checked(text, &|_| None) {
        Ok(checked) => checked,
        Err(mistakes) => panic!("{mistakes:#?}\n{text}"),
    };
    let config = checked(text).config;
    let printed = yaml(&config);
    let again = checked(&unmasked(&printed));
    assert_eq!(again.warnings, [], "{printed}");
    assert_eq!(again.config.audit, config.audit);
    let defaults = &json(&config)["rate_limit_defaults"];
    assert_eq!(defaults["on_redis_loss"], "local", "{printed}");
}

#[test]
fn secrets_are_masked() {
    let config = read(EVERY_KEY);
    for shown in [yaml(&config), json(&config).to_string()] {
        assert!(
            !shown.contains("hunter2") && shown.contains("***"),
            "{shown}"
        );
    }
}

#[test]
fn values_of_fields_are_masked_by_where_they_are_from_and_by_name() {
    let text = "listen: 127.0.0.1:1\nupstream: http://x\naudit: {redact: {headers: [x-pin]}}\nroutes:\n\
        \x20 - match: {headers: {x-gate: '${SECRET}', x-pin: hunter2, x-on: beta}}\n\
        \x20   upstream: upstream\n\
        \x20   request_headers: {set: {X-Token: '${SECRET}', X-Pin: hunter2, x-env: prod}, add: {x-more: 'a ${SECRET}', x-text: '$${a}'}}\n\
        \x20   response_headers: {set: {x-out: '${NONE:-hunter2}'}}\n\
        \x20 - {reply: {headers: {x-gone: '${SECRET}', x-token: plain, Set-Cookie: hunter2}}}\n";
    let lookup = |name: &str| (name == "SECRET").then(|| "hunter2".to_owned());
    let config = check::parse(text, &lookup).unwrap();
    let shown = json(&config);
    assert!(!shown.to_string().contains("hunter2"), "{shown}");
    let (first, second) = (&shown["routes"][0], &shown["routes"][1]);
    assert_eq!(
        first["match"]["headers"],
        json!({"x-gate": "***", "x-pin": "***", "x-on": "beta"})
    );
    assert_eq!(
        first["request_headers"],
        json!({"set": {"X-Token": "***", "X-Pin": "***", "x-env": "prod"}, "add": {"x-more": "***", "x-text": "${a}"}})
    );
    assert_eq!(
        second["reply"]["headers"],
        json!({"x-gone": "***", "x-token": "plain", "Set-Cookie": "***"})
    );
    let mistakes = check::parse(&yaml(&config), &|_| None).unwrap_err();
    let masked = mistakes
        .iter()
        .filter(|said| said.message.contains("a masked secret"));
    assert_eq!((masked.count(), mistakes.len()), (8, 8), "{mistakes:#?}");
}

/// Fails when a key is added to the file and not here.
#[test]
fn every_key_of_the_schema_is_shown() {
    let shown = yaml(&read(EVERY_KEY));
    let schema = schema();
    let definitions = schema["$defs"].as_object().unwrap().values();
    let keys = definitions
        .chain([&schema])
        .filter_map(|definition| definition["properties"].as_object())
        .flat_map(|properties| properties.keys());
    for key in keys {
        // The short form is shown as the long one.
        if !["listen", "rate_limit", "upstream"].contains(&key.as_str()) {
            assert!(shown.contains(&format!("{key}:")), "{key}: {shown}");
        }
    }
}
