//! Zeros that diffs store, written again by a writer that skips zeros.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use memory_image::{Chain, Image, Layout, MergeError, Pass};
use memory_writer::{MemoryWriter, MemoryWriterOptions, Seal, SnapshotError};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const PAGES: u64 = 600;
const RAM: u64 = PAGES * PAGE;

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options().layout(layout).seal(seal)
}

/// Writes a diff that stores `runs` of pages of `ram`.
fn diff(dir: &Path, ram: &[u8], runs: &[Range<u64>]) -> PathBuf {
    let path = dir.join("diff");
    let seal = Seal::new().on_raw_image();
    let mut writer = options(Layout::Sealed, seal)
        .open(&path, RAM, PAGE)
        .unwrap();
    let bytes = || runs.iter().map(|run| run.start * PAGE..run.end * PAGE);
    writer.write_runs(ram, bytes).unwrap();
    writer.commit().unwrap();
    path
}

/// Merges the diff into one that skips zeros. Returns its stored runs and its runs of zeros.
fn merged(path: &Path, page_size: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>, Vec<u8>) {
    let chain = open(path, PAGE);
    let dest = path.with_file_name("merged");
    let options = options(Layout::Packed, chain.seal()).skip_zeros(true);
    let mut writer = options.open(&dest, RAM, page_size).unwrap();
    chain.write_to(&mut writer).unwrap();
    writer.commit().unwrap();
    let merged = open(&dest, page_size);
    let mut bytes = vec![0xee; RAM as usize];
    for run in merged.covered_runs() {
        merged
            .read(run.start, &mut bytes[run.start as usize..run.end as usize])
            .unwrap();
    }
    let stored: Vec<_> = merged.stored_runs().collect();
    let mut zeros = Vec::new();
    for run in merged.covered_runs() {
        let mut at = run.start;
        for stored in stored
            .iter()
            .filter(|it| run.start <= it.start && it.end <= run.end)
        {
            zeros.extend(Some(at..stored.start).filter(|it| !it.is_empty()));
            at = stored.end;
        }
        zeros.extend(Some(at..run.end).filter(|it| !it.is_empty()));
    }
    (stored, zeros, bytes)
}

fn open(path: &Path, page_size: u64) -> Chain {
    Chain::from_diff(Image::open(path).unwrap(), page_size).unwrap()
}

fn in_pages(runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let pages = |run: Range<u64>| run.start / PAGE..run.end / PAGE;
    runs.into_iter().map(pages).collect()
}

#[test]
fn long_zeros_and_whole_runs_are_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let mut ram = vec![1; RAM as usize];
    let mut zero = |pages: Range<u64>| {
        ram[(pages.start * PAGE) as usize..(pages.end * PAGE) as usize].fill(0);
    };
    // At the start, in the middle and at the end of a run, across a border of 1 MiB; too short in
    // a run; a run of its own.
    for zeros in [0..8, 20..28, 250..262, 290..300, 310..317, 400..401] {
        zero(zeros);
    }
    let path = diff(dir.path(), &ram, &[0..300, 305..320, 400..401]);
    let (stored, zeros, _) = merged(&path, PAGE);
    assert_eq!(in_pages(stored), [8..20, 28..250, 262..290, 305..320]);
    assert_eq!(
        in_pages(zeros),
        [0..8, 20..28, 250..262, 290..300, 400..401]
    );
}

#[test]
fn the_search_for_zeros_is_reported_and_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let ram = vec![0; RAM as usize];
    let path = diff(dir.path(), &ram, &[0..PAGES]);
    let chain = open(&path, PAGE);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let passes = Arc::clone(&seen);
    let options = options(Layout::Packed, chain.seal()).skip_zeros(true);
    let options = options.progress(move |progress| {
        passes.lock().unwrap().push(progress);
        match progress.pass == Pass::FindZeros && progress.done > 0 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    let mut writer = options.open(dir.path().join("merged"), RAM, PAGE).unwrap();
    let error = chain.write_to(&mut writer).unwrap_err();
    assert!(
        matches!(error, MergeError::Write(SnapshotError::Cancelled { .. })),
        "{error:?}"
    );
    let seen = seen.lock().unwrap();
    assert!(
        seen.iter()
            .any(|it| it.pass == Pass::FindZeros && it.total == RAM)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn merged_diffs_have_the_bytes_and_pages_of_the_old(
        runs in prop::collection::btree_set(0..PAGES, 0..24),
        zeros in prop::collection::vec((0..PAGES, 1..40_u64), 0..24),
        small in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut ram: Vec<u8> = (0..RAM).map(|at| (at / 512 % 250) as u8 + 1).collect();
        for (page, pages) in zeros {
            let end = PAGES.min(page + pages);
            ram[(page * PAGE) as usize..(end * PAGE) as usize].fill(0);
        }
        let borders: Vec<_> = runs.into_iter().collect();
        let runs: Vec<_> = borders.chunks_exact(2).map(|it| it[0]..it[1]).collect();
        let path = diff(dir.path(), &ram, &runs);
        let (_, _, bytes) = merged(&path, if small { 512 } else { PAGE });
        let mut expected = vec![0xee; RAM as usize];
        for run in runs {
            let run = (run.start * PAGE) as usize..(run.end * PAGE) as usize;
            expected[run.clone()].copy_from_slice(&ram[run]);
        }
        prop_assert!(bytes == expected);
    }
}
