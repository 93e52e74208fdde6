//! The JSON Schema of the file, for editors: that of its types, and of what stands for a value until it is read. Must not know a key of the file.

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use serde_json::{Value, json};

use super::raw;

/// Has a value that is yet to be put in: `${NAME}`, `${NAME:-60s}`, `${file:/path}`.
const EXPANDED: &str = r"\$\{";

pub fn schema() -> Value {
    let settings = SchemaSettings::default().with_transform(RecursiveTransform(as_written));
    let generator = settings.into_generator();
    generator.into_root_schema_for::<raw::File>().to_value()
}

/// What the type of a single value says, made what may stand for it in a file.
fn as_written(schema: &mut Schema) {
    without_null(schema);
    if let Some(Value::Array(named)) = schema.get("oneOf")
        && named.iter().all(is_name)
    {
        // One of these, or what will be.
        let mut any = named.clone();
        any.iter_mut()
            .for_each(|name| drop(name.as_object_mut().map(|name| name.remove("type"))));
        any.push(json!({ "type": "string", "pattern": EXPANDED }));
        schema.remove("oneOf");
        schema.insert("anyOf".to_owned(), Value::Array(any));
        return;
    }
    let types = match schema.get("type") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(several)) => several
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => return,
    };
    let is = |name: &str| types.iter().any(|own| own == name);
    if is("string") {
        if let Some(names) = schema.remove("enum") {
            schema.remove("type");
            let any = json!([{ "enum": names }, { "type": "string", "pattern": EXPANDED }]);
            schema.insert("anyOf".to_owned(), any);
            return;
        }
        match schema.get("pattern").and_then(Value::as_str) {
            Some(EXPANDED) => {}
            Some(pattern) => {
                let pattern = json!(format!("{pattern}|{EXPANDED}"));
                schema.insert("pattern".to_owned(), pattern);
            }
            // A number is read as a text, too.
            None => set_types(schema, types, "integer"),
        }
    } else if is("integer") || is("number") || is("boolean") {
        if schema
            .get("format")
            .is_some_and(|format| format == "uint32")
        {
            let largest = || json!(u32::MAX);
            schema
                .ensure_object()
                .entry("maximum")
                .or_insert_with(largest);
        }
        schema.insert("pattern".to_owned(), json!(EXPANDED));
        set_types(schema, types, "string");
    }
}

/// A key that may be left out is not to stand there without a value.
fn without_null(schema: &mut Schema) {
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|of| of != "null");
        if let [alone] = types.as_slice() {
            let alone = alone.clone();
            schema.insert("type".to_owned(), alone);
        }
    }
    for several in ["anyOf", "enum"] {
        if let Some(Value::Array(any)) = schema.get_mut(several) {
            any.retain(|one| !one.is_null() && one["type"] != "null");
        }
    }
}

fn set_types(schema: &mut Schema, mut types: Vec<String>, another: &str) {
    types.push(another.to_owned());
    schema.insert("type".to_owned(), json!(types));
}

/// Whether a schema is of names alone.
fn is_name(schema: &Value) -> bool {
    schema["type"] == "string" && (schema.get("const").is_some() || schema.get("enum").is_some())
}
