//! `cargo xtask qemu-e2e`.

mod chain;
mod console;
mod files;
mod guest;
mod qmp;
mod tool;
mod verify;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use harness::interrupt::Interrupt;
use harness::packages::Install;
use indicatif::BinaryBytes;
use xshell::Shell;

use chain::{Chain, name, paths, seconds};
use guest::{Guest, Kit, RAM, Room};
use tool::{LAYOUTS, Ramsnap, Tool};
use verify::Proof;

/// Snapshot a Linux guest in QEMU, restore the chain into another QEMU, and prove that it continues
/// correctly
///
/// QEMU emulates a machine whose RAM is a file. In it, Debian's kernel runs a loop that writes
/// files of random bytes to a tmpfs and checks the files of earlier rounds. Raw, sealed and packed,
/// a full snapshot and two diffs of the RAM are taken with `ramsnap`, while QEMU saves the devices.
/// Each chain is verified, merged and restored, and a second QEMU resumes from it. Its rounds must
/// follow those of the last snapshot, and find all files intact. The same is done with one page
/// corrupted, and with the last diff left out; both must be detected. An ELF core that QEMU dumps,
/// and the RAM that a QEMU of version 9.0 or newer saves with mapped-ram, must become the same
/// image; gdb and drgn, if installed, must read an ELF core of it. Exit code 0 means that all of
/// this held.
///
/// On Debian, for x86-64: installs QEMU if it is missing (as root), and downloads Debian's kernel.
#[derive(Parser)]
#[command(name = "cargo xtask qemu-e2e", bin_name = "cargo xtask qemu-e2e")]
struct QemuE2e {
    /// The directory for RAM and snapshots, about 1 GiB: choose the file system to write to
    /// [default: target/qemu-e2e]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Keep the RAM, the snapshots and the output of the consoles
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    install: Install,
}

/// Rounds before the first snapshot: by then the guest has begun to remove old files.
const BEFORE: u64 = 15;
/// Rounds between snapshots.
const BETWEEN: u64 = 6;
const DIFFS: usize = 2;

pub(crate) fn main() -> ExitCode {
    let e2e = QemuE2e::parse();
    harness::run(|sh| e2e.run(sh))
}

impl QemuE2e {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let interrupt = Interrupt::catch()?;
        let home = sh.current_dir().join("target/qemu-e2e");
        fs::create_dir_all(&home).with_context(|| format!("can't make {}", home.display()))?;
        // Before anything is installed or downloaded.
        let place = self.dir.as_deref().unwrap_or(&home);
        let dir = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(place)
            .with_context(|| format!("can't make a directory in {}", place.display()))?;
        let missing = self.install.ensure(sh, guest::PACKAGES, "qemu-e2e")?;
        if let Some(package) = missing.first() {
            bail!(
                "guests need {}, which is in the package {}",
                package.shows,
                package.name
            );
        }
        let kit = Kit::prepare(sh, &home, self.install.allowed())?;
        let ramsnap = Ramsnap::build(sh)?;
        let room = Room {
            kit: &kit,
            dir: dir.path(),
            interrupt: &interrupt,
        };
        let done = prove(&room, &ramsnap);
        if self.keep {
            println!("kept: {}", dir.keep().display());
        } else {
            dir.close().context("can't remove the snapshots")?;
        }
        done
    }
}

fn prove(room: &Room<'_>, ramsnap: &Ramsnap) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut guest = room.boot("ram")?;
    println!(
        "guest: Debian's Linux {} in QEMU {}, 2 emulated CPUs, {} of RAM in a file",
        room.kit.release,
        guest.qmp.version,
        BinaryBytes(RAM)
    );
    let chain = |layout| Chain {
        tool: Tool {
            ramsnap: ramsnap.clone(),
            layout,
        },
        files: Vec::new(),
    };
    let mut snapshots = Snapshots {
        room,
        chains: LAYOUTS.map(chain),
    };
    guest.work(BEFORE)?;
    snapshots.take(&mut guest)?;
    files::check(room, ramsnap, &mut guest)?;
    for _ in 0..DIFFS {
        guest.go_on()?;
        guest.work(BETWEEN)?;
        snapshots.take(&mut guest)?;
    }
    // The guest is still paused, so its file holds the RAM of the last snapshot.
    let place = guest.kill()?;
    let proof = Proof {
        room,
        chains: snapshots.chains,
        devices: devices(DIFFS),
        place,
    };
    proof.carry_out()?;
    println!(
        "proven in {:.0} s: a Linux guest in QEMU, restored from a full snapshot and {DIFFS} diffs \
         into another QEMU, resumes in its round and finds every file whole, in the layouts {}; \
         with one page corrupted, or the last diff left out, it does not",
        start.elapsed().as_secs_f64(),
        LAYOUTS.join(", "),
    );
    Ok(())
}

/// The file for the devices of a snapshot, by its place in the chain.
fn devices(snapshot: usize) -> String {
    format!("{}.devices", name(snapshot))
}

/// The snapshots taken of one guest.
struct Snapshots<'a> {
    room: &'a Room<'a>,
    chains: [Chain; LAYOUTS.len()],
}

impl Snapshots<'_> {
    /// Pauses the guest, takes the next snapshot in every layout, and leaves it paused.
    fn take(&mut self, guest: &mut Guest) -> anyhow::Result<()> {
        let ram = self.room.file("ram");
        guest.pause()?;
        let snapshot = self.chains[0].files.len();
        guest.save_devices(&devices(snapshot))?;
        let mut taken = Vec::new();
        for Chain { tool, files } in &mut self.chains {
            let out = self
                .room
                .file(&format!("{}.{}", name(snapshot), tool.layout));
            let start = Instant::now();
            if files.is_empty() {
                tool.dump(&ram, &out)?;
            } else {
                tool.diff(&paths(files), &ram, &out)?;
            }
            let (bytes, time) = (BinaryBytes(allocated(&out)?), seconds(start.elapsed()));
            taken.push(format!("{} {bytes} in {time}", tool.layout));
            files.push(out);
        }
        let state = fs::metadata(self.room.file(&devices(snapshot)))?.len();
        println!(
            "{:6} after round {:2}: {}; devices in {}",
            name(snapshot),
            guest.round(),
            taken.join(", "),
            BinaryBytes(state),
        );
        Ok(())
    }
}

/// The bytes that the file system holds for a file.
fn allocated(path: &Path) -> anyhow::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}
