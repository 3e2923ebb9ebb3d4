//! The one place where snapshots are taken, checked and restored: by the command-line tool, as an
//! operator would.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;
use xshell::{Shell, cmd};

/// The guest's page, and the memory files', in bytes.
pub(super) const PAGE: u64 = 4096;

pub(super) const LAYOUTS: [&str; 3] = ["raw", "sealed", "packed"];

/// `ramsnap`, built.
#[derive(Clone, Debug)]
pub(super) struct Ramsnap(PathBuf);

impl Ramsnap {
    pub(super) fn build(sh: &Shell) -> anyhow::Result<Self> {
        let features = harness::FEATURES;
        cmd!(
            sh,
            "cargo build --quiet --locked --bin ramsnap --features {features}"
        )
        .quiet()
        .run()?;
        let target = sh.var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
        Ok(Self(sh.current_dir().join(target).join("debug/ramsnap")))
    }
}

impl Ramsnap {
    /// Converts an image, or a file of another program with its format in front.
    pub(super) fn convert(&self, from: &str, out: &Path, more: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(&self.0);
        command.args(["convert", "--quiet", "--force", from, "-o"]);
        run(command.arg(out).args(more)).map(drop)
    }

    /// Returns the regions of the guest's RAM that an image records: address and length.
    pub(super) fn regions(&self, image: &Path) -> anyhow::Result<Vec<(u64, u64)>> {
        let said = run(Command::new(&self.0).args(["info", "--json"]).arg(image))?;
        let images: [Image; 1] = serde_json::from_slice(&said)?;
        let [Image { regions }] = images;
        Ok(regions
            .iter()
            .map(|it| (it.guest_address, it.bytes))
            .collect())
    }
}

/// What is used of the description of an image.
#[derive(Deserialize)]
struct Image {
    regions: Vec<Region>,
}

#[derive(Deserialize)]
struct Region {
    guest_address: u64,
    bytes: u64,
}

/// Snapshots of the RAM of a guest that is paused, in one layout.
#[derive(Clone, Debug)]
pub(super) struct Tool {
    pub ramsnap: Ramsnap,
    pub layout: &'static str,
}

impl Tool {
    /// Writes all of the file `ram` to `out`.
    pub(super) fn dump(&self, ram: &Path, out: &Path) -> anyhow::Result<()> {
        let mut command = self.command("dump");
        command.arg(ram).arg("-o").arg(out);
        run(command.args(["--layout", self.layout])).map(drop)
    }

    /// Writes to `out` what in the file `ram` is not as it was at the end of `chain`.
    pub(super) fn diff(&self, chain: &[&Path], ram: &Path, out: &Path) -> anyhow::Result<()> {
        let mut command = self.reading("diff");
        command.args(chain).arg("--ram").arg(ram).arg("-o").arg(out);
        run(command.args(["--layout", self.layout])).map(drop)
    }

    /// Whether the images are whole and follow each other, as far as this layout can tell.
    pub(super) fn verify(&self, chain: &[&Path]) -> anyhow::Result<()> {
        let mut command = self.reading("verify");
        command.args(chain);
        if self.layout == "raw" {
            command.arg("--allow-raw");
        }
        run(&mut command).map(drop)
    }

    /// Writes `chain` as one full image to `out`.
    pub(super) fn merge(&self, chain: &[&Path], out: &Path) -> anyhow::Result<()> {
        let mut command = self.reading("merge");
        run(command.args(chain).arg("-o").arg(out)).map(drop)
    }

    /// Makes the file `ram` out of a full image.
    pub(super) fn restore(&self, image: &Path, ram: &Path) -> anyhow::Result<()> {
        let mut command = self.reading("restore");
        run(command.arg(image).arg("-o").arg(ram)).map(drop)
    }

    /// A verb that reads images of this layout. Raw ones don't say that they are.
    fn reading(&self, verb: &str) -> Command {
        let mut command = self.command(verb);
        if self.layout == "raw" {
            command.args(["--format", "raw"]);
        }
        command
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.ramsnap.0);
        command.args([verb, "--quiet"]);
        command
    }
}

/// Runs ramsnap, and returns its output.
fn run(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.output().context("can't run ramsnap")?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!("{command:?} ended with {}: {}", output.status, said.trim())
}
