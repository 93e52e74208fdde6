//! The rules of `yaml`, as tests.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Debug, Deserialize)]
struct File {
    count: At<u32>,
    name: Option<At<String>>,
    #[serde(default)]
    routes: Vec<At<Route>>,
    #[serde(default)]
    named: BTreeMap<String, At<Route>>,
}

#[derive(Debug, Deserialize)]
struct Route {
    path: At<String>,
    port: Option<At<u16>>,
}

fn mistakes(text: &str) -> Vec<String> {
    parse::<File>(text, &|_| None)
        .unwrap_err()
        .iter()
        .map(Mistake::to_string)
        .collect()
}

#[test]
fn a_file_without_mistakes_is_read_with_places() {
    let file: File = parse(
        "count: 3\nname: 12\nroutes:\n  - path: /a\n    port: 80\n",
        &|_| None,
    )
    .unwrap();
    assert_eq!(
        (file.count.value, file.count.line, file.count.column),
        (Some(3), 1, 8)
    );
    assert_eq!(file.name.unwrap().value.unwrap(), "12");
    let route = file.routes[0].value.as_ref().unwrap();
    assert_eq!(route.path.value.as_deref(), Some("/a"));
    assert_eq!(route.port.as_ref().unwrap().line, 5);
    assert!(file.named.is_empty());
}

#[test]
fn every_mistake_is_told_in_one_run() {
    let text = "count: many\nnmae: x\nroutes:\n  - path: /a\n    port: 70000\n  - prot: 1\nnamed:\n  b: {port: x, path: /}\n";
    let said = mistakes(text);
    assert_eq!(said.len(), 6, "{said:#?}");
    assert!(
        said[0].starts_with("line 1, column 8: count: invalid type: string \"many\""),
        "{said:#?}"
    );
    assert_eq!(
        said[1],
        "line 2, column 1: nmae: unknown key \"nmae\"; did you mean \"name\"?"
    );
    assert!(
        said[2].starts_with("line 5, column 11: routes[0].port: invalid value: integer `70000`"),
        "{said:#?}"
    );
    assert!(
        said[3].contains("routes[1]") && said[4].contains("routes[1]"),
        "{said:#?}"
    );
    assert!(
        said[3..5]
            .iter()
            .any(|line| line.ends_with("\"path\" is missing: add it")),
        "{said:#?}"
    );
    assert!(
        said[5].starts_with("line 8, column 13: named.b.port: invalid type"),
        "{said:#?}"
    );
}

#[test]
fn broken_yaml_and_a_repeated_key_are_told_with_their_place() {
    assert!(
        mistakes("count: [\n")[0].starts_with("line "),
        "{:?}",
        mistakes("count: [\n")
    );
    let said = mistakes("count: 1\ncount: 2\n");
    assert_eq!(
        said,
        ["line 2, column 1: key \"count\" is there already: keep one"]
    );
    let said = mistakes("count: 1\n---\ncount: 2\n");
    assert_eq!(
        said,
        ["line 3, column 1: the file has several documents, parted by \"---\": keep one"]
    );
    let said = mistakes("count: \"1\n");
    assert_eq!(said, ["line 1, column 8: unclosed quote"]);
}

#[test]
fn values_come_from_the_environment_and_are_never_shown() {
    let lookup = |name: &str| (name == "NAME").then(|| "s3cret".to_owned());
    let read = |text: &str| {
        let file = parse::<File>(text, &lookup)
            .map(|file| file.name.and_then(|at| at.value).unwrap_or_default());
        file.map_err(|mistakes| {
            mistakes
                .iter()
                .map(Mistake::to_string)
                .collect::<Vec<_>>()
                .join("; ")
        })
    };
    assert_eq!(
        read("count: 1\nname: a${NAME}b\n"),
        Ok("as3cretb".to_owned())
    );
    assert_eq!(read("count: 1\nname: ${NONE:-x}\n"), Ok("x".to_owned()));
    let missing = read("count: 1\nname: ${NONE}\n").unwrap_err();
    assert_eq!(
        missing,
        "line 2, column 7: name: NONE is not set: set it, or give a default as ${NONE:-default}"
    );
    let wrong = read("count: ${NAME}\n").unwrap_err();
    assert!(
        wrong.contains("${NAME}") && !wrong.contains("s3cret"),
        "{wrong}"
    );
    assert!(
        read("count: 1\nname: ${file:/nowhere}\n")
            .unwrap_err()
            .contains("cannot read /nowhere")
    );
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "word\n").unwrap();
    let text = format!("count: 1\nname: ${{file:{}}}\n", secret.path().display());
    assert_eq!(read(&text), Ok("word".to_owned()));
}

#[test]
fn ten_thousand_routes_are_read_in_seconds_even_unoptimised() {
    let mut text = "count: 1\nroutes:\n".to_owned();
    for index in 0..10_000 {
        text.push_str(&format!("  - {{path: /{index}, port: 80}}\n"));
    }
    assert_eq!(
        parse::<File>(&text, &|_| None).unwrap().routes.len(),
        10_000
    );
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Off,
    #[serde(rename = "1.2")]
    Second,
}

#[derive(Debug, Deserialize)]
struct Named {
    #[expect(dead_code, reason = "read for its mistakes")]
    level: At<Level>,
    #[expect(dead_code, reason = "read for its mistakes")]
    route: Option<At<Route>>,
}

#[test]
fn what_stands_in_place_of_a_name_or_of_keys_is_told_with_what_is_known() {
    let said = |text: &str| {
        let mistakes = parse::<Named>(text, &|_| Some("hidden".to_owned())).unwrap_err();
        let said: Vec<_> = mistakes.iter().map(Mistake::to_string).collect();
        said.join("\n")
    };
    assert_eq!(
        said("level: 1.2\n"),
        "line 1, column 8: level: the number 1.2 stands where a name is needed; write it in quotes, \"1.2\""
    );
    assert_eq!(
        said("level: off\n"),
        "line 1, column 8: level: the boolean false (on, off, yes and no are booleans, too) stands where a name is needed; known here: off, 1.2"
    );
    assert!(
        said("level: [off]\n")
            .contains("a list stands where a name is needed; known here: off, 1.2")
    );
    assert_eq!(
        said("level: 'off'\nroute: ${NAME}\n"),
        "line 2, column 8: route: \"${NAME}\" stands where keys are needed; known here: path, port"
    );
    assert!(
        said("level: 'off'\nroute: [/a]\n").contains("route: a list stands where keys are needed")
    );
}
