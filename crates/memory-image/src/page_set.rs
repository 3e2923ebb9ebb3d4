//! Page sets of one image, as runs.

use std::ops::Range;

/// The pages that an image holds. Takes 16 bytes for each run, independent of the size of the RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageSet {
    page_size: u64,
    /// In bytes, in the order of addition.
    runs: Vec<Range<u64>>,
}

impl PageSet {
    /// Returns an empty set.
    pub(crate) fn new(page_size: u64) -> Self {
        Self {
            page_size,
            runs: Vec::new(),
        }
    }

    /// Adds the pages that `bytes` touch.
    pub(crate) fn add(&mut self, bytes: &Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let start = bytes.start - bytes.start % self.page_size;
        let end = bytes.end.next_multiple_of(self.page_size);
        match self.runs.last_mut() {
            Some(last) if (last.start..=last.end).contains(&start) => last.end = last.end.max(end),
            _ => self.runs.push(start..end),
        }
    }

    /// Returns the runs of pages in the set: ascending, in bytes, each as long as possible.
    pub(crate) fn into_runs(mut self) -> impl Iterator<Item = Range<u64>> {
        self.runs.sort_unstable_by_key(|run| run.start);
        coalesce(self.runs.into_iter())
    }
}

/// Joins ascending ranges that touch or overlap.
pub(crate) fn coalesce(
    ranges: impl Iterator<Item = Range<u64>>,
) -> impl Iterator<Item = Range<u64>> {
    let mut ranges = ranges.peekable();
    std::iter::from_fn(move || {
        let mut range = ranges.next()?;
        while let Some(next) = ranges.next_if(|next| next.start <= range.end) {
            range.end = range.end.max(next.end);
        }
        Some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_added_in_any_order_become_the_longest_runs() {
        let mut set = PageSet::new(4096);
        assert_eq!(set.clone().into_runs().count(), 0);
        set.add(&(5000..5000));
        set.add(&(60 * 4096..70 * 4096));
        set.add(&(4095..4097));
        set.add(&(65 * 4096..66 * 4096));
        set.add(&(70 * 4096..71 * 4096));
        set.add(&(199 * 4096..200 * 4096));
        set.add(&(199 * 4096..199 * 4096 + 1));
        assert_eq!(
            set.into_runs().collect::<Vec<_>>(),
            [0..8192, 60 * 4096..71 * 4096, 199 * 4096..200 * 4096]
        );
    }
}
