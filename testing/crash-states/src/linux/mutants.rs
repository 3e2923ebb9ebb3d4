//! Commits that lack a step, which must be detected, and a complete one, which must pass.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use scenarios::check::{PostCrashState, Violation};
use scenarios::child::PAGE;
use scenarios::commits::{DEST, RAM};
use scenarios::ram::Stamped;
use scenarios::target::{Mutant, Target};
use scenarios::{CommitObserver, Scenario};

pub(super) const CONTROL: Scenario = Scenario {
    name: "by-hand",
    about: "a complete commit without the library",
    prepare: |dir| {
        commit(
            dir,
            &|| Ok(()),
            1,
            &[Step::FileSync, Step::Rename, Step::DirectorySync],
        )
    },
    act: |dir, observer| {
        commit(
            dir,
            observer,
            2,
            &[Step::FileSync, Step::Rename, Step::DirectorySync],
        )?;
        observer.returned()
    },
    check,
};

pub(super) const ALL: &[Scenario] = &[
    Scenario {
        name: "no-file-sync",
        about: "the file is renamed without a sync",
        act: |dir, observer| {
            commit(dir, observer, 2, &[Step::Rename, Step::DirectorySync])?;
            observer.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "rename-before-sync",
        about: "the file is synced after the rename",
        act: |dir, observer| {
            commit(
                dir,
                observer,
                2,
                &[Step::Rename, Step::FileSync, Step::DirectorySync],
            )?;
            observer.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "no-directory-sync",
        about: "the directory is not synced",
        act: |dir, observer| {
            commit(dir, observer, 2, &[Step::FileSync, Step::Rename])?;
            observer.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "durability-none",
        about: "the library itself, configured not to sync the file",
        act: |dir, observer| {
            let library = Target(Some(Mutant::SkipFileSync));
            library.full(&dir.join(DEST), &Stamped::new(2, RAM), RAM, PAGE)?;
            observer.returned()
        },
        ..CONTROL
    },
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    FileSync,
    Rename,
    DirectorySync,
}

fn commit(
    dir: &Path,
    observer: &dyn CommitObserver,
    stamp: u32,
    steps: &[Step],
) -> anyhow::Result<()> {
    let stage = dir.join("vm.tmp");
    let file = File::create(&stage)?;
    file.write_all_at(&Stamped::new(stamp, RAM).bytes(0..RAM), 0)?;
    for (n, step) in steps.iter().enumerate() {
        if n > 0 {
            observer.between()?;
        }
        match step {
            Step::FileSync => file.sync_all()?,
            Step::Rename => fs::rename(&stage, dir.join(DEST))?,
            Step::DirectorySync => File::open(dir)?.sync_all()?,
        }
    }
    Ok(())
}

fn check(after: &PostCrashState) -> Result<(), Violation> {
    after.version(DEST, RAM, &after.allowed(1, 2)).map(drop)
}
