//! Records how a processor reports guest accesses that stage 2 denies.
//!
//! A program at exception level 2 of a machine in QEMU protects pages and executes single
//! instructions as a guest. The recording is the golden data of the decoder in `hvf-backend`
//! (`crates/hvf-backend/tests/recorded_syndromes.rs`). It depends on no code of this workspace.
//!
//! Run it by `cargo xtask prove syndromes`.

mod cases;
mod image;
mod machine;
mod recording;

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use harness::packages::{Install, Package};
use xshell::Shell;

use recording::Recording;

const GOLDEN: &str = "crates/hvf-backend/tests/golden/syndromes.json";

const PACKAGES: [Package; 2] = [
    Package::new("llvm", "llvm-mc"),
    Package::new("qemu-system-arm", "qemu-system-aarch64"),
];

/// Record how an emulated processor reports guest accesses that stage 2 denies
///
/// Compares the recording with crates/hvf-backend/tests/golden/syndromes.json. It needs Debian's
/// packages llvm and qemu-system-arm, which it installs as root.
#[derive(Parser)]
struct Syndromes {
    #[command(flatten)]
    install: Install,
    /// Write the recording to the file, instead of comparing it
    #[arg(long)]
    write: bool,
}

fn main() -> ExitCode {
    let task = Syndromes::parse();
    harness::run(|sh| task.run(sh))
}

impl Syndromes {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if !self.install.ensure(sh, &PACKAGES, "syndromes")?.is_empty() {
            let why = "the packages that it needs are not installed";
            if harness::is_step() {
                return harness::leave_out("syndromes", why);
            }
            bail!("nothing was recorded: {why}");
        }
        let cases = cases::all();
        let recording = Recording::new(machine::version(sh)?, machine::execute(sh, &cases)?);
        let exits: usize = recording.records.iter().map(|it| it.exits.len()).sum();
        println!("{}: {} cases, {exits} exits", recording.qemu, cases.len());
        if self.write {
            sh.write_file(GOLDEN, recording.text()?)?;
            return Ok(());
        }
        let golden = sh.read_file(GOLDEN)?;
        let golden: Recording = serde_json::from_str(&golden).context(GOLDEN)?;
        recording.compare(&golden)
    }
}
