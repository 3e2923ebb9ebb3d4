//! A check of the check: it finds lines that are wrong on macOS alone, and passes the same crate
//! unbroken.

use std::path::Path;
use std::process::Output;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use xshell::{Shell, cmd};

use crate::toolchain::Toolchain;

/// The crate that is copied and broken.
const CRATE: &str = "crates/sparse-file";

/// Its only dependency that is a crate of this workspace.
const DEPENDENCY: &str = "crates/host-memory";

/// The file that is broken: no other system compiles it.
const FILE: &str = "src/sys/macos.rs";

/// A change that makes a line wrong on macOS.
struct Break {
    right: &'static str,
    wrong: &'static str,
    /// The error's code.
    code: &'static str,
    /// How many lines below the change the error is reported.
    below: usize,
}

const BREAKS: [Break; 2] = [
    Break {
        right: "libc::F_PUNCHHOLE,",
        wrong: "libc::F_PUNCH_HOLE,",
        code: "E0425",
        below: 0,
    },
    Break {
        right: "    // SAFETY: F_NOCACHE takes",
        wrong: "    // F_NOCACHE takes",
        code: "clippy::undocumented_unsafe_blocks",
        below: 1,
    },
];

/// Lints a copy of a crate as it is, then with one line broken at a time.
pub(crate) fn run(sh: &Shell, toolchain: Toolchain, dir: &Path) -> anyhow::Result<()> {
    let copy = dir.join("self-check");
    let file = copy.join(CRATE).join(FILE);
    copy_crate(sh, &copy)?;
    let source = sh.read_file(&file)?;

    let output = lint(sh, toolchain, &copy)?;
    ensure!(
        output.status.success(),
        "the unchanged copy of {CRATE} in {} fails:\n{}",
        copy.display(),
        explanation(&output)
    );
    println!("self-check: {CRATE} passes unbroken");
    for broken in &BREAKS {
        let (text, line) = broken.apply(&source)?;
        sh.write_file(&file, text)?;
        let output = lint(sh, toolchain, &copy)?;
        let found = errors(std::str::from_utf8(&output.stdout)?)?;
        let expected = (broken.code.to_owned(), line);
        if output.status.success() || !found.contains(&expected) {
            bail!(
                "the self-check expects {} at line {line} of {CRATE}/{FILE} with {:?} in place of {:?}; found: {found:?}\n{}",
                broken.code,
                broken.wrong,
                broken.right,
                explanation(&output)
            );
        }
        println!(
            "self-check: {} is found at line {line} of {FILE}",
            broken.code
        );
    }
    Ok(())
}

impl Break {
    /// The broken source, and the line of the error.
    fn apply(&self, source: &str) -> anyhow::Result<(String, usize)> {
        let at = source
            .find(self.right)
            .with_context(|| format!("{CRATE}/{FILE} has no {:?} to break", self.right))?;
        let line = source[..at].matches('\n').count() + 1 + self.below;
        Ok((source.replacen(self.right, self.wrong, 1), line))
    }
}

/// A workspace of the crate and its dependency, with this workspace's lints and versions.
fn copy_crate(sh: &Shell, copy: &Path) -> anyhow::Result<()> {
    let workspace = format!(
        "[workspace]\nresolver = \"3\"\nmembers = [{CRATE:?}, {DEPENDENCY:?}]\n{}",
        sections(&sh.read_file("Cargo.toml")?, |name| name
            .starts_with("workspace."))
    );
    sh.write_file(copy.join("Cargo.toml"), workspace)?;
    for name in [CRATE, DEPENDENCY] {
        let krate = copy.join(name);
        sh.remove_path(&krate)?;
        sh.create_dir(&krate)?;
        cmd!(sh, "cp -R {name}/src {name}/README.md {krate}")
            .quiet()
            .run()?;
        // Test support is a crate of this workspace, and no test is linted here.
        let manifest = sections(&sh.read_file(format!("{name}/Cargo.toml"))?, |name| {
            name != "dev-dependencies"
        });
        sh.write_file(krate.join("Cargo.toml"), manifest)?;
    }
    sh.copy_file("Cargo.lock", copy.join("Cargo.lock"))?;
    Ok(())
}

/// The sections of a manifest whose names are wanted.
fn sections(manifest: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut keep = false;
    let mut kept = String::new();
    for line in manifest.lines() {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|line| line.strip_suffix(']'))
        {
            keep = wanted(name);
        }
        if keep {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

fn lint(sh: &Shell, toolchain: Toolchain, copy: &Path) -> anyhow::Result<Output> {
    let lint = toolchain
        .cargo(sh, "clippy")
        .args(["--lib", "--message-format=json", "--manifest-path"])
        .arg(copy.join(CRATE).join("Cargo.toml"));
    Ok(lint.quiet().ignore_status().output()?)
}

/// What cargo and the compiler print for people: diagnostics are in the JSON on standard output.
fn explanation(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        text += message["message"]["rendered"].as_str().unwrap_or_default();
    }
    text
}

/// The codes of the errors in the broken file, and their lines, from cargo's JSON messages.
fn errors(messages: &str) -> anyhow::Result<Vec<(String, usize)>> {
    let mut found = Vec::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message)?;
        let message = &message["message"];
        if message["level"] != "error" {
            continue;
        }
        for span in message["spans"].as_array().into_iter().flatten() {
            let in_file = span["file_name"]
                .as_str()
                .is_some_and(|name| name.ends_with(FILE));
            if let (true, Some(true), Some(code), Some(line)) = (
                in_file,
                span["is_primary"].as_bool(),
                message["code"]["code"].as_str(),
                span["line_start"].as_u64(),
            ) {
                found.push((code.to_owned(), usize::try_from(line)?));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unwanted_sections_of_a_manifest_are_dropped() {
        let manifest = "# Words.\n[a]\nx = [\n]\n[b.c]\ny = 1\n[d]\nz = 2\n";
        let kept = sections(manifest, |name| name != "d");
        assert_eq!(kept, "[a]\nx = [\n]\n[b.c]\ny = 1\n");
    }

    #[test]
    fn errors_have_code_and_line_of_the_primary_span() {
        let messages = r#"{"reason":"compiler-artifact"}
{"message":{"level":"warning","code":{"code":"unused"},"spans":[{"file_name":"src/sys/macos.rs","is_primary":true,"line_start":1}]}}
{"message":{"level":"error","code":{"code":"E0425"},"spans":[{"file_name":"crates/sparse-file/src/sys/macos.rs","is_primary":true,"line_start":41},{"file_name":"src/sys/macos.rs","is_primary":false,"line_start":2}]}}
{"message":{"level":"error","code":null,"spans":[]}}"#;
        let found = errors(messages).expect("JSON");
        assert_eq!(found, [("E0425".to_owned(), 41)]);
    }

    #[test]
    fn a_break_is_found_below_the_changed_line() {
        let [_, comment] = BREAKS;
        let source = "fn f() {\n    // SAFETY: F_NOCACHE takes an int.\n    unsafe {}\n}\n";
        let (text, line) = comment.apply(source).expect("the line is there");
        assert_eq!(line, 3);
        assert!(
            text.contains("\n    // F_NOCACHE takes an int.\n"),
            "{text}"
        );
        comment.apply("fn f() {}\n").expect_err("nothing to break");
    }
}
