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
        "a: {x: 1,   # one\n  z: [in, 2, \"a, b\"], q: {k: null}} # end\n",
    );
}
