//! The options of the command.

use std::path::PathBuf;

use clap::Parser;
use file_systems::FileSystem;
use harness::file_systems::parser;
use harness::packages::Install;
use scenarios::child::Child;
use scenarios::target::Mutant;

use super::kind::Kind;
use super::worker::Worker;
#[cfg(target_os = "linux")]
use super::{guest, power};

/// Mount each file system, run the library on it, and report which promises hold
///
/// On Linux, as root: ext4, XFS, btrfs and tmpfs by this machine's kernel; APFS, HFS+, exFAT, NFS
/// v3 and NFS v4.2 by Debian's kernel in QEMU. On macOS: APFS, HFS+, exFAT in disk images, and NFS
/// v3. Exit code 0 means that no promise of the library is broken.
#[derive(Parser)]
#[command(name = "cargo xtask fs-matrix", bin_name = "cargo xtask fs-matrix")]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct FsMatrix {
    /// Only these mounts, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "MOUNT")]
    #[arg(value_parser = parser(FileSystem::in_matrix()))]
    pub(crate) only: Vec<Kind>,
    /// List the mounts and the checks, and run nothing
    #[arg(long)]
    pub(crate) list: bool,
    /// Keep the disk images and logs under target/fs-matrix/run
    #[arg(long)]
    pub(crate) keep: bool,
    /// Write all findings to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the tables to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) markdown: Option<PathBuf>,
    /// Check this mounted directory under this label; may be repeated. Other mounts are checked
    /// only if --only names them
    #[arg(long = "mount", value_name = "LABEL=PATH", value_parser = labeled)]
    pub(crate) mounts: Vec<(String, PathBuf)>,
    /// Only the checks of these names
    #[arg(long, value_name = "NAME")]
    pub(crate) check: Vec<String>,
    #[command(flatten)]
    pub(crate) install: Install,
    /// The number of power losses (Linux)
    #[arg(long, default_value_t = 20)]
    pub(crate) cuts: u32,
    /// Omit checks that take a minute on a file system in a guest, and give guests one CPU
    #[arg(long)]
    pub(crate) quick: bool,
    /// Check a deliberately broken library, to show that the checks can fail
    #[arg(long, value_enum, hide = true)]
    pub(crate) mutant: Option<Mutant>,
    #[command(subcommand)]
    pub(crate) part: Option<Part>,
}

/// The subcommands that this program runs in its own children.
#[derive(clap::Subcommand)]
pub(crate) enum Part {
    #[command(hide = true)]
    Worker(Worker),
    #[command(hide = true)]
    Writer(Child),
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Guest(guest::in_guest::Guest),
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Power(power::in_guest::Power),
}

fn labeled(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((label, path)) if !label.is_empty() && !path.is_empty() => {
            Ok((label.into(), path.into()))
        }
        _ => Err("write LABEL=PATH".into()),
    }
}
