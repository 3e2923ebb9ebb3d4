//! Commits of images that make a chain.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, ChainError, Image, ImageId};
use memory_writer::{Layout, MemoryWriter, Seal};

use super::commits::RAM;
use super::{CommitObserver, Scenario};
use crate::check::{PostCrashState, Violation, lost};
use crate::child::PAGE;
use crate::ram::Stamped;

const FULL: &str = "full.mem";
const DIFF_NAME: &str = "diff.mem";
const NEXT: &str = "next.mem";
/// A diff has each page whose number is its version's, modulo this.
const EVERY: u64 = 7;

pub const DIFF: Scenario = Scenario {
    name: "diff",
    about: "a raw diff over another",
    prepare: |dir| {
        write_full(&dir.join(FULL), 1, Layout::Raw, Seal::new())?;
        write_diff(&dir.join(DIFF_NAME), 2, (Layout::Raw, Seal::new()), UNSEEN)
    },
    act: |dir, observer| {
        for stamp in [3, 4] {
            write_diff(
                &dir.join(DIFF_NAME),
                stamp,
                (Layout::Raw, Seal::new()),
                observer,
            )?;
            observer.returned()?;
        }
        Ok(())
    },
    check: |after| {
        raw_chain(after, &after.allowed(2, 4))?;
        after.tidy(&[DIFF_NAME], &[FULL])
    },
};

pub const SEALED: Scenario = Scenario {
    name: "sealed",
    about: "a sealed diff over another, then a new full image beside them",
    prepare: |dir| prepare(dir, Layout::Sealed),
    act: |dir, observer| act(dir, observer, Layout::Sealed),
    check: sealed_chain,
};

pub const PACKED: Scenario = Scenario {
    name: "packed",
    about: "a packed diff over another, then a new full image beside them",
    prepare: |dir| prepare(dir, Layout::Packed),
    act: |dir, observer| act(dir, observer, Layout::Packed),
    check: sealed_chain,
};

pub const MERGE: Scenario = Scenario {
    name: "merge",
    about: "a chain merged onto its own base",
    prepare: |dir| {
        write_full(&dir.join(FULL), 1, Layout::Raw, Seal::new())?;
        write_diff(&dir.join(DIFF_NAME), 2, (Layout::Raw, Seal::new()), UNSEEN)
    },
    act: |dir, observer| {
        let mut chain = Chain::open_raw(dir.join(FULL), PAGE)?;
        // Its holes can't be believed everywhere.
        chain.push_pages(dir.join(DIFF_NAME), dirty(2)?.runs())?;
        chain.flatten(dir.join(FULL))?;
        observer.returned()
    },
    check: |after| {
        let base = std::fs::read(after.dir.join(FULL)).map_err(lost("the merged image"))?;
        if base == ram(1) && after.least() > 0 {
            return Err(Violation::Lost("a merge that had succeeded".into()));
        }
        if base != ram(1) && after.most() == 0 {
            return Err(Violation::Lost(
                "the base, although the merge had failed".into(),
            ));
        }
        if ![ram(1), ram_after_diff(2)].contains(&base) {
            return Err(Violation::Torn(
                "neither the base nor the merged image".into(),
            ));
        }
        raw_chain(after, &[2])?;
        after.tidy(&[FULL], &[DIFF_NAME])
    },
};

/// Returns the scenario of a diff in this layout.
pub const fn of(layout: Layout) -> &'static Scenario {
    match layout {
        Layout::Raw => &DIFF,
        Layout::Sealed => &SEALED,
        Layout::Packed => &PACKED,
    }
}

/// The sealed or packed images that were prepared.
pub fn chain_in(dir: &Path) -> [PathBuf; 2] {
    [dir.join(FULL), dir.join(DIFF_NAME)]
}

/// Writes a chain of a sealed full image, a packed diff and a raw diff.
pub fn write_mixed(dir: &Path) -> anyhow::Result<()> {
    let parent = write_full(&dir.join(FULL), 1, Layout::Sealed, Seal::new())?;
    let seal = Seal::new().parent(parent.context("it is sealed")?);
    write_diff(&dir.join(DIFF_NAME), 2, (Layout::Packed, seal), UNSEEN)?;
    write_diff(&dir.join(NEXT), 3, (Layout::Raw, Seal::new()), UNSEEN)
}

/// Opens the chain of [`write_mixed`].
pub fn open_mixed(dir: &Path) -> anyhow::Result<Chain> {
    let mut chain = Chain::open_sealed(&chain_in(dir))?;
    chain.push_pages(dir.join(NEXT), dirty(3)?.runs())?;
    Ok(chain)
}

/// Returns the RAM of [`write_mixed`].
pub fn ram_of_mixed() -> Vec<u8> {
    with_diff(ram_after_diff(2), 3)
}

/// The place of the new full image.
pub fn next_in(dir: &Path) -> PathBuf {
    dir.join(NEXT)
}

fn prepare(dir: &Path, layout: Layout) -> anyhow::Result<()> {
    let parent = write_full(&dir.join(FULL), 1, layout, Seal::new())?;
    let seal = Seal::new().parent(parent.context("it is sealed")?);
    write_diff(&dir.join(DIFF_NAME), 2, (layout, seal), UNSEEN)
}

fn act(dir: &Path, observer: &dyn CommitObserver, layout: Layout) -> anyhow::Result<()> {
    let parent = Image::open(dir.join(FULL))?.id();
    let seal = Seal::new().parent(parent.context("it is sealed")?);
    write_diff(&dir.join(DIFF_NAME), 3, (layout, seal), observer)?;
    observer.returned()?;
    write_full(&dir.join(NEXT), 4, layout, Seal::new())?;
    observer.returned()
}

