//! docs/reference.md has what the source has: each path of the admin port as it answers, each label by which weir refuses with its status,
//! each metric with its type. `make chart` holds the labels of metrics against what is exported. Keys in Redis stand with what they
//! are of, and all of them are those of keys.rs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::harness::Client;
use super::harness::process::{Echo, Running, file};
use serde_json::Value;

const REFERENCE: &str = include_str!("../../docs/reference.md");

/// The documents that tell of keys in Redis.
const KEYS: [&str; 4] = [
    include_str!("../../docs/audit.md"),
    include_str!("../../docs/sessions.md"),
    include_str!("../../docs/shared-breakers.md"),
    include_str!("../../docs/shared-state.md"),
];

/// The cells of each row of the tables under this heading, without the tables' heads.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, rest) = REFERENCE
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no section {heading:?}"));
    let section = rest.split("\n## ").next().unwrap();
    let cells = |line: &'static str| -> Vec<&'static str> {
        let line = line.trim_start_matches('|').trim_end_matches('|');
        line.split('|').map(str::trim).collect()
    };
    let lines: Vec<_> = section.lines().collect();
    let is_row = |at: &usize| {
        let is_head = lines
            .get(at + 1)
            .is_some_and(|next| next.starts_with("|--"));
        lines[*at].starts_with("| ") && !is_head
    };
    let rows = (0..lines.len()).filter(is_row);
    rows.map(|at| cells(lines[at])).collect()
}

/// What stands between backticks in a cell.
fn quoted(cell: &'static str) -> Vec<&'static str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The texts between quotation marks in a piece of source without escapes.
fn literals(source: &str) -> impl Iterator<Item = &str> {
    source.split('"').skip(1).step_by(2)
}

#[test]
fn each_metric_stands_there_with_its_type() {
    let documented: BTreeMap<_, _> = rows("The metrics")
        .into_iter()
        .map(|row| (quoted(row[0])[0], row[1]))
        .collect();
    // By the name that a family is registered under, which the format adds to.
    let family = |name: &'static str, kind: &str| {
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let base = name.strip_suffix(suffix);
        base.unwrap_or_else(|| panic!("{name} is a {kind}, which ends in {suffix}"))
    };
    let named = documented.iter().map(|(name, kind)| family(name, kind));
    let named: BTreeSet<_> = named.collect();

    let mut registered = BTreeSet::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/telemetry/metrics");
    let parts = fs::read_dir(&folder).unwrap();
    let parts = parts.map(|entry| entry.unwrap().path());
    for file in parts.chain([folder.with_extension("rs")]) {
        let text = fs::read_to_string(file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap().to_owned();
        // A name, and behind it its help, which begins with a capital letter or a digit.
        let literals: Vec<_> = text.split('"').collect();
        for at in (1..literals.len().saturating_sub(2)).step_by(2) {
            let (name, between, help) = (literals[at], literals[at + 1], literals[at + 2]);
            let may_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            let is_name = !name.is_empty() && name.chars().all(may_name);
            let is_help = help.starts_with(|c: char| c.is_ascii_uppercase() || c.is_ascii_digit());
            if is_name && between.trim() == "," && is_help && help.contains(' ') {
                let behind = literals[at + 3].trim_start_matches([',', ' ', '\n']);
                let unit = match () {
                    () if behind.starts_with("Unit::Seconds") => "_seconds",
                    () if behind.starts_with("Unit::Bytes") => "_bytes",
                    () => "",
                };
                let prefix = match name.starts_with("process_") {
                    true => "",
                    false => "weir_",
                };
                registered.insert(format!("{prefix}{name}{unit}"));
            }
        }
    }
    assert!(registered.len() > 70, "{registered:?}");
    let registered: BTreeSet<_> = registered.iter().map(String::as_str).collect();
    assert_eq!(named, registered);

    let own = "listen: 127.0.0.1:0\nupstream: http://127.0.0.1:1\nadmin: {address: 127.0.0.1:0}\n";
    let weir = Running::start(file(own).path());
    // In the format whose families have the names that they are registered under.
    let openmetrics = "Accept: application/openmetrics-text";
    let scraped = weir
        .admin()
        .send("GET", "/metrics", &[openmetrics], "")
        .body;
    let mut seen = 0;
    for line in scraped.lines() {
        let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|of| of.split_once(' '))
        else {
            continue;
        };
        let documented = documented
            .iter()
            .find(|(known, kind)| family(known, kind) == name);
        assert_eq!(documented.map(|(_, kind)| *kind), Some(kind), "{name}");
        seen += 1;
    }
    assert!(seen > 40, "{scraped}");
}

