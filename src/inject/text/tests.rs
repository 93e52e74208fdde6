//! The rules of `text`, as tests.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// What becomes of a text when its only document's value is changed.
fn check(text: &str, change_value: impl Fn(&mut Value), wanted: &str) {
    let nodes = parse(text).unwrap();
    let mut new: Vec<_> = nodes.iter().map(Node::value).collect();
    change_value(&mut new[0]);
    let changed = change(text, &nodes, &new);
    assert_eq!(changed.text, wanted);
    let read: Vec<_> = parse(wanted).unwrap().iter().map(Node::value).collect();
    assert_eq!(read, new);
}

#[test]
fn what_does_not_change_stays_as_it_was_written() {
    check(
        "# top\nspec:   # a spec\n  'replicas': 0x2\n  list:\n  # first\n  - name: \"a\"   # one\n    port: 1\n  # tail\nlast: |\n  text\n\n",
        |value| {
            value["spec"]["list"][0]["port"] = json!(2);
            value["spec"]["list"]
                .as_array_mut()
                .unwrap()
                .insert(0, json!({"name": "new", "args": ["x"]}));
            value["spec"]["list"]
                .as_array_mut()
                .unwrap()
                .push(json!("end"));
            value["spec"]["more"] = json!({"a": {"b": []}});
        },
        "# top\nspec:   # a spec\n  'replicas': 0x2\n  list:\n  - name: new\n    args: [x]\n  # first\n  - name: \"a\"   # one\n    port: 2\n  - end\n  more:\n    a:\n      b: []\n  # tail\nlast: |\n  text\n\n",
    );
}

#[test]
fn lines_of_flow_style_lose_and_gain_in_place() {
    check(
        "a: {x: 1,   # one\n  y: 2, z: [1, 2,   3]} # end\n",
        |value| {
            value["a"].as_object_mut().unwrap().remove("y");
            value["a"]["z"] = json!(["in", 2, "a, b"]);
            value["a"]["q"] = json!({"k": null});
        },
        "a: {x: 1,   # one\n  z: [in, 2,   \"a, b\"], q: {k: null}} # end\n",
    );
}

#[test]
fn what_is_merged_is_overridden_where_it_changes() {
    check(
        "<<: &base {image: a, args: [x]}\nweb:\n  <<: *base\n  name: web\n",
        |value| value["web"]["image"] = json!("b"),
        "<<: &base {image: a, args: [x]}\nweb:\n  <<: *base\n  name: web\n  image: b\n",
    );
}

#[test]
fn plain_scalars_are_read_as_kubernetes_does() {
    let value = parse("[0644, 0o17, 0x1f, 1_0, 1.50, 1e3, yes, Off, ~, 1.2.3, 12:30, 08, -5, +5, !!str 5, 0.1.0, .5, -9223372036854775808, 18446744073709551615]").unwrap()[0].value();
    assert_eq!(
        value,
        json!([
            420,
            15,
            31,
            "1_0",
            1.5,
            1000.0,
            true,
            false,
            null,
            "1.2.3",
            "12:30",
            8,
            -5,
            5,
            "5",
            "0.1.0",
            0.5,
            i64::MIN,
            u64::MAX
        ])
    );
}

/// Texts that are hard to write, and any others.
fn texts() -> impl Strategy<Value = String> {
    const HARD: &[&str] = &[
        "",
        " ",
        "~",
        "null",
        "yes",
        "No",
        "0x1f",
        "0o17",
        "0644",
        "1_000",
        "1e3",
        ".5",
        "-",
        "--",
        "---",
        "- a",
        "-1",
        "a: b",
        "a:",
        "a #b",
        "#",
        "&a",
        "*a",
        "!t",
        "|",
        ">",
        "%",
        "@",
        "`",
        "'",
        "\"",
        "it's \"so\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        "a, b",
        "<<",
        "=",
        "a\nb",
        "a\n",
        "a\n\n",
        "\na",
        " a\nb",
        "a \nb ",
        "a\tb",
        "\t",
        "a\r\nb",
        "\u{85}",
        "\u{2028}",
        "\u{feff}",
        "ä",
        "😀",
        "12:30:45",
        "2026-11-26",
        "y",
        "?",
        "? a",
        ":",
        "...",
        "a\n---\nb",
        "a\n  b\n",
    ];
    prop_oneof![proptest::sample::select(HARD).prop_map(str::to_owned), ".*"]
}

fn values() -> impl Strategy<Value = Value> {
    let scalars = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        texts().prop_map(Value::from),
    ];
    scalars.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map(texts(), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_as_it_was(value in values()) {
        let like = &parse("a").unwrap()[0];
        for text in [emit::document(like, &value), emit::flow(&value, false), emit::flow(&value, true), emit::json(like, &value)] {
            let read = parse(&text);
            prop_assert!(read.is_ok(), "{text:?}: {read:?}");
            let read = read.unwrap();
            prop_assert_eq!(&read[0].value(), &value, "{:?}", text);
        }
    }

    #[test]
    fn a_text_becomes_what_it_should_whatever_that_is(
        old in values(),
        new in values(),
        newline in proptest::sample::select(&["\n", "\r\n"][..]),
    ) {
        let like = &parse("a").unwrap()[0];
        for text in [emit::document(like, &old), emit::flow(&old, true)] {
            let text = format!("# one\n---\n{text}\n---\nb: 1 # two\n").replace('\n', newline);
            let nodes = parse(&text).unwrap();
            let values = [new.clone(), json!({"b": 1})];
            let made = change(&text, &nodes, &values).text;
            let read: Vec<_> = parse(&made).unwrap().iter().map(Node::value).collect();
            prop_assert_eq!(&read[..], &values[..], "{:?} {:?}", text, made);
            prop_assert!(made.ends_with("# two\n".replace('\n', newline).as_str()));
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in ".*") {
        if let Ok(nodes) = parse(&text) {
            let values: Vec<_> = nodes.iter().map(Node::value).collect();
            prop_assert_eq!(change(&text, &nodes, &values).text, text);
        }
    }
}

/// As the YAML 1.1 of Kubernetes has numbers, whichever this reader knows.
#[test]
fn a_text_that_some_reader_takes_for_a_number_is_quoted() {
    for text in [
        ".inf", "-.inf", ".Inf", ".NaN", "-0b1", "-0x1f", "-1e3", ".5e3",
    ] {
        check(
            "image: a\n",
            |value| value["image"] = json!(text),
            &format!("image: \"{text}\"\n"),
        );
    }
    for text in ["./a", "-e", "--port=1", ".env"] {
        check(
            "image: a\n",
            |value| value["image"] = json!(text),
            &format!("image: {text}\n"),
        );
    }
}
