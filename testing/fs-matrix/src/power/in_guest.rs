//! In the guest: looks at what the last loss of power left, and commits until the next.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use file_systems::FileSystem;
use harness::file_systems::parser;
use scenarios::child::PAGE;
use scenarios::ram::{Content, Stamped, content};
use scenarios::target::{Mutant, Target};

use crate::finding::Line;
use crate::guest::in_guest::{findings, make, mount, unmount};
use crate::kind::Kind;

/// The bytes of each snapshot.
const RAM: u64 = 8 * PAGE;

/// Commits to all disks at once until the power goes.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Power {
    /// One for each disk, in the order of the disks
    #[arg(long, value_parser = parser(FileSystem::in_matrix()))]
    kind: Vec<Kind>,
    /// Nothing worth looking at is on the disks of these kinds
    #[arg(long, value_parser = parser(FileSystem::in_matrix()))]
    new: Vec<Kind>,
    #[arg(long, value_enum)]
    mutant: Option<Mutant>,
}

impl Power {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let out = Mutex::new(findings()?);
        std::thread::scope(|scope| {
            for (kind, letter) in self.kind.iter().zip('a'..) {
                let (out, this) = (&out, &self);
                scope.spawn(move || {
                    let disk = format!("/dev/vd{letter}");
                    if let Err(error) = this.work(kind, &disk, out) {
                        send(out, &Line::Failed(format!("{kind}: {error:#}")));
                    }
                });
            }
        });
        Ok(())
    }

    fn work(&self, kind: Kind, disk: &str, out: &Mutex<File>) -> anyhow::Result<()> {
        let point = PathBuf::from(format!("/mnt/{}", kind.name));
        let name = || kind.name.to_owned();
        let mut stamp = 1;
        let mut mounted = false;
        if !self.new.contains(&kind) {
            let found = recovered(kind, disk, &point);
            let whole = match &found {
                Ok(Content::Whole(stamp)) => Some(*stamp),
                _ => None,
            };
            let text = found.map_or_else(|error| format!("{error:#}"), |found| found.to_string());
            send(out, &Line::Recovered(name(), whole, text));
            stamp = whole.map_or(1, |whole| whole + 1);
            mounted = whole.is_some() && writable(&point);
        }
        if !mounted {
            let _ = unmount(&point);
            make(kind, disk)?;
            mount(kind, disk, &point, true)?;
            send(out, &Line::Remade(name()));
        }
        loop {
            let dest = point.join("vm.mem");
            Target(self.mutant).full(&dest, &Stamped::new(stamp, RAM), RAM, PAGE)?;
            send(out, &Line::Committed(name(), stamp));
            stamp += 1;
        }
    }
}

fn recovered(kind: Kind, disk: &str, point: &Path) -> anyhow::Result<Content> {
    mount(kind, disk, point, true)?;
    Ok(content(&point.join("vm.mem"), RAM)?)
}

/// Drivers mount for reading only what was not unmounted and has no journal.
fn writable(point: &Path) -> bool {
    let probe = point.join("probe");
    fs::write(&probe, "")
        .and_then(|()| fs::remove_file(probe))
        .is_ok()
}

/// The host has it once this returns: the port's driver waits until the bytes are taken.
fn send(out: &Mutex<File>, line: &Line) {
    if let Ok(out) = out.lock() {
        let _ = line.send(&*out);
    }
}