fn write_full(
    dest: &Path,
    stamp: u32,
    layout: Layout,
    seal: Seal,
) -> anyhow::Result<Option<ImageId>> {
    let mut writer = MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .open(dest, RAM, PAGE)?;
    let id = writer.image_id();
    writer.write_full(&Stamped::new(stamp, RAM))?;
    writer.commit()?;
    Ok(id)
}

/// No commit of the preparation is observed.
const UNSEEN: &dyn CommitObserver = &|| Ok(());

fn write_diff(
    dest: &Path,
    stamp: u32,
    (layout, seal): (Layout, Seal),
    observer: &dyn CommitObserver,
) -> anyhow::Result<()> {
    let live = Arc::new(dirty(stamp)?);
    observer.saving(&live);
    let epoch = live.begin_epoch()?;
    // The pages of each diff are known here.
    let mut writer = MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .allow_ambiguous_diff(true)
        .open(dest, RAM, PAGE)?;
    writer.write_diff(&Stamped::new(stamp, RAM), epoch.bitmap())?;
    writer.commit()?;
    epoch.release()?;
    Ok(())
}

/// The pages that a diff of this version has.
pub fn dirty(stamp: u32) -> anyhow::Result<DirtyBitmap> {
    let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
    for page in (u64::from(stamp)..RAM / PAGE).step_by(EVERY as usize) {
        dirty.mark_page(page)?;
    }
    Ok(dirty)
}

fn ram(stamp: u32) -> Vec<u8> {
    Stamped::new(stamp, RAM).bytes(0..RAM)
}

/// Version 1 with the pages of a diff.
pub fn ram_after_diff(stamp: u32) -> Vec<u8> {
    with_diff(ram(1), stamp)
}

fn with_diff(mut bytes: Vec<u8>, stamp: u32) -> Vec<u8> {
    let newer = ram(stamp);
    for run in dirty(stamp).expect("a bitmap").runs() {
        let run = run.start as usize..run.end as usize;
        bytes[run.clone()].copy_from_slice(&newer[run]);
    }
    bytes
}

/// The full image and a diff of one of these versions.
fn raw_chain(after: &PostCrashState, allowed: &[u32]) -> Result<(), Violation> {
    let mut chain = Chain::open_raw(after.dir.join(FULL), PAGE).map_err(lost("the full image"))?;
    match chain.push_raw(after.dir.join(DIFF_NAME)) {
        Ok(()) => restored(&chain, allowed),
        // Compare all of its bytes: they are zeros where it has no page.
        Err(ChainError::AmbiguousDiff { .. }) => {
            let bytes = std::fs::read(after.dir.join(DIFF_NAME)).map_err(lost("the diff"))?;
            let is = |stamp: &u32| bytes == with_diff(vec![0; RAM as usize], *stamp);
            match allowed.iter().any(is) {
                true => Ok(()),
                false => Err(Violation::Torn(format!("the diff is none of {allowed:?}"))),
            }
        }
        Err(error) => Err(lost("the diff")(error)),
    }
}

fn sealed_chain(after: &PostCrashState) -> Result<(), Violation> {
    let (full, diff, next) = (
        after.dir.join(FULL),
        after.dir.join(DIFF_NAME),
        after.dir.join(NEXT),
    );
    verified(&[&full, &diff])?;
    let chain = Chain::open_sealed(&[full, diff]).map_err(lost("the chain"))?;
    restored(&chain, &after.allowed(2, 3))?;
    if next.exists() {
        verified(&[&next])?;
        let chain = Chain::open_sealed(&[next]).map_err(lost("the new image"))?;
        if bytes_of(&chain)? != ram(4) {
            return Err(Violation::Torn("the new image".into()));
        }
        if after.most() < 2 {
            return Err(Violation::Lost("that there was no new full image".into()));
        }
    } else if after.least() == 2 {
        return Err(Violation::Lost("the new full image".into()));
    }
    drop(chain);
    after.tidy(&[DIFF_NAME, NEXT], &[FULL])
}

/// Every checksum is right.
fn verified(paths: &[&PathBuf]) -> Result<(), Violation> {
    for path in paths {
        let image = Image::open(path).map_err(lost("a sealed image"))?;
        let found = image
            .verify(&mut |_| ControlFlow::Continue(()))
            .map_err(lost("a sealed image"))?;
        if let Some(damage) = found.damage.first() {
            return Err(Violation::Torn(format!("{}: {damage:?}", path.display())));
        }
    }
    Ok(())
}

/// The chain is version 1 with the pages of one of these diffs.
fn restored(chain: &Chain, allowed: &[u32]) -> Result<(), Violation> {
    let bytes = bytes_of(chain)?;
    let is = |stamp: &u32| bytes == ram_after_diff(*stamp);
    if allowed.iter().any(is) {
        return Ok(());
    }
    Err(match (2..=4).find(is) {
        Some(found) => Violation::Lost(format!("a chain of version {found}, not of {allowed:?}")),
        None => Violation::Torn("a chain of no version".into()),
    })
}

fn bytes_of(chain: &Chain) -> Result<Vec<u8>, Violation> {
    let mut bytes = vec![0; RAM as usize];
    chain
        .restore(bytes.as_mut_slice())
        .map_err(lost("the bytes of a chain"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_scenarios() {
        for scenario in Layout::ALL.map(of) {
            let listed = crate::ALL.iter().filter(|all| all.name == scenario.name);
            assert_eq!(listed.count(), 1, "{}", scenario.name);
        }
    }
}
