//! Comparison of two states of a guest.

mod support;

use std::io;
use std::ops::{ControlFlow, Range};

use memory_image::{Chain, CompareError, compare, find_difference};
use memory_writer::{Layout, MemoryWriter, Seal};
use page_reader::{PageReader, PopulatedRanges};
use support::sealed_guest::{Guest, PAGE, SIZE};

#[test]
fn comparing_two_chains_yields_the_pages_of_a_diff() {
    let guest = Guest::with_history(Layout::Packed);
    let older = Chain::open_sealed(&guest.snapshots[..2]).unwrap();
    let newer = guest.chain();
    let proceed = &mut |_| ControlFlow::Continue(());
    let changed = compare(&older, &newer, SIZE, PAGE, proceed).unwrap();
    let runs: Vec<_> = changed.runs().collect();
    assert_eq!(
        runs,
        [
            3 * PAGE..4 * PAGE,
            40 * PAGE..42 * PAGE,
            255 * PAGE..257 * PAGE
        ]
    );
    assert!(
        compare(&newer, &newer, SIZE, PAGE, proceed)
            .unwrap()
            .is_clean()
    );
}

#[test]
fn comparison_reports_progress_cancellation_and_read_errors() {
    let guest = Guest::with_history(Layout::Packed);
    let chain = guest.chain();
    let mut seen = Vec::new();
    let _ = compare(&guest.ram, &chain, SIZE, PAGE, &mut |progress| {
        assert_eq!(progress.total, SIZE);
        seen.push(progress.done);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&SIZE), "{seen:?}");
    let error = compare(&guest.ram, &chain, SIZE, PAGE, &mut |_| {
        ControlFlow::Break(())
    })
    .unwrap_err();
    assert!(matches!(error, CompareError::Cancelled { .. }), "{error:?}");
    let short = &guest.ram[..2 << 20];
    let proceed = &mut |_| ControlFlow::Continue(());
    let error = compare(&chain, &short, SIZE, PAGE, proceed).unwrap_err();
    let CompareError::Read {
        which: "newer",
        offset,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(offset, 2 << 20);
}

/// A source of zeros that has only the second MiB. The others cannot be read.
struct OneMebibyte;

impl PageReader for OneMebibyte {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert_eq!((offset, buf.len()), (1 << 20, 1 << 20));
        buf.fill(0);
        Ok(())
    }

    fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
        Box::new(std::iter::once(1 << 20..2 << 20))
    }
}

#[test]
fn comparison_reads_only_populated_ranges() {
    let proceed = &mut |_| ControlFlow::Continue(());
    let changed = compare(&OneMebibyte, &OneMebibyte, SIZE, PAGE, proceed).unwrap();
    assert!(changed.is_clean());
}

/// A source of one byte everywhere, in whole MiB. It has only these.
struct Mebibytes(u8, &'static [u64]);

impl PageReader for Mebibytes {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let is_populated = self.1.contains(&(offset >> 20));
        buf.fill(if is_populated { self.0 } else { 0 });
        Ok(())
    }

    fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
        Box::new(self.1.iter().map(|at| at << 20..(at + 1) << 20))
    }
}

#[test]
fn ranges_of_either_source_are_compared_once() {
    const MIB: u64 = 1 << 20;
    let (one, other) = (Mebibytes(1, &[1, 4]), Mebibytes(2, &[0, 1, 3]));
    for (older, newer) in [(&one, &other), (&other, &one)] {
        let mut last = 0;
        let progress = &mut |progress: memory_image::Progress| {
            last = progress.done;
            ControlFlow::Continue(())
        };
        let changed = compare(older, newer, 6 * MIB, PAGE, progress).unwrap();
        let runs: Vec<_> = changed.runs().collect();
        assert_eq!(runs, [0..2 * MIB, 3 * MIB..5 * MIB]);
        assert_eq!(last, 6 * MIB);
    }
}

/// Pages of zeros that did not change are no difference, and a page that is in two pieces of 1 MiB
/// is never known to be zeros.
#[test]
fn pages_that_became_zeros_are_found() {
    let proceed = &mut |_| ControlFlow::Continue(());
    let size = 8 << 20;
    let (mut older, mut newer) = (vec![1; size], vec![1; size]);
    newer[PAGE as usize..9 * PAGE as usize].fill(0);
    newer[40 * PAGE as usize] = 7;
    (older[100 * PAGE as usize..]).fill(0);
    (newer[100 * PAGE as usize..]).fill(0);
    let found = find_difference(&older, &newer, size as u64, PAGE, proceed).unwrap();
    let changed: Vec<_> = found.changed.runs().collect();
    assert_eq!(changed, [PAGE..9 * PAGE, 40 * PAGE..41 * PAGE]);
    assert!(found.zeros.runs().eq([PAGE..9 * PAGE]));
    older.fill(1);
    newer.fill(1);
    newer[..1 << 20].fill(0);
    let found = find_difference(&older, &newer, size as u64, 2 << 20, proceed).unwrap();
    assert!(found.changed.runs().eq([0..2 << 20]));
    assert!(found.zeros.is_clean());
}

/// The bytes of a diff are right, in pages of any size that a writer has.
#[test]
fn a_difference_is_written_as_a_diff() {
    let proceed = &mut |_| ControlFlow::Continue(());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let older = vec![1; SIZE as usize];
    let mut newer = older.clone();
    newer[PAGE as usize..20 * PAGE as usize].fill(0);
    newer[300 * PAGE as usize] = 7;
    let options = |seal| MemoryWriter::options().layout(Layout::Packed).seal(seal);
    let mut full = options(Seal::new()).open(path("full"), SIZE, PAGE).unwrap();
    full.write_full(&older).unwrap();
    let parent = full.image_id().unwrap();
    full.commit().unwrap();
    let found = find_difference(&older, &newer, SIZE, PAGE, proceed).unwrap();
    for (page, skips, stored) in [
        (PAGE, true, PAGE),
        (PAGE / 2, true, PAGE),
        (PAGE, false, 20 * PAGE),
        (2 * PAGE, true, 22 * PAGE),
    ] {
        let diff = path("diff");
        let options = options(Seal::new().parent(parent)).skip_zeros(skips);
        let mut writer = options.open(&diff, SIZE, page).unwrap();
        found.write_to(&mut writer, &newer).unwrap();
        writer.commit().unwrap();
        let chain = Chain::open_sealed(&[path("full"), diff]).unwrap();
        let mut ram = vec![9; SIZE as usize];
        chain.read(0, &mut ram).unwrap();
        assert!(ram == newer, "{page} {skips}");
        let footer = chain.images().last().unwrap().footer().unwrap();
        assert_eq!(footer.present_bytes(), stored, "{page} {skips}");
    }
}
