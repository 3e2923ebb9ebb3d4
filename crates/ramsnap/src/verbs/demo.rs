//! `ramsnap demo`: a demonstration on a simulated guest.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;

use crate::exit_status::ExitStatus;
use crate::session::Session;

/// Runs a command line, whose first word is the name of the tool.
type Run<'r> = &'r dyn Fn(&[&str]) -> anyhow::Result<ExitStatus>;

const PAGE: u64 = 4096;
const RAM: u64 = 64 << 20;

/// Demonstrate ramsnap: take, inspect and restore snapshots of a small simulated guest
///
/// Requires no virtual machine and no privilege. The commands printed after `$` can be entered.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ramsnap demo --keep /tmp/ramsnap-demo")]
pub struct Demo {
    /// Create this directory and keep the files there; by default a temporary directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

impl Demo {
    /// Demonstrates the tool, whose verbs `run` runs.
    pub fn run(&self, session: &Session, run: Run<'_>) -> anyhow::Result<ExitStatus> {
        // The directory is removed in every case.
        session.hold();
        let temporary;
        let dir = match &self.keep {
            Some(dir) => {
                let made = fs::create_dir(dir);
                made.with_context(|| format!("cannot make the directory {dir:?}"))?;
                dir
            }
            None => {
                temporary = tempfile::tempdir().context("cannot make a temporary directory")?;
                temporary.path()
            }
        };
        let entered = std::env::set_current_dir(dir);
        entered.with_context(|| format!("cannot work in the directory {dir:?}"))?;
        Show { session, run }.run()?;
        Ok(ExitStatus::Success)
    }
}

/// Runs the demonstration in the current directory.
struct Show<'s> {
    session: &'s Session,
    run: Run<'s>,
}

impl Show<'_> {
    fn run(&self) -> anyhow::Result<()> {
        let mut guest = Guest::boot(Path::new("ram"))?;
        self.say("A guest with 64 MiB of RAM, in the file `ram`. It has used a quarter of it. A full image:")?;
        self.good("dump ram -o full.mem")?;
        self.say("It works on: 300 pages change, and some become zero. What changed since:")?;
        guest.work(300)?;
        self.good("diff full.mem --ram ram -o d1.mem")?;
        self.say("And again:")?;
        guest.work(100)?;
        self.good("diff full.mem d1.mem --ram ram -o d2.mem")?;
        self.say("Three files, a chain. Each says what it is, and whose diff:")?;
        self.good("info d2.mem")?;
        self.good("map full.mem d1.mem d2.mem")?;
        self.good("verify full.mem d1.mem d2.mem")?;
        self.say("In a copy of d1.mem, one bit flips. It is found, and named:")?;
        rot("d1.mem", "damaged.mem")?;
        self.bad("verify full.mem damaged.mem d2.mem")?;
        self.say("Without d1.mem, d2.mem cannot be restored. This is found, too:")?;
        self.bad("verify full.mem d2.mem")?;
        self.say("One full image of all three, and the RAM as it was, for a new guest:")?;
        self.good("merge full.mem d1.mem d2.mem -o merged.mem")?;
        self.good("restore full.mem d1.mem d2.mem -o ram2")?;
        self.say("Both are the RAM, byte for byte:")?;
        self.good("diff merged.mem --ram ram")?;
        ensure!(
            fs::read("ram")? == fs::read("ram2")?,
            "the restored RAM is not what it was"
        );
        self.say("Everything was as it should be.")
    }

    fn say(&self, text: &str) -> anyhow::Result<()> {
        self.session.say(&format!("\n{text}"))
    }

    fn good(&self, command: &str) -> anyhow::Result<()> {
        self.command(command, ExitStatus::Success)
    }

    fn bad(&self, command: &str) -> anyhow::Result<()> {
        self.command(command, ExitStatus::CheckFailed)
    }

    /// Runs a command as a shell would.
    fn command(&self, command: &str, expected: ExitStatus) -> anyhow::Result<()> {
        self.session.check("the demo ends here")?;
        self.session.say(&format!("\n$ ramsnap {command}"))?;
        let words: Vec<_> = ["ramsnap"].into_iter().chain(command.split(' ')).collect();
        let found = (self.run)(&words)?;
        ensure!(
            found == expected,
            "`ramsnap {command}` came out otherwise than it should: report this as a bug"
        );
        Ok(())
    }
}

/// Simulated RAM of a guest.
struct Guest {
    ram: File,
    random: u64,
}

impl Guest {
    /// A kernel at the start, and a heap in the middle; the rest was never touched.
    fn boot(path: &Path) -> anyhow::Result<Self> {
        let ram = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        ram.set_len(RAM)?;
        let mut guest = Self { ram, random: 1 };
        for page in (0..2048).chain(6000..8048) {
            guest.write(page)?;
        }
        Ok(guest)
    }

    /// Writes `pages` pages here and there, and frees a few.
    fn work(&mut self, pages: u64) -> anyhow::Result<()> {
        for _ in 0..pages {
            let page = 6000 + self.next() % 4000;
            self.write(page)?;
        }
        for page in 6000..6000 + pages / 10 {
            self.ram.write_all_at(&[0; PAGE as usize], page * PAGE)?;
        }
        Ok(())
    }

    fn write(&mut self, page: u64) -> anyhow::Result<()> {
        let words: Vec<u8> = (0..PAGE / 8)
            .flat_map(|_| self.next().to_le_bytes())
            .collect();
        Ok(self.ram.write_all_at(&words, page * PAGE)?)
    }

    /// SplitMix64 with a fixed seed: every run is the same.
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Makes a copy with one flipped bit.
fn rot(from: &str, to: &str) -> anyhow::Result<()> {
    let mut bytes = fs::read(from)?;
    bytes[5000] ^= 1;
    Ok(fs::write(to, bytes)?)
}
