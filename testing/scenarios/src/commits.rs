//! Commits of files, and of memory as it is.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use anyhow::{Context, bail, ensure};
use atomic_file::{AtomicGroup, AtomicWriter, CommitError};
use memory_writer::MemoryWriter;
use nix::libc::SIGKILL;

use super::Scenario;
use crate::check::{PostCrashState, Tidying, Violation};
use crate::child::{Child, PAGE};
use crate::directory::names;
use crate::ram::Stamped;
use crate::start;
use crate::target::Target;

pub const RAM: u64 = 1 << 20;
pub const DEST: &str = "vm.mem";

pub const REPLACE: Scenario = Scenario {
    name: "replace",
    about: "a commit over an existing file",
    prepare: |dir| file(dir, 1),
    act: |dir, observer| {
        file(dir, 2)?;
        observer.returned()
    },
    check: |after| replaced(after, 1, 2),
};

pub const FIRST: Scenario = Scenario {
    name: "first",
    about: "a commit to a new destination",
    prepare: |_| Ok(()),
    act: |dir, observer| {
        file(dir, 1)?;
        observer.returned()
    },
    check: |after| came_to_be(after, 1),
};

pub const NO_CLOBBER: Scenario = Scenario {
    name: "no-clobber",
    about: "two writers with no_clobber, of which the second must fail",
    prepare: |_| Ok(()),
    act: |dir, observer| {
        let open = || {
            let options = AtomicWriter::options().no_clobber(true);
            options.open(dir.join(DEST))
        };
        let (first, second) = (open()?, open()?);
        first.write_all_at(&Stamped::new(1, RAM).bytes(0..RAM), 0)?;
        second.write_all_at(&Stamped::new(2, RAM).bytes(0..RAM), 0)?;
        first.commit()?;
        observer.returned()?;
        match second.commit() {
            Err(CommitError::NotReplaced { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists =>
            {
                Ok(())
            }
            Err(unexpected) => Err(unexpected.into()),
            Ok(()) => bail!("a second commit replaced the first in spite of no_clobber"),
        }
    },
    check: |after| {
        if after.tidying == Tidying::NextWriter {
            // These writers may replace the file. They need no preflight, and do not search for
            // files that one left.
            after.next_writers(&[DEST; 2])?;
        }
        let recovered = PostCrashState {
            tidying: Tidying::Recover,
            ..*after
        };
        came_to_be(&recovered, 2)
    },
};

const STATE: &str = "vm.state";
const STATE_SIZE: u64 = 64 << 10;

pub const GROUP: Scenario = Scenario {
    name: "group",
    about: "two files that change together, twice",
    prepare: |dir| group(dir, 1),
    act: |dir, observer| {
        for stamp in [2, 3] {
            group(dir, stamp)?;
            observer.returned()?;
        }
        Ok(())
    },
    check: |after| {
        if after.tidying == Tidying::NextWriter {
            // The next writer completes the group. A sweep or the next group removes the staged
            // file of a record that was never published.
            after.next_writers(&[DEST])?;
        }
        let recovered = PostCrashState {
            tidying: Tidying::Recover,
            ..*after
        };
        recovered.tidy(&[DEST, STATE], &[])?;
        let memory = after.version(DEST, RAM, &after.allowed(1, 3))?;
        let state = after.version(STATE, STATE_SIZE, &after.allowed(1, 3))?;
        if memory == state {
            return Ok(());
        }
        Err(Violation::Torn(format!(
            "a group with one file of version {memory} and one of version {state}"
        )))
    },
};

pub const FULL: Scenario = Scenario {
    name: "full",
    about: "full dumps that replace each other",
    prepare: |dir| full(dir, 1),
    act: |dir, observer| {
        for stamp in [2, 3] {
            full(dir, stamp)?;
            observer.returned()?;
        }
        Ok(())
    },
    check: |after| replaced(after, 1, 3),
};

pub const RECYCLE: Scenario = Scenario {
    name: "recycle",
    about: "dumps that recycle the file that the last commit replaced",
    prepare: |dir| {
        let _alone = start::none();
        recycling(dir, 1)?;
        recycling(dir, 2).map(drop)
    },
    act: |dir, observer| {
        let _alone = start::none();
        // exFAT has no leases, so no spares, and there every file is a new one.
        let spare = has_spare(dir)?;
        let mut recycled = false;
        for stamp in 3..=5 {
            recycled |= recycling(dir, stamp)?;
            observer.returned()?;
        }
        ensure!(
            recycled || !spare,
            "none of three dumps reused the recycled file"
        );
        Ok(())
    },
    check: |after| replaced(after, 2, 5),
};

pub const STALE_STAGE: Scenario = Scenario {
    name: "stale-stage",
    about: "a writer is killed, and the next one removes its staged file",
    prepare: |dir| full(dir, 1),
    act: |dir, observer| {
        die_writing(dir)?;
        full(dir, 2)?;
        observer.returned()
    },
    check: |after| replaced(after, 1, 2),
};

pub const TWO_WRITERS: Scenario = Scenario {
    name: "two-writers",
    about: "two concurrent writers, twice",
    prepare: |dir| full(dir, 1),
    act: |dir, observer| {
        for stamps in [[2, 3], [4, 5]] {
            thread::scope(|scope| {
                let writer = |stamp| {
                    scope.spawn(move || {
                        full(dir, stamp)?;
                        observer.returned()
                    })
                };
                let writers = stamps.map(writer);
                let mut done = writers.into_iter().map(|writer| writer.join());
                done.try_for_each(|writer| writer.expect("no panic"))
            })?;
        }
        Ok(())
    },
    check: |after| {
        let allowed: &[u32] = match after.returned {
            0 => &[1, 2, 3],
            1 => &[2, 3],
            2 => &[2, 3, 4, 5],
            _ => &[4, 5],
        };
        one_of(after, allowed, 2)
    },
};

/// Commits a version of a file by hand.
fn file(dir: &Path, stamp: u32) -> anyhow::Result<()> {
    const CHUNK: u64 = 256 << 10;
    let writer = AtomicWriter::open(dir.join(DEST))?;
    for at in (0..RAM).step_by(CHUNK as usize) {
        let bytes = Stamped::new(stamp, RAM).bytes(at..at + CHUNK);
        writer.write_all_at(&bytes, at)?;
    }
    Ok(writer.commit()?)
}

pub fn group(dir: &Path, stamp: u32) -> anyhow::Result<()> {
    let mut group = AtomicGroup::new();
    for (name, size) in [(DEST, RAM), (STATE, STATE_SIZE)] {
        let writer = AtomicWriter::open(dir.join(name))?;
        writer.write_all_at(&Stamped::new(stamp, size).bytes(0..size), 0)?;
        group.add(writer)?;
    }
    Ok(group.commit()?)
}

/// A writer in the middle of its work is killed.
pub fn die_writing(dir: &Path) -> anyhow::Result<()> {
    let child = Child::new(Target(None), &dir.join(DEST), 2, RAM).die_after(RAM / 2);
    let mut command = child.command(&[])?;
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let status = start::start(&mut command)?.wait()?;
    let killed = status.signal() == Some(SIGKILL);
    ensure!(killed, "the writer was not killed: {status}");
    Ok(())
}

pub fn full(dir: &Path, stamp: u32) -> anyhow::Result<()> {
    let dest = dir.join(DEST);
    Target(None).full(&dest, &Stamped::new(stamp, RAM), RAM, PAGE)
}

/// Writes a full image with recycling. Returns whether the staged file was a recycled one.
pub fn recycling(dir: &Path, stamp: u32) -> anyhow::Result<bool> {
    let options = MemoryWriter::options().recycle(RAM * 2);
    let mut writer = options.open(dir.join(DEST), RAM, PAGE)?;
    let recycled = writer.recycled();
    writer.write_full(&Stamped::new(stamp, RAM))?;
    writer.commit().context("a commit that recycles")?;
    Ok(recycled)
}

fn has_spare(dir: &Path) -> anyhow::Result<bool> {
    Ok(names(dir, &[])?.iter().any(|name| name.ends_with(".spare")))
}

/// Versions up to `last` were committed one after the other over `first`.
pub fn replaced(after: &PostCrashState, first: u32, last: u32) -> Result<(), Violation> {
    one_of(after, &after.allowed(first, last), 1)
}

/// The file is whole, and of the same version when all is cleared up after so many writers at once.
fn one_of(after: &PostCrashState, allowed: &[u32], at_once: usize) -> Result<(), Violation> {
    let found = after.version(DEST, RAM, allowed)?;
    after.tidy(&vec![DEST; at_once], &[])?;
    after.version(DEST, RAM, &[found]).map(drop)
}

/// Version 1 is there, or nothing yet.
fn came_to_be(after: &PostCrashState, at_once: usize) -> Result<(), Violation> {
    if after.exists(DEST) && after.most() == 0 {
        return Err(Violation::Lost("that there was no file".into()));
    }
    if after.exists(DEST) || after.least() > 0 {
        return one_of(after, &[1], at_once);
    }
    after.tidy(&vec![DEST; at_once], &[])
}
