//! Writers in processes of their own: to be killed, traced, limited, and to race each other.
//!
//! Each program that uses them has a hidden subcommand `writer`, which is [`Child::run`].

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use harness::process::this_program;
use memory_writer::MemoryWriter;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, raise};

use super::target::{Mutant, Target};
use crate::ram::Stamped;

/// The page of the snapshots that children write, and the bytes that one system call of theirs
/// writes.
pub const PAGE: u64 = 16 << 10;

/// Writes snapshots, as a child of a check.
#[derive(clap::Args, Clone, Debug)]
pub struct Child {
    #[arg(long)]
    dest: PathBuf,
    /// The version of the RAM; counts up with each snapshot.
    #[arg(long)]
    stamp: u32,
    #[arg(long)]
    size: u64,
    /// Snapshots to write.
    #[arg(long, default_value_t = 1)]
    times: u32,
    /// Dies by SIGKILL after so many bytes of the last snapshot.
    #[arg(long)]
    die_after: Option<u64>,
    /// The largest file that this process may write.
    #[arg(long)]
    largest_file: Option<u64>,
    #[arg(long, value_enum)]
    mutant: Option<Mutant>,
}

impl Child {
    pub fn new(target: Target, dest: &Path, stamp: u32, size: u64) -> Self {
        Self {
            dest: dest.to_owned(),
            stamp,
            size,
            times: 1,
            die_after: None,
            largest_file: None,
            mutant: target.0,
        }
    }

    pub fn times(mut self, times: u32) -> Self {
        self.times = times;
        self
    }

    pub fn die_after(mut self, bytes: u64) -> Self {
        self.die_after = Some(bytes);
        self
    }

    pub fn largest_file(mut self, bytes: u64) -> Self {
        self.largest_file = Some(bytes);
        self
    }

    /// The command line that runs this child, after `wrapper` and its arguments where there is one
    /// (strace).
    pub fn command(&self, wrapper: &[String]) -> anyhow::Result<Command> {
        let this = this_program()?;
        let mut command = match wrapper {
            [] => Command::new(this),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(this);
                command
            }
        };
        command.args(["writer", "--dest"]);
        command.arg(&self.dest);
        command.arg(format!("--stamp={}", self.stamp));
        command.arg(format!("--size={}", self.size));
        command.arg(format!("--times={}", self.times));
        if let Some(bytes) = self.die_after {
            command.arg(format!("--die-after={bytes}"));
        }
        if let Some(bytes) = self.largest_file {
            command.arg(format!("--largest-file={bytes}"));
        }
        if let Some(mutant) = self.mutant {
            let value = clap::ValueEnum::to_possible_value(&mutant);
            let value = value.context("every mutant has a name")?;
            command.arg(format!("--mutant={}", value.get_name()));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped());
        Ok(command)
    }

    pub fn run(&self) -> anyhow::Result<()> {
        if let Some(bytes) = self.largest_file {
            setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)?;
        }
        let target = Target(self.mutant);
        for n in 0..self.times {
            let ram = Stamped::new(self.stamp + n, self.size);
            match self.die_after {
                Some(after) if n + 1 == self.times => self.die_writing(&ram, after)?,
                _ => target.full(&self.dest, &ram, self.size, PAGE)?,
            }
        }
        Ok(())
    }

    fn die_writing(&self, ram: &Stamped, after: u64) -> anyhow::Result<()> {
        let mut writer = MemoryWriter::options()
            .chunk_size(PAGE as usize)
            .progress(move |progress| {
                if progress.done >= after {
                    let _ = raise(Signal::SIGKILL);
                }
                std::ops::ControlFlow::Continue(())
            })
            .open(&self.dest, self.size, PAGE)?;
        writer.write_full(ram)?;
        anyhow::bail!("the RAM has fewer than the {after} bytes after which the process is killed")
    }
}
