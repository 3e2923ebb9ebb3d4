//! That sealed and packed images mean the same after every copy, and raw ones don't.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, ChainError, Image, ImageId};
use memory_writer::{Layout, MemoryWriter, Seal};
use scenarios::ram::Stamped;
use tempfile::TempDir;

use super::Check;
use crate::finding::Family::Bytes;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        Bytes,
        "sealed chain, written here and copied to here",
        |fixture| carried(fixture, Layout::Sealed),
    ),
    Check::new(
        Bytes,
        "packed chain, written here and copied to here",
        |fixture| carried(fixture, Layout::Packed),
    ),
    Check::new(Bytes, "raw chain copied to here", raw),
];

/// A new layout needs a check of its own.
const _: () = assert!(CHECKS.len() == Layout::ALL.len());

const PAGE: u64 = 16 << 10;
const RAM: u64 = 2 << 20;

/// A full image and a diff with a page that became zero, and the RAM that they stand for.
struct Made {
    paths: [PathBuf; 2],
    ram: Vec<u8>,
}

fn make(dir: &Path, layout: Layout) -> anyhow::Result<Made> {
    let paths = [dir.join("full.mem"), dir.join("diff.mem")];
    let mut ram = Stamped::new(1, RAM).bytes(0..RAM);
    let mut parent: Option<ImageId> = None;
    for path in &paths {
        let seal = parent.map_or_else(Seal::new, |parent| Seal::new().parent(parent));
        let options = MemoryWriter::options().layout(layout).seal(seal);
        let mut writer = options.open(path, RAM, PAGE)?;
        let first = path == &paths[0];
        parent = writer.image_id();
        if first {
            writer.write_full(&ram)?;
        } else {
            let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
            for page in [3, 4, 17, 100] {
                let bytes = page * PAGE..(page + 1) * PAGE;
                let fill = if page == 4 { 0 } else { page as u8 };
                ram[bytes.start as usize..bytes.end as usize].fill(fill);
                dirty.mark(bytes.start)?;
            }
            writer.write_diff(&ram, &dirty)?;
        }
        writer.commit()?;
    }
    Ok(Made { paths, ram })
}

/// A directory elsewhere, which has little space.
fn room(fixture: &Fixture) -> anyhow::Result<TempDir> {
    Ok(tempfile::tempdir_in(&fixture.elsewhere)?)
}

/// As tools copy: with a hole wherever there are zeros, or with none.
#[derive(Clone, Copy, PartialEq)]
enum Copying {
    PunchesHoles,
    FillsHoles,
}

fn copy(from: &Path, to: &Path, how: Copying) -> anyhow::Result<()> {
    const BLOCK: u64 = 4096;
    let bytes = fs::read(from)?;
    let copy = File::create(to).with_context(|| format!("can't copy to {}", to.display()))?;
    copy.set_len(bytes.len() as u64)?;
    for (block, at) in bytes
        .chunks(BLOCK as usize)
        .zip((0..).step_by(BLOCK as usize))
    {
        if how == Copying::FillsHoles || block.iter().any(|byte| *byte != 0) {
            copy.write_all_at(block, at)?;
        }
    }
    Ok(copy.sync_all()?)
}

/// Copied from elsewhere to this mount and back to `back`; how the first copy does it, the second
/// does otherwise.
fn carry(
    fixture: &Fixture,
    made: &Made,
    back: &Path,
    first: Copying,
) -> anyhow::Result<[PathBuf; 2]> {
    let here = fixture.path("carried");
    let second = match first {
        Copying::PunchesHoles => Copying::FillsHoles,
        Copying::FillsHoles => Copying::PunchesHoles,
    };
    fs::create_dir_all(&here)?;
    let mut paths = made.paths.clone();
    for path in &mut paths {
        let name = path.file_name().context("an image has a name")?;
        let (there, again) = (here.join(name), back.join(name));
        copy(path, &there, first)?;
        copy(&there, &again, second)?;
        *path = again;
    }
    Ok(paths)
}

fn carried(fixture: &Fixture, layout: Layout) -> anyhow::Result<Outcome> {
    let expected = "verified, and the RAM's bytes: where it was written, and after copies that punch and fill holes";
    let wrong = |paths: &[PathBuf], ram: &[u8]| -> anyhow::Result<bool> {
        for path in paths {
            let found = Image::open(path)?.verify(&mut |_| std::ops::ControlFlow::Continue(()))?;
            if !found.is_ok() {
                return Ok(true);
            }
        }
        let mut restored = vec![0; RAM as usize];
        Chain::open_sealed(paths)?.restore(restored.as_mut_slice())?;
        Ok(restored != ram)
    };
    let here = make(&fixture.dir, layout)?;
    if wrong(&here.paths, &here.ram)? {
        return Ok(Outcome::broken(expected, "wrong where it was written"));
    }
    let (dir, back) = (room(fixture)?, room(fixture)?);
    let elsewhere = make(dir.path(), layout)?;
    for how in [Copying::PunchesHoles, Copying::FillsHoles] {
        let paths = carry(fixture, &elsewhere, back.path(), how)?;
        if wrong(&paths, &elsewhere.ram)? {
            return Ok(Outcome::broken(expected, "wrong after the copy"));
        }
    }
    Ok(Outcome::holds(
        expected,
        "every byte correct, six images verified",
    ))
}

/// What the others are for.
fn raw(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the RAM's bytes after copies that punch and fill holes";
    let (dir, back) = (room(fixture)?, room(fixture)?);
    let made = make(dir.path(), Layout::Raw)?;
    let mut seen = Vec::new();
    for (how, what) in [
        (Copying::PunchesHoles, "holes punched, then filled"),
        (Copying::FillsHoles, "holes filled, then punched"),
    ] {
        let [full, diff] = carry(fixture, &made, back.path(), how)?;
        let mut chain = Chain::open_raw(full, PAGE)?;
        match chain.push_raw(diff) {
            Err(ChainError::AmbiguousDiff { why, .. }) => {
                seen.push(format!("{what}: refused ({why})"))
            }
            Err(error) => return Err(error.into()),
            Ok(()) => {
                let mut restored = vec![0; RAM as usize];
                chain.restore(restored.as_mut_slice())?;
                if restored != made.ram {
                    seen.push(format!("{what}: a page of zeros is taken for a clean one"));
                }
            }
        }
    }
    Ok(if seen.is_empty() {
        Outcome::holds(expected, "every byte correct")
    } else {
        seen.push("seal images that are copied".into());
        Outcome::differs(expected, seen.join("; "))
    })
}
