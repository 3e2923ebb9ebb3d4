//! A directory that this machine exports to itself by NFS.
//!
//! Only root's list of exports says what `nfsd` serves, so a run adds its lines there, between two
//! comments. A killed run leaves them. The first comment names its process, its mount point, and
//! whether it started the service: the next run removes all of that.

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tempfile::{NamedTempFile, TempDir};

use super::system::System;

const BEGIN: &str = "# fs-matrix begin ";
const END: &str = "# fs-matrix end";

/// A directory that is exported to this machine alone, and mounted. When this is dropped, the list
/// of exports and the service are as they were.
pub(super) struct Export {
    system: System,
    block: Block,
    mounted: bool,
    _point: TempDir,
    _dir: TempDir,
}

/// The lines of one run in the list of exports.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    process: i32,
    /// Whether the service was off before.
    started_service: bool,
    mount_point: PathBuf,
}

impl Export {
    pub(super) fn new(system: System) -> anyhow::Result<Self> {
        remove_what_killed_runs_left(&system)?;
        let (dir, point) = (tempfile::tempdir()?, tempfile::tempdir()?);
        // /tmp and /var are links, and nfsd takes the path behind them.
        let exported = dir.path().canonicalize()?;
        let block = Block {
            process: std::process::id().cast_signed(),
            started_service: !service_is_enabled(&system),
            mount_point: point.path().canonicalize()?,
        };
        let mut exports = read(&system.exports)?;
        if !exports.is_empty() && !exports.ends_with('\n') {
            exports.push('\n');
        }
        let line = format!(
            "{} -maproot=root -network 127.0.0.0 -mask 255.0.0.0",
            exported.display()
        );
        exports.push_str(&format!("{}\n{line}\n{END}\n", block.first_line()));
        replace(&system.exports, &exports)?;
        // From here on, dropping restores it.
        let mut export = Self {
            system,
            block,
            mounted: false,
            _point: point,
            _dir: dir,
        };
        export.system.run("nfsd", ["enable"])?;
        export.system.run("nfsd", ["update"])?;
        let from = format!("127.0.0.1:{}", exported.display());
        let options = ["-t", "nfs", "-o", "vers=3,tcp,resvport,hard", &from];
        let options = options.into_iter().map(Path::new);
        let mount = options.chain([export.mount_point()]);
        export.system.run("mount", mount)?;
        export.mounted = true;
        Ok(export)
    }

    pub(super) fn mount_point(&self) -> &Path {
        &self.block.mount_point
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.mounted {
            self.block.unmount(&self.system);
        }
        if let Err(error) = remove_blocks(&self.system, |block| *block == self.block) {
            eprintln!("warning: {error:#}");
        }
    }
}

impl Block {
    fn first_line(&self) -> String {
        let service = if self.started_service { "off" } else { "on" };
        format!(
            "{BEGIN}{} {service} {}",
            self.process,
            self.mount_point.display()
        )
    }

    fn of_first_line(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix(BEGIN)?.splitn(3, ' ');
        Some(Self {
            process: words.next()?.parse().ok()?,
            started_service: words.next()? == "off",
            mount_point: words.next()?.into(),
        })
    }

    fn is_left(&self) -> bool {
        kill(Pid::from_raw(self.process), None) == Err(Errno::ESRCH)
    }

    fn unmount(&self, system: &System) {
        system.clean_up("umount", [Path::new("-f"), &self.mount_point]);
    }
}

fn remove_what_killed_runs_left(system: &System) -> anyhow::Result<()> {
    let (_, blocks) = parse(&read(&system.exports)?);
    for (block, _) in blocks.iter().filter(|(block, _)| block.is_left()) {
        block.unmount(system);
    }
    remove_blocks(system, Block::is_left)
}

/// Removes the lines of runs from the list of exports, and ends the service if one of them has
/// started it and no other run is left.
fn remove_blocks(system: &System, which: impl Fn(&Block) -> bool) -> anyhow::Result<()> {
    let (others, blocks) = parse(&read(&system.exports)?);
    let (ended, stay): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|(block, _)| which(block));
    if ended.is_empty() {
        return Ok(());
    }
    let kept: String = stay.iter().map(|(_, lines)| lines.as_str()).collect();
    replace(&system.exports, &(others + &kept))?;
    system.clean_up("nfsd", ["update"]);
    if stay.is_empty() && ended.iter().any(|(block, _)| block.started_service) {
        system.clean_up("nfsd", ["disable"]);
    }
    Ok(())
}

/// Returns the lines that are of no run, and the lines of each run.
fn parse(exports: &str) -> (String, Vec<(Block, String)>) {
    let mut others = String::new();
    let mut blocks: Vec<(Block, String)> = Vec::new();
    let mut inside = false;
    for line in exports.lines() {
        let line_ended = format!("{line}\n");
        if let Some(block) = Block::of_first_line(line) {
            blocks.push((block, line_ended));
            inside = true;
        } else if let (true, Some((_, lines))) = (inside, blocks.last_mut()) {
            lines.push_str(&line_ended);
            inside = line != END;
        } else {
            others.push_str(&line_ended);
        }
    }
    (others, blocks)
}

/// Returns the list of exports. A list that does not exist is empty.
fn read(exports: &Path) -> anyhow::Result<String> {
    match fs::read_to_string(exports) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| access(exports)),
    }
}

/// Replaces the list of exports as a whole. An empty one is removed.
fn replace(exports: &Path, text: &str) -> anyhow::Result<()> {
    if text.is_empty() {
        return fs::remove_file(exports).with_context(|| access(exports));
    }
    let dir = exports.parent().context("the list of exports is a file")?;
    let write = || {
        let mut file = NamedTempFile::new_in(dir)?;
        file.write_all(text.as_bytes())?;
        file.as_file()
            .set_permissions(Permissions::from_mode(0o644))?;
        file.persist(exports)?;
        anyhow::Ok(())
    };
    write().with_context(|| access(exports))
}

fn access(exports: &Path) -> String {
    format!(
        "can't use {}: macOS asks for Full Disk Access even of root; give it to the terminal in \
         System Settings, Privacy & Security",
        exports.display()
    )
}

/// Returns whether the service is on, and stays on over a reboot. The exit status of `nfsd status`
/// says whether it runs, which is something else.
fn service_is_enabled(system: &System) -> bool {
    let status = system.run("nfsd", ["status"]);
    let printed = status.unwrap_or_else(|error| format!("{error:#}"));
    printed.contains("service is enabled")
}
