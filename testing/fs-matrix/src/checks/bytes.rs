//! That the bytes in the file are those of the RAM.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, ChainError};
use memory_writer::{MemoryWriter, SnapshotError};
use page_reader::PageReader;
use scenarios::ram::{Stamped, Zeros, content, first_difference};

use super::{Check, LARGE_FILE};
use crate::finding::Family::Bytes;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Bytes, "full dump", full),
    Check::new(Bytes, "diff", |fixture| diff(fixture, PAGE, PAGE, RAM)),
    Check::new(Bytes, "diff from a coarser bitmap", |fixture| {
        diff(fixture, 4 * PAGE, 4 * PAGE, RAM)
    }),
    Check::new(Bytes, "diff from a finer bitmap", |fixture| {
        diff(fixture, PAGE / 4, PAGE / 4, RAM)
    }),
    Check::new(
        Bytes,
        "diff from a bitmap rebuilt coarser in between",
        |fixture| diff(fixture, PAGE / 4, 4 * PAGE, RAM),
    ),
    Check::new(
        Bytes,
        "diff from a bitmap rebuilt finer in between",
        |fixture| diff(fixture, 4 * PAGE, PAGE / 4, RAM),
    ),
    Check::new(Bytes, "partial last page", |fixture| {
        diff(fixture, 4 * PAGE, 4 * PAGE, RAM + PAGE)
    }),
    Check::new(
        Bytes,
        "full dump, then the pages dirtied during it",
        pre_copy,
    ),
    Check::new(Bytes, "chain applied", chain),
    Check::new(Bytes, "raw diff refused or read back", read_back),
    Check::new(Bytes, LARGE_FILE, over_4_gib),
];

const PAGE: u64 = 16 << 10;
const RAM: u64 = 4 << 20;

fn full(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path("full.mem");
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let found = content(&dest, RAM)?;
    Ok(Outcome::promise(
        found == scenarios::ram::Content::Whole(1),
        format!("{RAM} bytes, the RAM's"),
        found.to_string(),
    ))
}

/// Addresses that are dirtied: pages alone, neighbors, a run, the last page.
fn dirtied(size: u64) -> Vec<u64> {
    let mut pages = vec![0, 3, 4, 5, 17, 64, 65, 130];
    pages.push(size / PAGE - 1);
    pages.iter().map(|page| page * PAGE + 4100).collect()
}

/// A diff from a bitmap with pages of `bitmap_page`, rebuilt to `granule` after the first half of
/// the marks.
fn diff(fixture: &Fixture, bitmap_page: u64, granule: u64, size: u64) -> anyhow::Result<Outcome> {
    let dirty = DirtyBitmap::new(0x4000_0000, size, bitmap_page)?;
    let addresses = dirtied(size);
    let (before, after) = addresses.split_at(addresses.len() / 2);
    for offset in before {
        dirty.mark(0x4000_0000 + offset)?;
    }
    dirty.rebuild(granule)?;
    for offset in after {
        dirty.mark(0x4000_0000 + offset)?;
    }
    // What must be in the file, worked out page by page: a mark is as wide as the bitmap's page was
    // when it was made.
    let mut wanted = vec![false; (size / PAGE) as usize];
    for (offset, width) in before
        .iter()
        .map(|offset| (offset, bitmap_page.max(granule)))
        .chain(after.iter().map(|offset| (offset, granule)))
    {
        let start = offset / width * width;
        for page in start / PAGE..((start + width).div_ceil(PAGE)).min(size / PAGE) {
            wanted[page as usize] = true;
        }
    }

    let dest = fixture.path("diff.mem");
    let ram = Stamped::new(2, size);
    let pages = fixture.target.diff(&dest, &ram, &dirty, PAGE)?;
    let count = wanted.iter().filter(|wanted| **wanted).count() as u64;
    let expected = format!("{count} pages of {PAGE} bytes at their offsets, zeros between them");
    if let Some(wrong) = wrong_page(&dest, &ram, &wanted)? {
        return Ok(Outcome::broken(expected, wrong));
    }
    Ok(Outcome::promise(
        pages == count,
        expected,
        format!("{pages} pages, every byte correct"),
    ))
}

/// The first page that is not the RAM's where wanted, or not zeros elsewhere.
fn wrong_page(dest: &Path, ram: &Stamped, wanted: &[bool]) -> anyhow::Result<Option<String>> {
    let file = File::open(dest)?;
    let size = file.metadata()?.len();
    if size != ram.size {
        return Ok(Some(format!("a file of {size} bytes")));
    }
    for (page, wanted) in (0..).zip(wanted) {
        let range = page * PAGE..(page + 1) * PAGE;
        let bytes: &dyn PageReader = if *wanted { ram } else { &Zeros };
        if let Some(at) = first_difference(&file, range, bytes)? {
            let what = if *wanted {
                "a dirty page lacks its bytes"
            } else {
                "a clean page is not zeros"
            };
            return Ok(Some(format!("{what}: byte {at}, page {page}")));
        }
    }
    Ok(None)
}

fn pre_copy(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path("live.mem");
    let (old, new) = (Stamped::new(1, RAM), Stamped::new(2, RAM));
    let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
    dirty.mark_range(5 * PAGE, 7 * PAGE)?;
    let mut writer = MemoryWriter::open(&dest, RAM, PAGE)?;
    writer.write_full(&old)?;
    writer.write_diff(&new, &dirty)?;
    writer.commit()?;
    let file = File::open(&dest)?;
    let parts: [(Range<u64>, &dyn PageReader); 3] = [
        (0..5 * PAGE, &old),
        (5 * PAGE..12 * PAGE, &new),
        (12 * PAGE..RAM, &old),
    ];
    for (range, ram) in parts {
        if let Some(at) = first_difference(&file, range, ram)? {
            return Ok(Outcome::broken(
                "each page as last written",
                format!("byte {at} differs"),
            ));
        }
    }
    Ok(Outcome::holds(
        "each page as last written",
        "every byte correct",
    ))
}

