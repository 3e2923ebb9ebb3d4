//! `test` and `ci` beside a busy loop on each core: nothing in them may depend on load.

use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

use super::durations::UNDER_LOAD;
use super::suite::Context;

/// How often both suites must pass in a row.
const TIMES: u32 = 3;

/// Busy loops, one pinned to each core, until dropped.
struct Load(Vec<Child>);

impl Load {
    fn begin() -> anyhow::Result<Self> {
        let cores = std::thread::available_parallelism()?.get();
        let mut load = Self(Vec::new());
        for core in 0..cores {
            let mut busy = Command::new("setpriv");
            // The loops end with this process, however it ends.
            busy.args(["--pdeathsig", "KILL", "taskset", "--cpu-list"])
                .arg(core.to_string())
                .args(["sh", "-c", "while :; do :; done"])
                .stdin(Stdio::null());
            load.0
                .push(busy.spawn().context("can't start a busy loop")?);
        }
        println!("{cores} busy loops, one pinned to each core");
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs both suites, several times, beside busy loops.
pub(super) fn run(context: &Context<'_>) -> anyhow::Result<()> {
    let _load = Load::begin()?;
    let _times = context.sh.push_env(UNDER_LOAD, "1");
    for time in 1..=TIMES {
        for suite in ["test", "ci"] {
            println!("{suite} beside busy loops, {time} of {TIMES}");
            context.xtask(suite).run()?;
        }
    }
    Ok(())
}
