//! Texts that only change on purpose: compared with what is committed, and written with `FAIRVAULT_SNAPSHOTS=write`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;

/// Whether snapshots are to be written instead of compared.
fn is_writing() -> bool {
    std::env::var("FAIRVAULT_SNAPSHOTS").is_ok_and(|word| word == "write")
}

/// Fails unless the file, by its path from the top of the checkout, is this text.
pub fn compare(file: &str, text: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    if is_writing() {
        return Ok(std::fs::write(&path, text)?);
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    if known == text {
        return Ok(());
    }
    let number = known.lines().zip(text.lines()).take_while(|(a, b)| a == b).count();
    let line = |text: &str| text.lines().nth(number).unwrap_or("(the end)").to_owned();
    ensure!(
        known == text,
        "{file} is not what is said now, from line {} on:\n  committed: {}\n  now:       {}\n\
         if that is meant: FAIRVAULT_SNAPSHOTS=write cargo test -p fairvault-tests --test interface",
        number + 1,
        line(&known),
        line(text)
    );
    Ok(())
}

/// The shape of a JSON object: a line for each member, with its path and types.
pub fn shape(value: &Value) -> String {
    let mut lines = BTreeMap::new();
    collect("", value, &mut lines);
    let lines = lines
        .into_iter()
        .map(|(path, types)| format!("{path}: {}\n", types.join(" or ")));
    lines.collect()
}

fn collect(path: &str, value: &Value, lines: &mut BTreeMap<String, Vec<&'static str>>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(list) => {
            for element in list {
                collect(&format!("{path}[]"), element, lines);
            }
            "array"
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                let below = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                collect(&below, field, lines);
            }
            "object"
        }
    };
    let types = lines
        .entry(if path.is_empty() {
            ".".to_owned()
        } else {
            path.to_owned()
        })
        .or_default();
    if !types.contains(&kind) {
        types.push(kind);
        types.sort_unstable();
    }
}
