//! Commits that lack a step, which must be found, and one that lacks none, which must not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::commits::{DEST, RAM};
use super::{Scenario, Witness};
use crate::crash::check::{Aftermath, Fault};
use crate::fs_matrix::child::PAGE;
use crate::fs_matrix::subject::{Sabotage, Subject};
use crate::ram::Stamped;

pub const CONTROL: Scenario = Scenario {
    name: "by-hand",
    about: "nothing is left out: the states must not blame it",
    prepare: |dir| {
        commit(
            dir,
            &|| Ok(()),
            1,
            &[Step::FileSync, Step::Rename, Step::DirectorySync],
        )
    },
    act: |dir, witness| {
        commit(
            dir,
            witness,
            2,
            &[Step::FileSync, Step::Rename, Step::DirectorySync],
        )?;
        witness.returned()
    },
    check,
};

pub const ALL: &[Scenario] = &[
    Scenario {
        name: "no-file-sync",
        about: "the file is renamed without a sync",
        act: |dir, witness| {
            commit(dir, witness, 2, &[Step::Rename, Step::DirectorySync])?;
            witness.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "rename-before-sync",
        about: "the file is synced when it has the name already",
        act: |dir, witness| {
            commit(
                dir,
                witness,
                2,
                &[Step::Rename, Step::FileSync, Step::DirectorySync],
            )?;
            witness.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "no-directory-sync",
        about: "the name is not synced",
        act: |dir, witness| {
            commit(dir, witness, 2, &[Step::FileSync, Step::Rename])?;
            witness.returned()
        },
        ..CONTROL
    },
    Scenario {
        name: "durability-none",
        about: "the library itself, told not to sync the file",
        act: |dir, witness| {
            let library = Subject(Some(Sabotage::SkipFileSync));
            library.full(&dir.join(DEST), &Stamped::new(2, RAM), RAM, PAGE)?;
            witness.returned()
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

fn commit(dir: &Path, witness: &dyn Witness, stamp: u32, steps: &[Step]) -> anyhow::Result<()> {
    let stage = dir.join("vm.tmp");
    let file = File::create(&stage)?;
    file.write_all_at(&Stamped::new(stamp, RAM).bytes(0..RAM), 0)?;
    for (n, step) in steps.iter().enumerate() {
        if n > 0 {
            witness.between()?;
        }
        match step {
            Step::FileSync => file.sync_all()?,
            Step::Rename => fs::rename(&stage, dir.join(DEST))?,
            Step::DirectorySync => File::open(dir)?.sync_all()?,
        }
    }
    Ok(())
}

fn check(after: &Aftermath) -> Result<(), Fault> {
    after.version(DEST, RAM, &after.allowed(1, 2)).map(drop)
}
