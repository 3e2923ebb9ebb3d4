//! What was not run for lack of something, collected from all processes of a run.

use std::collections::BTreeMap;

use anyhow::Context;
use test_machine::NOT_RUN;
use xshell::Shell;

/// The list that tests append to, as `test_machine::not_run` writes it.
pub(super) struct LeftOut {
    path: std::path::PathBuf,
}

impl LeftOut {
    /// Begins an empty list, or continues that of the suite that this process is part of. Processes
    /// that `sh` starts from now on append to it.
    pub(super) fn begin(sh: &Shell) -> anyhow::Result<Self> {
        if let Some(path) = sh.var_os(NOT_RUN) {
            return Ok(Self { path: path.into() });
        }
        let path = sh.current_dir().join("target/xtask/not-run.txt");
        sh.write_file(&path, "")
            .context("can't create the list of tests that are not run")?;
        sh.set_var(NOT_RUN, &path);
        Ok(Self { path })
    }

    /// Appends `what` to the list.
    pub(super) fn add(&self, what: &str, why: &str) -> anyhow::Result<()> {
        use std::io::Write;

        let list = std::fs::File::options().append(true).open(&self.path);
        list.and_then(|mut list| writeln!(list, "NOT RUN {what}: {why}"))
            .context("can't append to the list of tests that are not run")
    }

    /// Prints the list by reason.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let list = std::fs::read_to_string(&self.path)
            .context("can't read the list of tests that were not run")?;
        print!("{}", by_reason(&list));
        Ok(())
    }
}

/// Returns the list with one line for each reason, which says how much was not run for it.
fn by_reason(list: &str) -> String {
    let mut reasons = BTreeMap::<_, Vec<_>>::new();
    for line in list.lines() {
        let entry = line.strip_prefix("NOT RUN ").unwrap_or(line);
        // Names of tests contain `::`, and reasons may contain `: `.
        let (what, why) = entry.split_once(": ").unwrap_or((entry, "no reason given"));
        let names = reasons.entry(why).or_default();
        if !names.contains(&what) {
            names.push(what);
        }
    }
    if reasons.is_empty() {
        return String::new();
    }
    let mut text = "\nnot run:\n".to_owned();
    for (why, names) in reasons {
        text += &format!("  {why} ({}): {}\n", names.len(), names.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_run_is_grouped_by_reason_and_named_once() {
        let list = "NOT RUN a::b: this machine has no kvm\nNOT RUN c: no: rustup\n\
                    NOT RUN a::b: this machine has no kvm\nNOT RUN d: this machine has no kvm\n";
        let expected = "\nnot run:\n  no: rustup (1): c\n  this machine has no kvm (2): a::b, d\n";
        assert_eq!(by_reason(list), expected);
    }

    #[test]
    fn an_empty_list_prints_nothing() {
        assert_eq!(by_reason(""), "");
    }
}
