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

/// A text without mistakes, or the mistakes of one that has some.
fn whole<T: DeserializeOwned>(text: &str, lookup: Lookup<'_>) -> Result<T, Vec<String>> {
    let (read, mistakes, _) = parse(text, lookup);
    match mistakes.is_empty() {
        true => Ok(read.unwrap()),
        false => Err(mistakes.iter().map(Mistake::to_string).collect()),
    }
}

fn mistakes(text: &str) -> Vec<String> {
    whole::<File>(text, &|_| None).unwrap_err()
}

#[test]
fn a_file_without_mistakes_is_read_with_places() {
    let file: File = whole(
        "count: 3\nname: 12\nroutes:\n  - path: /a\n    port: 80\n",
        &|_| None,
    )
    .unwrap();
    assert_eq!(
        (
            file.count.value,
            file.count.place.line,
            file.count.place.column
        ),
        (Some(3), 1, 8)
    );
    assert_eq!(file.name.unwrap().value.unwrap(), "12");
    let route = file.routes[0].value.as_ref().unwrap();
    assert_eq!(route.path.value.as_deref(), Some("/a"));
    assert_eq!(route.port.as_ref().unwrap().place.line, 5);
    assert!(file.named.is_empty());
}

#[test]
fn every_mistake_is_told_in_one_run() {
    let text = "count: many\nnmae: x\nroutes:\n  - path: /a\n    port: 70000\n  - prot: 1\nnamed:\n  b: {port: x, path: /}\n";
    let said = mistakes(text);
    assert_eq!(said.len(), 6, "{said:#?}");
    assert!(
        said[0].starts_with("line 1, column 8: count: \"many\" stands where a whole number up to 4294967295 is needed"),
        "{said:#?}"
    );
    assert_eq!(
        said[1],
        "line 2, column 1: nmae: unknown key \"nmae\"; did you mean \"name\"?"
    );
    assert!(
        said[2].starts_with("line 5, column 11: routes[0].port: the number 70000 stands where a whole number up to 65535"),
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
        said[5].starts_with("line 8, column 13: named.b.port: \"x\" stands where a whole number"),
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
    assert_eq!(
        said,
        ["line 1, column 8: a quote is opened here and never closed: close it"]
    );
    let said = mistakes("name: \"x\nroutes: [{path: \"/a\"}]\n");
    assert!(
        said.len() == 1 && said[0].contains("a quote above it is perhaps never closed"),
        "{said:#?}"
    );
}

#[test]
fn yaml_that_no_parser_reads_is_told_with_a_mend() {
    for (text, mend) in [
        ("name: *.x.org\n", "put the text in quotes"),
        ("name: @x\n", "a text cannot begin with @ in YAML"),
        ("name: %x\n", "a text cannot begin with % in YAML"),
        ("routes:\n\t- path: /a\n", "use spaces"),
        (
            "routes:\n  - path: /a\n   port: 1\n",
            "as an entry of the list above it",
        ),
        ("count: 1\n  name: x\n", ""),
        (
            "named:\n    a: {path: /a}\n  b: {path: /b}\n",
            "as a key of the map above it",
        ),
        ("count: 1\nname\n", "write KEY: VALUE"),
        ("routes: [{path: a: b}]\n", "the map in {} goes on"),
        ("routes: [{path: a}\nname: x\n", "close what is open above"),
        ("count 1\nname: x\n", "a key stands where none can"),
        (
            "count: 1\n name: x\n",
            "indent the line as the keys beside it",
        ),
        ("{count: 1\n", "opened here and never closed"),
        (
            "count: 1\nname: [::]:8080\n",
            "put a text that begins with [ or { in quotes",
        ),
        (
            "count: 1\nroutes: - path: /a\n",
            "put \"- \" into the next line",
        ),
        ("[server]\ncount = 1\n", "begin with [, { or a quote"),
        ("count: {{ .Values.count }}\n", "fill in a template's {{ }}"),
        (
            "count: 1\nname: \"C:\\dir\"\n",
            "write \"\\\\\" for one, or put the text in single",
        ),
        (
            "count: 1\nname: \"C:\\users\"\n",
            "write \"\\\\\" for one, or put the text in single",
        ),
        ("count: 1\nname: a\n\tb\n", "a tab stands within this text"),
        ("count: 1\nname: >a\n", "cannot begin with | or >"),
        ("count: 1\n\u{1}\n", "a control character stands here"),
        ("count:1\nname:x\n", "each as KEY: VALUE, with a space"),
    ] {
        let said = mistakes(text);
        assert!(
            said.len() == 1 && said[0].contains(mend),
            "{text}: {said:#?}"
        );
    }
}

#[test]
fn a_key_without_a_value_is_a_mistake() {
    let said = mistakes("count: 1\nname:\nroutes: [{path: /a, port: }, {path: ~}]\n");
    let nothing = "nothing stands behind the key: write a value, indent what belongs to it, or leave the key out";
    let expected = [
        format!("line 2, column 5: name: {nothing}"),
        format!("line 3, column 25: routes[0].port: {nothing}"),
        "line 3, column 37: routes[1].path: nothing stands where a text is needed".to_owned(),
    ];
    assert_eq!(said, expected);
}

#[test]
fn what_is_of_several_in_place_of_a_text_is_told() {
    for (name, found) in [("{a: b}", "a map"), ("[a]", "a list")] {
        let said = mistakes(&format!("count: 1\nname: {name}\n"));
        let expected = format!(
            "line 2, column 7: name: {found} stands where a text is needed: write one value, or the name of what stands elsewhere in the file"
        );
        assert_eq!(said, [expected]);
    }
}

#[test]
fn a_number_in_place_of_a_text_is_not_shown() {
    for number in ["12345678901234567890123", "007.50", "1e5"] {
        assert_eq!(
            mistakes(&format!("count: 1\nname: {number}\n")),
            ["line 2, column 7: name: a number stands where a text is needed: put it in quotes"]
        );
    }
}

#[test]
fn only_true_and_false_are_booleans() {
    #[derive(Deserialize)]
    struct Claims {
        country: serde_json::Value,
        is: At<bool>,
    }
    let claims: Claims = whole("country: NO\nis: true\n", &|_| None).unwrap();
    assert_eq!((claims.country, claims.is.value), ("NO".into(), Some(true)));
    let said = whole::<Claims>("country: x\nis: yes\n", &|_| None)
        .err()
        .unwrap();
    assert_eq!(
        said,
        ["line 2, column 5: is: \"yes\" stands where true or false is needed"]
    );
    let said = whole::<Claims>("country: x\nis: \"true\"\n", &|_| None);
    assert_eq!(
        said.err().unwrap(),
        ["line 2, column 5: is: \"true\" stands where true or false is needed, without quotes"]
    );
}

#[test]
fn a_number_that_is_none_or_is_in_quotes_is_told_as_it_is_written() {
    for (count, told) in [
        (
            "1.0",
            "the number 1.0 stands where a whole number up to 4294967295 is needed",
        ),
        (
            "\"1\"",
            "\"1\" stands where a whole number up to 4294967295 is needed, without quotes",
        ),
        (
            "v1",
            "\"v1\" stands where a whole number up to 4294967295 is needed",
        ),
    ] {
        let said = mistakes(&format!("count: {count}\n"));
        assert_eq!(said, [format!("line 1, column 8: count: {told}")]);
    }
}

#[test]
fn a_short_or_empty_variable_leaves_the_words_as_they_are() {
    for value in ["", "e"] {
        let said = parse::<File>("count: ${K:-}\n", &|_| Some(value.to_owned())).1;
        assert_eq!(
            said[0].message,
            "\"${K:-}\" stands where a whole number up to 4294967295 is needed"
        );
    }
}

#[test]
fn a_misspelt_key_is_not_missing_as_well() {
    assert_eq!(
        mistakes("count: 1\nroutes: [{pth: /a}]\n"),
        ["line 2, column 11: routes[0].pth: unknown key \"pth\"; did you mean \"path\"?"]
    );
}

#[test]
fn a_value_that_is_in_its_key_is_not_shown() {
    for (entry, told) in [
        (
            "path:s3cret",
            "path: key \"path\" and its value are one text: write KEY: VALUE",
        ),
        ("path=s3cret", "path: key \"path\" and its value are one"),
        (
            "pth:s3cret",
            "pth: unknown key \"pth\"; did you mean \"path\"?; write KEY: VALUE",
        ),
        (
            "path: /, other:http://u:s3cret@h",
            "other: unknown key \"other\"; known here: path, port; write KEY: VALUE",
        ),
    ] {
        let said = mistakes(&format!("count: 1\nroutes: [{{{entry}}}]\n"));
        let expected = format!(": routes[0].{told}");
        assert!(
            said.len() == 1 && said[0].contains(&expected) && !said[0].contains("s3cret"),
            "{said:#?}"
        );
    }
    let said = mistakes("count: 1\nnamed: {a:s3cret}\n");
    assert!(
        said.len() == 1 && said[0].contains(": named.a: nothing stands where keys"),
        "{said:#?}"
    );
}

#[test]
fn what_is_no_list_and_no_map_is_told_without_its_text() {
    let said = mistakes("count: 1\nroutes: http://u:secret@h\nnamed: http://u:secret@h\n");
    let said = said.join("\n");
    assert!(
        said.contains("routes: a text stands where a list is needed") && !said.contains("secret"),
        "{said}"
    );
    let said = mistakes("count: 1\nnamed: [{a: {path: /a}}]\n");
    assert_eq!(
        said,
        [
            "line 2, column 8: named: a list stands where a map is needed, of names with what they stand for"
        ]
    );
}

#[test]
fn values_come_from_the_environment_and_are_never_shown() {
    let lookup = |name: &str| (name == "NAME").then(|| "s3cret".to_owned());
    let read = |text: &str| {
        let file = whole::<File>(text, &lookup);
        file.map(|file| file.name.and_then(|at| at.value).unwrap_or_default())
            .map_err(|mistakes| mistakes.join("; "))
    };
    assert_eq!(
        read("count: 1\nname: a${NAME}b\n"),
        Ok("as3cretb".to_owned())
    );
    assert_eq!(read("count: 1\nname: ${NONE:-x}\n"), Ok("x".to_owned()));
    for (written, value) in [
        ("$${NAME}", "${NAME}"),
        ("a$${b", "a${b"),
        ("$$${NAME}", "$${NAME}"),
        ("$${NAME}-${NAME}", "${NAME}-s3cret"),
        ("$$NAME $ {}", "$$NAME $ {}"),
    ] {
        let text = format!("count: 1\nname: '{written}'\n");
        assert_eq!(read(&text), Ok(value.to_owned()), "{written}");
    }
    let open = read("count: 1\nname: 'a${b'\n").unwrap_err();
    assert!(open.contains("write $${ for the two characters"), "{open}");
    let missing = read("count: 1\nname: ${NONE}\n").unwrap_err();
    assert_eq!(
        missing,
        "line 2, column 7: name: NONE is not set, or empty: set it, or give a default as ${NONE:-default}"
    );
    for (written, mend) in [
        (
            "${NAME-x}",
            "write ${NAME}, or with a default ${NAME:-default}",
        ),
        (
            "${NAME:?}",
            "write ${NAME}, or with a default ${NAME:-default}",
        ),
        ("${ NAME }", "names no variable: write ${NAME}"),
        (
            "${NONE:-${NAME}}",
            "a \"${\" within another is not expanded",
        ),
        (
            "${NAME:-${NONE}}",
            "a \"${\" within another is not expanded",
        ),
        ("${file:/a/${NAME}}", "within another is not expanded"),
    ] {
        let said = read(&format!("count: 1\nname: '{written}'\n")).unwrap_err();
        assert!(said.contains(mend), "{said}");
    }
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
fn what_is_right_is_read_beside_what_is_wrong() {
    let (file, mistakes, _) = parse::<File>(
        "count: ${NONE}\nname: x\nroutes: [{path: /a, port: -1}, {port: 1}, {path: /b}]\n",
        &|_| None,
    );
    let file = file.unwrap();
    assert_eq!(file.count.value, None);
    assert_eq!(file.name.unwrap().value.as_deref(), Some("x"));
    let routes = file.routes.iter().map(|at| at.value.as_ref());
    let ports: Vec<_> = routes
        .map(|route| route.map(|route| route.port.as_ref().map(|at| at.value)))
        .collect();
    assert_eq!(ports, [Some(Some(None)), None, Some(None)]);
    assert_eq!(mistakes.len(), 3, "{mistakes:#?}");
}

#[test]
fn ten_thousand_routes_are_read_in_seconds_even_unoptimised() {
    let mut text = "count: 1\nroutes:\n".to_owned();
    for index in 0..10_000 {
        text.push_str(&format!("  - {{path: /{index}, port: 80}}\n"));
    }
    assert_eq!(
        whole::<File>(&text, &|_| None).unwrap().routes.len(),
        10_000
    );
}

#[test]
fn a_large_file_may_have_as_much_in_it_as_it_has_bytes() {
    assert!(tree(&"- a\n".repeat(251_000)).is_ok());
    let shared = "- *route\n".repeat(12_000);
    let shared = format!("count: 1\nroutes:\n- &route {{path: /}}\n{shared}");
    let file = whole::<File>(&shared, &|_| None).unwrap();
    assert_eq!(file.routes.len(), 12_001);
}

/// Each of ten lists is ten of the one before.
#[test]
fn aliases_that_make_much_of_little_are_told_with_a_mend() {
    let mut bomb = "a: &a0 x\n".to_owned();
    for n in 1..=10 {
        let before = vec![format!("*a{}", n - 1); 10].join(", ");
        bomb.push_str(&format!("b{n}: &a{n} [{before}]\n"));
    }
    // Large enough for its size to count.
    let said = mistakes(&(bomb + &"# a comment\n".repeat(21_000)));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].contains("write out what they stand for"),
        "{said:?}"
    );
    let deep = "[".repeat(70) + &"]".repeat(70);
    let said = mistakes(&format!("count: {deep}\n"));
    assert!(said[0].contains("more than 32 deep"), "{said:?}");
}

