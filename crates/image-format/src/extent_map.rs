//! The positions of pages in an image file, while it is written.

use std::ops::Range;

use crate::extent::{Extent, push};
use crate::layout::Layout;
use crate::run::Run;
use crate::write_plan::WritePlan;

/// The extents of the pages that are in an image file.
///
/// A write of pages has three steps. [`plan`](Self::plan) assigns an offset in the file to each
/// page: that of its earlier copy, or a new one. The caller writes the
/// [extents](WritePlan::extents) of the plan. [`merge`](Self::merge) adds them to the map.
///
/// # Examples
/// ```
/// use image_format::{ExtentMap, Layout, packed_start};
///
/// let mut map = ExtentMap::new(Layout::Packed, packed_start(4096));
/// let plan = map.plan(2, [8192..12288, 32768..36864]);
/// assert_eq!(plan.guest_offset(8192 + 5), Some(32768 + 5));
/// // Write the bytes of `plan.extents()`.
/// map.merge(plan);
/// assert_eq!(map.extents().len(), 2);
/// ```
#[derive(Clone, Debug)]
pub struct ExtentMap {
    layout: Layout,
    /// The offset of the first page.
    start: u64,
    /// In ascending order of guest offsets, not overlapping.
    extents: Vec<Extent>,
    /// The offset of the next page that is appended.
    next: u64,
}

impl ExtentMap {
    /// Creates an empty map of a file whose pages begin at `start`.
    #[must_use]
    pub fn new(layout: Layout, start: u64) -> Self {
        Self {
            layout,
            start,
            extents: Vec::new(),
            next: start,
        }
    }

    /// Returns the layout of the file.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Returns the extents in ascending order of guest offsets.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Returns the number of bytes in all extents.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Returns whether no page is in the file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Returns the parts of the extents that overlap `range` of guest offsets, ascending.
    pub fn within<'m>(&'m self, range: &'m Range<u64>) -> impl Iterator<Item = Extent> + 'm {
        let first = self
            .extents
            .partition_point(|extent| extent.guest_range().end <= range.start);
        self.extents[first..]
            .iter()
            .map_while(move |extent| extent.within(range))
    }

    /// Plans a write of `runs` of pages, which are ascending ranges of guest offsets. Reserves
    /// memory for `count` extents: with the number of runs, the list does not grow beyond its need.
    pub fn plan(&self, count: u64, runs: impl IntoIterator<Item = Range<u64>>) -> WritePlan {
        let mut extents = Vec::new();
        // If this allocation fails, the list grows as runs are added.
        let _ = extents.try_reserve_exact(usize::try_from(count).unwrap_or(0));
        let mut plan = WritePlan {
            placement: self.layout.placement(),
            start: self.start,
            extents,
            unordered: false,
            end: 0,
            next: self.next,
            last_new: None,
            new: 0,
        };
        for run in runs {
            let mut at = run.start;
            for old in self.within(&run) {
                plan.append(at..old.guest);
                push(&mut plan.extents, old);
                at = old.guest_range().end;
            }
            plan.append(at..run.end);
        }
        if !plan.extents.is_sorted_by_key(|extent| extent.file) {
            plan.extents.sort_unstable_by_key(|extent| extent.file);
        }
        plan.unordered = false;
        plan.end = plan.extents.last().map_or(0, |last| last.file_range().end);
        plan
    }

    /// Adds the extents of a plan, which were written.
    pub fn merge(&mut self, plan: WritePlan) {
        self.next = plan.next;
        if self.extents.is_empty() {
            self.extents = plan.extents;
        } else {
            // Sorts in place: the list of a large guest is large.
            self.extents.extend_from_slice(&plan.extents);
            drop(plan);
        }
        self.extents.sort_unstable_by_key(|extent| extent.guest);
        // Pages that were in the file before have the same place in both lists.
        self.extents.dedup_by(|next, last| {
            let end = last.guest + last.len;
            let same = next.guest.wrapping_sub(next.file) == last.guest.wrapping_sub(last.file);
            let joined = next.guest <= end && same;
            if joined {
                last.len = end.max(next.guest + next.len) - last.guest;
            }
            joined
        });
    }

