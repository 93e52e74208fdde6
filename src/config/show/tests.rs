//! The rules of `show`, as tests.

use super::*;
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
        let mut again = read(&printed);
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