#[test]
fn a_no_break_space_is_told() {
    for (text, place) in [
        ("count: 1\nname:\u{a0}x\nroutes: []\n", "line 2, column 6"),
        ("count: 1\n\u{a0}name: x\n", "line 2, column 1"),
        ("count: \u{a0}1\n", "line 1, column 8"),
        (
            "count: 1\nroutes: [{\u{a0}path: /a}]\n",
            "line 2, column 11",
        ),
    ] {
        let said = mistakes(text);
        assert!(
            said.len() == 1
                && (said[0].starts_with(&format!("{place}: "))
                    || said[0].contains(&format!("; {place} has a ")))
                && said[0].contains("a no-break space (U+00A0)"),
            "{text}: {said:#?}"
        );
    }
}

#[test]
fn a_no_break_space_hides_no_other_mistake() {
    let said = mistakes("# Préfixe\u{a0}: x\nname: \"x\n");
    assert!(said[0].contains("quote"), "{said:#?}");
}

#[test]
fn a_name_that_is_none_is_told_with_what_may_have_been_meant() {
    for (level, mend) in [
        ("of", "did you mean \"off\"?"),
        ("offline", "did you mean \"off\"?"),
        ("never", "known here: off, 1.2"),
    ] {
        let text = format!("level: {level}\n");
        let said = whole::<Named>(&text, &|_| None).unwrap_err();
        let expected = format!("line 1, column 8: level: unknown name \"{level}\"; {mend}");
        assert_eq!(said, [expected]);
    }
    let said = whole::<Named>("level: ${NAME}\n", &|_| Some("hidden".to_owned())).unwrap_err();
    assert!(
        said[0].contains("unknown name \"${NAME}\"; known here"),
        "{said:?}"
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
        whole::<Named>(text, &|_| Some("hidden".to_owned()))
            .unwrap_err()
            .join("\n")
    };
    assert_eq!(
        said("level: 1.2\n"),
        "line 1, column 8: level: the number 1.2 stands where a name is needed; write it in quotes, \"1.2\""
    );
    assert_eq!(
        said("level: false\n"),
        "line 1, column 8: level: the boolean false stands where a name is needed; known here: off, 1.2"
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
