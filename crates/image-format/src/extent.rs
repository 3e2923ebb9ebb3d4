//! Bytes that are contiguous in RAM and in an image file.

use std::ops::Range;

/// Bytes that are contiguous in RAM and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The guest offset of the first byte.
    pub guest: u64,
    /// The file offset of the first byte.
    pub file: u64,
    /// The length in bytes.
    pub len: u64,
}

impl Extent {
    /// Returns the guest offsets of the extent.
    #[must_use]
    pub fn guest_range(&self) -> Range<u64> {
        self.guest..self.guest + self.len
    }

    /// Returns the file offsets of the extent.
    #[must_use]
    pub fn file_range(&self) -> Range<u64> {
        self.file..self.file + self.len
    }

    /// Returns the part of the extent inside `range` of guest offsets.
    pub(crate) fn within(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.guest.max(range.start);
        let end = (self.guest + self.len).min(range.end);
        (start < end).then(|| Self {
            guest: start,
            file: self.file + (start - self.guest),
            len: end - start,
        })
    }

    /// Appends `next` if it follows in RAM and in the file. Returns whether it did.
    pub(crate) fn try_append(&mut self, next: &Self) -> bool {
        let follows = self.guest + self.len == next.guest && self.file + self.len == next.file;
        if follows {
            self.len += next.len;
        }
        follows
    }
}

/// Adds an extent to a list, or appends it to the last one.
pub(crate) fn push(extents: &mut Vec<Extent>, next: Extent) {
    if !extents
        .last_mut()
        .is_some_and(|last| last.try_append(&next))
    {
        extents.push(next);
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::in_both(14, 104, 1)]
    #[case::in_ram_only(14, 105, 2)]
    #[case::in_the_file_only(15, 104, 2)]
    fn contiguous_extents_are_joined(
        #[case] guest: u64,
        #[case] file: u64,
        #[case] extents: usize,
    ) {
        let mut all = Vec::new();
        for (guest, file, len) in [(10, 100, 4), (guest, file, 3)] {
            push(&mut all, Extent { guest, file, len });
        }
        assert_eq!(all.len(), extents);
        assert_eq!(all.iter().map(|extent| extent.len).sum::<u64>(), 7);
    }
}
