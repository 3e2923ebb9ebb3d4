//! Comparison of two states of a guest.

mod support;

use std::io;
use std::ops::{ControlFlow, Range};

use memory_image::{Chain, CompareError, compare};
use memory_writer::Layout;
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
