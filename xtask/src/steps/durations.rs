//! How long each step took when it last passed on this machine.

use std::collections::BTreeMap;

use anyhow::Context;
use xshell::Shell;

const FILE: &str = "target/xtask/durations.json";

/// `1` while other work runs on purpose: the times of such runs are not kept.
pub(super) const UNDER_LOAD: &str = "RAMSNAP_UNDER_LOAD";

/// Seconds by suite and step.
#[derive(Debug, Default)]
pub(super) struct Durations(BTreeMap<String, u64>);

impl Durations {
    /// Reads what was kept. A file that cannot be read is as good as none.
    pub(super) fn load(sh: &Shell) -> Self {
        let text = sh.read_file(FILE).unwrap_or_default();
        Self(serde_json::from_str(&text).unwrap_or_default())
    }

    /// Returns the seconds that the step took when it last passed.
    pub(super) fn last(&self, step: &str) -> Option<u64> {
        self.0.get(step).copied()
    }

    /// Keeps the seconds that the step took, unless it ran under load.
    pub(super) fn set(&mut self, sh: &Shell, step: &str, seconds: u64) -> anyhow::Result<()> {
        if sh.var_os(UNDER_LOAD).is_some_and(|load| load == "1") {
            return Ok(());
        }
        self.0.insert(step.into(), seconds);
        let text = serde_json::to_string_pretty(&self.0)?;
        sh.write_file(FILE, text)
            .context("can't keep the duration of a step")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_kept_unless_the_step_ran_under_load() {
        let dir = tempfile::tempdir().expect("a directory");
        let sh = Shell::new().expect("a shell");
        sh.change_dir(dir.path());
        let _idle = sh.push_env(UNDER_LOAD, "0");
        let mut durations = Durations::load(&sh);
        assert_eq!(durations.last("test lints"), None);
        durations.set(&sh, "test lints", 7).expect("written");
        assert_eq!(Durations::load(&sh).last("test lints"), Some(7));
        let _load = sh.push_env(UNDER_LOAD, "1");
        durations.set(&sh, "test lints", 99).expect("ignored");
        assert_eq!(Durations::load(&sh).last("test lints"), Some(7));
    }

    #[test]
    fn a_damaged_file_is_as_good_as_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let sh = Shell::new().expect("a shell");
        sh.change_dir(dir.path());
        sh.write_file(FILE, "{").expect("written");
        assert_eq!(Durations::load(&sh).last("test lints"), None);
    }
}
