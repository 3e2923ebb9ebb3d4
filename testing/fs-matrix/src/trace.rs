//! A child's system calls as `strace` lists them.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use scenarios::child::Child;

/// One call that a child made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub name: String,
    /// The line as strace prints it, descriptors with their paths.
    pub line: String,
    /// How many calls of this name the process has made, this one included: what `strace -e
    /// inject=…:when=` counts.
    pub nth: u32,
}

impl Call {
    fn parse(line: &str) -> Option<(&str, &str)> {
        // With -f each line starts with the process's id.
        let line = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        let name = line.split('(').next()?;
        let is_name = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        is_name.then_some((name, line))
    }

    pub(crate) fn succeeded(&self) -> bool {
        self.line.rsplit(" = ").next().is_some_and(|result| {
            result
                .trim_start()
                .starts_with(|digit: char| digit.is_ascii_digit())
        })
    }

    /// The strings in quotes: file names.
    pub(crate) fn strings(&self) -> Vec<&str> {
        self.line.split('"').skip(1).step_by(2).collect()
    }

    /// The path of the first argument, a descriptor.
    pub(crate) fn descriptor_path(&self) -> Option<&str> {
        let rest = self.line.split_once('<')?.1;
        Some(rest.split_once('>')?.0)
    }
}

/// Whether strace is here and may trace.
pub(crate) fn available() -> bool {
    test_machine::Need::Strace.is_met()
}

/// The calls named in `which` (strace's list syntax) that `child` makes, in order.
pub(crate) fn record(child: &Child, which: &str, log: &Path) -> anyhow::Result<Vec<Call>> {
    let arguments = [
        "strace",
        "-qq",
        "-y",
        "-s",
        "300",
        "-e",
        &format!("trace={which}"),
        "-o",
    ];
    let mut wrapper: Vec<String> = arguments.map(String::from).into();
    wrapper.push(log.display().to_string());
    let output = child
        .command(&wrapper)?
        .output()
        .context("can't run strace")?;
    if !output.status.success() {
        bail!(
            "the traced writer failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = fs::read_to_string(log)?;
    let _ = fs::remove_file(log);
    let mut calls: Vec<Call> = Vec::new();
    for (name, line) in text.lines().filter_map(Call::parse) {
        let nth = 1 + calls.iter().filter(|call| call.name == name).count() as u32;
        let (name, line) = (name.to_owned(), line.to_owned());
        calls.push(Call { name, line, nth });
    }
    Ok(calls)
}

/// Runs `child` and kills it when it enters `call`. Whether it died of that.
pub(crate) fn kill_at(child: &Child, call: &Call) -> anyhow::Result<bool> {
    use std::os::unix::process::ExitStatusExt;

    let inject = format!("inject={}:signal=KILL:when={}", call.name, call.nth);
    let wrapper = ["strace", "-qq", "-e", &inject, "-o", "/dev/null"];
    let output = child
        .command(&wrapper.map(String::from))?
        .output()
        .context("can't run strace")?;
    // strace ends as its tracee did.
    Ok(output.status.signal() == Some(nix::libc::SIGKILL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_strace_is_taken_apart() {
        let line =
            r#"12  renameat(3</mnt/a b>, ".atomic-file-0-0.stage", 3</mnt/a b>, "vm.mem") = 0"#;
        let (name, line) = Call::parse(line).expect("a call");
        assert_eq!(name, "renameat");
        let call = Call {
            name: name.into(),
            line: line.into(),
            nth: 1,
        };
        assert!(call.succeeded());
        assert_eq!(call.strings(), [".atomic-file-0-0.stage", "vm.mem"]);
        assert_eq!(call.descriptor_path(), Some("/mnt/a b"));
        assert_eq!(Call::parse("+++ killed by SIGKILL +++"), None);
        let failed = Call {
            line: "fsync(4</x>) = -1 EIO (Input/output error)".into(),
            ..call
        };
        assert!(!failed.succeeded());
    }
}