/// A full image and two diffs on it.
fn chain(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the chain's bytes are the RAM's; the file system identifies the diffs' pages";
    let base = fixture.path("base.mem");
    fixture
        .target
        .full(&base, &Stamped::new(1, RAM), RAM, PAGE)?;
    let mut chain = Chain::open_raw(&base, PAGE)?;
    let mut unclear = None;
    let runs = [
        vec![0..2 * PAGE, 9 * PAGE..10 * PAGE],
        vec![PAGE..3 * PAGE, RAM - PAGE..RAM],
    ];
    let mut owner = vec![1; (RAM / PAGE) as usize];
    for (stamp, runs) in (2..).zip(runs) {
        let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
        for run in &runs {
            dirty.mark_range(run.start, run.end - run.start)?;
            owner[(run.start / PAGE) as usize..(run.end / PAGE) as usize].fill(stamp);
        }
        let diff = fixture.path(&format!("diff-{stamp}.mem"));
        fixture
            .target
            .diff(&diff, &Stamped::new(stamp, RAM), &dirty, PAGE)?;
        match chain.push_raw(&diff) {
            Ok(()) => {}
            Err(ChainError::AmbiguousDiff { why, .. }) => {
                unclear = Some(why.to_string());
                chain.push_pages(&diff, runs)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let mut ram = vec![0; RAM as usize];
    chain.restore(ram.as_mut_slice())?;
    for (page, stamp) in (0..).zip(owner) {
        let range = page * PAGE..(page + 1) * PAGE;
        let wanted = Stamped::new(stamp, RAM).bytes(range.clone());
        if ram[range.start as usize..range.end as usize] != wanted {
            return Ok(Outcome::broken(
                expected,
                format!("page {page} is not that of image {stamp}"),
            ));
        }
    }
    Ok(match unclear {
        None => Outcome::holds(expected, "every byte correct"),
        Some(why) => Outcome::differs(
            expected,
            format!(
                "a diff is refused unless its pages are given ({why}); with them, every byte is correct"
            ),
        ),
    })
}

/// What is committed can be read by its holes; what could not be is refused before it is written.
fn read_back(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "read back by its holes, or refused before it is written";
    let base = fixture.path("base.mem");
    fixture
        .target
        .full(&base, &Stamped::new(1, RAM), RAM, PAGE)?;
    let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
    dirty.mark_range(3 * PAGE, 2 * PAGE)?;
    let diff = fixture.path("diff.mem");
    let mut writer = MemoryWriter::open(&diff, RAM, PAGE)?;
    match writer.write_diff(&Stamped::new(2, RAM), &dirty) {
        Ok(_) => writer.commit()?,
        Err(SnapshotError::AmbiguousDiff { source, .. }) => {
            return Ok(Outcome::holds(expected, format!("refused: {source}")));
        }
        Err(error) => return Err(error.into()),
    }
    let mut chain = Chain::open_raw(&base, PAGE)?;
    if let Err(error) = chain.push_raw(&diff) {
        return Ok(Outcome::broken(
            expected,
            format!("committed, and not read back: {error}"),
        ));
    }
    let mut ram = vec![0; RAM as usize];
    chain.restore(ram.as_mut_slice())?;
    let pages = [(0..3, 1), (3..5, 2), (5..RAM / PAGE, 1)];
    for (pages, stamp) in pages {
        let range = pages.start * PAGE..pages.end * PAGE;
        let wanted = Stamped::new(stamp, RAM).bytes(range.clone());
        if ram[range.start as usize..range.end as usize] != wanted {
            return Ok(Outcome::broken(expected, "read back with other bytes"));
        }
    }
    Ok(Outcome::holds(expected, "read back, every byte correct"))
}

/// Pages on both sides of the border where 32 bits end, and the last.
fn over_4_gib(fixture: &Fixture) -> anyhow::Result<Outcome> {
    const BORDER: u64 = 1 << 32;
    const SIZE: u64 = BORDER + (1 << 20);
    let dirty = DirtyBitmap::new(0, SIZE, PAGE)?;
    let pages = [0, BORDER - PAGE, BORDER, SIZE - PAGE];
    for page in pages {
        dirty.mark(page)?;
    }
    let dest = fixture.path("large.mem");
    let ram = Stamped::new(3, SIZE);
    let written = fixture
        .target
        .diff(&dest, &ram, &dirty, PAGE)
        .context("a diff of 4 GiB + 1 MiB")?;
    let file = File::open(&dest)?;
    let expected = format!("a diff of {SIZE} bytes with {} pages", pages.len());
    let mut wrong = written != 4 || file.metadata()?.len() != SIZE;
    for page in pages {
        wrong |= first_difference(&file, page..page + PAGE, &ram)?.is_some();
    }
    // One clean page each in the middle of the file and beside the border.
    for clean in [BORDER / 2, BORDER - 2 * PAGE, BORDER + PAGE] {
        wrong |= first_difference(&file, clean..clean + PAGE, &Zeros)?.is_some();
    }
    Ok(Outcome::promise(
        !wrong,
        expected,
        if wrong {
            "wrong bytes"
        } else {
            "every page correct"
        },
    ))
}
