//! The JSON of each verb is what `docs/command-line.schema.json` describes.

#![cfg(target_os = "linux")]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rstest::rstest;
use serde_json::{Value, json};
use support::{Ended, Work};

fn schema() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/command-line.schema.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns what in `value` does not conform. Supports the keywords that the schema uses.
fn violations(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let pointer = name.strip_prefix('#').unwrap();
        return violations(root, root.pointer(pointer).unwrap(), value, at);
    }
    let mut found = Vec::new();
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let is_type = match &schema["type"] {
        Value::Null => true,
        Value::Array(types) => types.contains(&kind.into()),
        one => one == kind,
    };
    if !is_type {
        return vec![format!("{at}: {kind}, not {}", schema["type"])];
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        found.push(format!("{at}: {value} is none of {values:?}"));
    }
    if schema["pattern"].is_string() {
        let text = value.as_str().unwrap();
        let valid = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !valid {
            found.push(format!("{at}: {text} is not an id"));
        }
    }
    if let Some(variants) = schema["oneOf"].as_array() {
        let fits = |variant: &&Value| violations(root, variant, value, at).is_empty();
        if variants.iter().filter(fits).count() != 1 {
            found.push(format!("{at}: {value} is not exactly one of the variants"));
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(violations(
            root,
            &schema["items"],
            item,
            &format!("{at}/{index}"),
        ));
    }
    if let (Some(object), Some(properties)) = (value.as_object(), schema["properties"].as_object())
    {
        for required in schema["required"].as_array().into_iter().flatten() {
            if !object.contains_key(required.as_str().unwrap()) {
                found.push(format!("{at}: lacks {required}"));
            }
        }
        for (key, value) in object {
            match properties.get(key) {
                Some(schema) => {
                    found.extend(violations(root, schema, value, &format!("{at}/{key}")));
                }
                None => found.push(format!("{at}: {key} is not described")),
            }
        }
    }
    found
}

#[track_caller]
fn assert_described(verb: &str, document: &Value) {
    let schema = schema();
    let of_verb = &schema["$defs"][verb];
    assert!(of_verb.is_object(), "{verb} is not described");
    let found = violations(&schema, of_verb, document, verb);
    assert!(found.is_empty(), "{found:#?} in {document:#}");
}

#[rstest]
#[case::of_all_layouts("info full.mem d1.mem sealed.mem raw:ram")]
#[case::of_paths("info odd")]
#[case::whole("verify full.mem d1.mem")]
#[case::one("verify full.mem")]
#[case::damaged("verify rotten.mem")]
#[case::not_zero("verify spoiled.mem")]
#[case::unusable("verify cut.mem d1.mem")]
#[case::missing("verify none.mem")]
#[case::not_linked("verify full.mem d2.mem")]
#[case::raw("verify raw:ram full.mem")]
#[case::links_unnamed("verify raw:first raw:holes.raw --allow-raw")]
#[case::images("map full.mem d1.mem raw:ram")]
#[case::difference("diff full.mem --ram ram")]
#[case::no_difference("diff full.mem --ram first")]
#[case::states("compare full.mem --to full.mem --to d1.mem")]
#[case::a_directory("list .")]
#[case::planned("compact dir --keep 1 --dry-run")]
#[case::compacted("compact dir --keep 1")]
#[case::nothing_to_compact("compact dir --keep 9")]
#[case::swept("sweep .")]
#[case::not_swept("sweep none")]
fn each_document_is_described(#[case] command: &str) {
    let work = Work::with_chain();
    fs::create_dir(work.path("dir")).unwrap();
    for name in ["full.mem", "d1.mem"] {
        work.copy(name, &format!("dir/{name}"));
    }
    work.good("convert full.mem -o sealed.mem --layout sealed");
    work.good("diff raw:first --ram ram -o holes.raw --layout raw");
    work.copy("full.mem", "rotten.mem");
    work.rot("rotten.mem", 5000);
    work.copy("sealed.mem", "spoiled.mem");
    work.rot("spoiled.mem", 5 << 20);
    let full = work.read("full.mem");
    fs::write(work.path("cut.mem"), &full[..full.len() - 1]).unwrap();
    let name = ".atomic-file-00000000-0123456789abcdef.stage";
    fs::write(work.path(name), "").unwrap();
    let odd = OsStr::from_bytes(b"odd\xff.mem");
    fs::copy(work.path("full.mem"), work.path("").join(odd)).unwrap();
    let mut run = match command {
        "info odd" => work.command("info"),
        other => work.command(other),
    };
    if command == "info odd" {
        run.arg(odd);
    }
    let ended = Ended::of(run.arg("--json"));
    assert!(matches!(ended.code, Some(0 | 1 | 3)), "{ended:?}");
    assert_described(command.split(' ').next().unwrap(), &ended.json());
}

/// The schema has no verb that prints no JSON, and each that does is in it.
#[test]
fn each_verb_with_json_is_in_the_schema() {
    let work = Work::empty();
    let schema = schema();
    let described = schema["$defs"].as_object().unwrap();
    let help = work.good("--help").out;
    let (_, verbs) = help.split_once("Commands:").unwrap();
    let (verbs, _) = verbs.split_once("Global options:").unwrap();
    let verbs = verbs
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    for verb in verbs.filter(|verb| !verb.is_empty() && *verb != "help") {
        let has_json = work.good(&format!("{verb} --help")).out.contains("--json");
        assert_eq!(described.contains_key(verb), has_json, "{verb}");
    }
}

#[test]
fn what_is_not_described_is_found() {
    let schema = schema();
    let of_diff = |value: Value| violations(&schema, &schema["$defs"]["diff"], &value, "diff");
    let good = json!({ "page_bytes": 4096, "pages": 0, "bytes": 0, "runs": [] });
    assert_eq!(of_diff(good.clone()), [""; 0]);
    for (pointer, value) in [("/pages", json!("0")), ("/runs", json!([{ "offset": 1 }]))] {
        let mut other = good.clone();
        *other.pointer_mut(pointer).unwrap() = value;
        assert_eq!(of_diff(other.clone()).len(), 1, "{other}");
    }
    let mut more = good;
    more["more"] = json!(1);
    assert_eq!(of_diff(more).len(), 1);
}