    /// Returns the runs of an image with these extents and with `zeros` between the extents, in
    /// ascending order. `zeros` ascend and do not overlap; their parts inside extents do not count.
    ///
    /// Lazy: for a large guest, a list would take more memory than the extents.
    pub fn runs<'a>(
        &'a self,
        zeros: &'a [Range<u64>],
        ram_size: u64,
    ) -> impl Iterator<Item = Run> + Clone + 'a {
        let (mut extents, mut zeros, mut at) = (&self.extents[..], zeros, 0);
        std::iter::from_fn(move || {
            let end = extents.first().map_or(ram_size, |extent| extent.guest);
            while let [first, rest @ ..] = zeros
                && first.end <= at
            {
                zeros = rest;
            }
            if let Some(run) = zeros.first().filter(|run| run.start.max(at) < end) {
                let run = run.start.max(at)..run.end.min(end);
                at = run.end;
                return Some(Run::zeros(run));
            }
            let (first, rest) = extents.split_first()?;
            (extents, at) = (rest, first.guest_range().end);
            Some(Run::present(first.guest_range(), first.file))
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Extents as guest offset, file offset and length.
    fn extents(all: &[Extent]) -> Vec<(u64, u64, u64)> {
        let extent = |extent: &Extent| (extent.guest, extent.file, extent.len);
        all.iter().map(extent).collect()
    }

    #[test]
    fn pages_written_again_keep_their_packed_place() {
        let mut map = ExtentMap::new(Layout::Packed, 100);
        map.merge(map.plan(2, [20..30, 40..50]));
        let plan = map.plan(2, [15..25, 45..60]);
        // In the order of the file: the old pages first.
        assert_eq!(
            extents(plan.extents()),
            [(20, 100, 5), (45, 115, 5), (15, 120, 5), (50, 125, 10)]
        );
        assert_eq!(
            (plan.len(), plan.new_extents(), plan.file_end()),
            (25, 2, 135)
        );
        let guest = [
            (99, None),
            (104, Some(24)),
            (105, None),
            (125, Some(50)),
            (135, None),
        ];
        for (file, guest) in guest {
            assert_eq!(plan.guest_offset(file), guest, "{file}");
        }
        map.merge(plan);
        assert_eq!(
            extents(map.extents()),
            [(15, 120, 5), (20, 100, 10), (40, 110, 10), (50, 125, 10)]
        );
        assert_eq!(map.len(), 35);
    }

    #[rstest]
    #[case(Layout::Raw)]
    #[case(Layout::Sealed)]
    fn pages_in_place_are_at_their_guest_offsets(#[case] layout: Layout) {
        let mut map = ExtentMap::new(layout, 0);
        map.merge(map.plan(2, [20..30, 40..50]));
        let plan = map.plan(2, [0..2, 25..45]);
        assert_eq!(extents(plan.extents()), [(0, 0, 2), (25, 25, 20)]);
        assert_eq!(plan.new_extents(), 2);
        map.merge(plan);
        assert_eq!(extents(map.extents()), [(0, 0, 2), (20, 20, 30)]);
    }

    #[test]
    fn appended_pages_follow_each_other_in_a_packed_file() {
        let map = ExtentMap::new(Layout::Packed, 100);
        let mut plan = map.plan(0, []);
        assert_eq!(plan.append(8..16).file_range(), 100..108);
        assert_eq!(plan.append(16..20).file_range(), 108..112);
        assert_eq!(plan.append(40..44).file_range(), 112..116);
        assert_eq!((plan.extents().len(), plan.new_extents()), (2, 2));
    }

    #[rstest]
    #[case::in_place(Layout::Sealed, [(40, 40), (44, 44), (8, 8), (60, 60), (12, 12)], 64)]
    #[case::packed(Layout::Packed, [(40, 0), (44, 4), (8, 8), (60, 12), (12, 16)], 20)]
    fn pages_appended_in_any_order_are_found(
        #[case] layout: Layout,
        #[case] placed: [(u64, u64); 5],
        #[case] end: u64,
    ) {
        let mut map = ExtentMap::new(layout, 0);
        let mut plan = map.plan(0, []);
        for (at, (guest, file)) in placed.iter().enumerate() {
            assert_eq!(plan.append(*guest..guest + 4).file, *file);
            for (guest, file) in &placed[..=at] {
                assert_eq!(plan.guest_offset(file + 3), Some(guest + 3));
            }
        }
        assert_eq!((plan.len(), plan.file_end()), (20, end));
        assert_eq!(plan.guest_offset(end), None);
        map.merge(plan);
        let in_order: Vec<_> = map.extents().iter().map(|extent| extent.guest).collect();
        assert!(in_order.is_sorted());
        assert_eq!(map.len(), 20);
        for (guest, file) in placed {
            let found: Vec<_> = map.within(&(guest..guest + 4)).collect();
            assert_eq!((found.len(), found[0].file), (1, file));
        }
    }

    /// Extents as guest offset and length.
    #[rstest]
    #[case::none(&[], &[], &[])]
    #[case::zeros_only(&[], &[2..4], &[(2..4, false)])]
    #[case::extents_only(&[(2, 2)], &[], &[(2..4, true)])]
    #[case::all(&[(2, 2)], &[0..10], &[(0..2, false), (2..4, true), (4..10, false)])]
    #[case::extent_inside(&[(3, 1)], &[2..6], &[(2..3, false), (3..4, true), (4..6, false)])]
    #[case::extent_around(&[(1, 8)], &[2..4, 5..6], &[(1..9, true)])]
    #[case::ends_overlap(
        &[(2, 2), (6, 2)],
        &[3..7],
        &[(2..4, true), (4..6, false), (6..8, true)]
    )]
    #[case::adjacent(&[(2, 2)], &[0..2, 4..5], &[(0..2, false), (2..4, true), (4..5, false)])]
    #[case::several_in_a_gap(
        &[(8, 1)],
        &[0..1, 3..4, 7..10],
        &[(0..1, false), (3..4, false), (7..8, false), (8..9, true), (9..10, false)]
    )]
    fn zeros_are_listed_outside_extents(
        #[case] extents: &[(u64, u64)],
        #[case] zeros: &[Range<u64>],
        #[case] expected: &[(Range<u64>, bool)],
    ) {
        let mut map = ExtentMap::new(Layout::Sealed, 0);
        map.merge(map.plan(0, extents.iter().map(|(guest, len)| *guest..guest + len)));
        let run = |(range, present): &(Range<u64>, bool)| match present {
            true => Run::present(range.clone(), range.start),
            false => Run::zeros(range.clone()),
        };
        let expected: Vec<_> = expected.iter().map(run).collect();
        assert_eq!(map.runs(zeros, 10).collect::<Vec<_>>(), expected);
    }
}