#[test]
fn each_key_in_redis_stands_there() {
    fn first_cells(text: &'static str) -> impl Iterator<Item = &'static str> {
        let rows = text.lines().map(|line| line.trim_start_matches("//! "));
        rows.filter_map(|row| Some(row.strip_prefix("| `weir:")?.split_once("` |")?.0))
            .filter(|name| name.contains('{'))
    }
    let has = BTreeSet::from_iter(first_cells(include_str!("../../src/keys.rs")));
    let told: Vec<_> = KEYS.into_iter().flat_map(first_cells).collect();
    assert_eq!(has.len(), told.len(), "none twice: {told:?}");
    assert_eq!(BTreeSet::from_iter(told), has);
}

#[test]
fn each_path_of_the_admin_port_answers_as_it_says() {
    let echo = Echo::start();
    let folder = tempfile::tempdir().unwrap();
    let weir = Running::start(
        file(&format!(
            "listeners: [{{address: '127.0.0.1:0'}}]\nadmin: {{address: 127.0.0.1:0}}\n\
             upstreams: {{app: {{endpoints: ['http://{}'], circuit_breaker: b}}}}\ncircuit_breakers: {{b: {{}}}}\n\
             rate_limits: {{per_path: {{limit: 5/h, by: path}}}}\nsessions: {{web: {{}}}}\n\
             routes: [{{upstream: app, rate_limits: [per_path], session: {{use: web, require: false}}}}]\n\
             audit: {{sqlite: {{path: '{}'}}}}\n",
            echo.address,
            folder.path().join("audit.db").display()
        ))
        .path(),
    );
    let mut admin = weir.admin();
    let mut ask = |method: &str, path: &str, body: &str| {
        let mut fields = vec!["Host: localhost"];
        if !body.is_empty() {
            fields.push("Content-Type: application/json");
        }
        admin.send(method, path, &fields, body)
    };
    let mut ids = Vec::new();
    for row in rows("The admin port") {
        let [method, path, body, answer, _] = row[..] else {
            panic!("{row:?}")
        };
        // What is forgotten must have been counted, and what is ended must live.
        Client::to(&weir.address).get("/a/b");
        let created = ask("POST", "/v1/sessions", r#"{"user": "ann"}"#);
        let created: Value = serde_json::from_str(&created.body).unwrap();
        ids.push(created["id"].as_str().unwrap().to_owned());
        let path = quoted(path)[0]
            .replace("NAME", "per_path")
            .replace("PART", "%2Fa%2Fb")
            .replace("KEY", "%2Fa%2Fb")
            .replace("UPSTREAM", "app")
            .replace("USER", "ann")
            .replace("limit=N", "limit=1")
            .replace("&after=NEXT", "")
            .replace("/ID", &format!("/{}", ids.last().unwrap()));
        let body = quoted(body).first().copied().unwrap_or_default();
        let reply = ask(method, &path, body);
        let status: u16 = answer[..3].parse().unwrap();
        assert_eq!(reply.status, status, "{method} {path}: {reply:?}");
        let says: Option<Value> = serde_json::from_str(&reply.body).ok();
        // The keys of the object that is shown, each at its depth or below.
        let shown = quoted(answer)
            .into_iter()
            .find(|shown| shown.starts_with('{'));
        for key in shown.iter().flat_map(|shown| literals(shown)) {
            assert!(
                has(says.as_ref().unwrap(), key),
                "{path}: {key} in {reply:?}"
            );
        }
    }
    assert!(ids.len() > 20);
}

fn has(value: &Value, key: &str) -> bool {
    match value {
        Value::Object(object) => {
            object.contains_key(key) || object.values().any(|value| has(value, key))
        }
        Value::Array(list) => list.iter().any(|value| has(value, key)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}
