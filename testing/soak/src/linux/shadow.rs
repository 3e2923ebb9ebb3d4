//! A copy of the RAM, byte for byte, that what is restored must equal.

use std::fmt;

use dirty_bitmap::DirtyBitmap;
use page_reader::PageReader;

/// Bytes copied or compared at a time.
const CHUNK: usize = 1 << 18;

/// No bitmap here has finer marks.
const FINEST: usize = 512;

/// The RAM of a guest at a moment in which it was stopped.
pub(super) struct Shadow(Vec<u8>);

/// What should be equal and is not.
#[derive(Debug)]
pub(super) struct Difference {
    /// The first byte in the RAM that differs.
    pub at: u64,
    pub what: PageViolation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageViolation {
    /// The page is what an older save has of it, or is about to be.
    Lost,
    /// The page is nothing that was saved.
    Torn,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            PageViolation::Lost => "a page is lost",
            PageViolation::Torn => "a page is torn",
        };
        write!(
            f,
            "{what}: it differs from the RAM's copy at {:#x}",
            self.at
        )
    }
}

impl std::error::Error for Difference {}

impl Shadow {
    /// Copies the RAM of a guest that is stopped.
    pub(super) fn take(ram: &dyn PageReader, size: u64) -> anyhow::Result<Self> {
        let mut bytes = vec![0; usize::try_from(size)?];
        for (chunk, at) in bytes.chunks_mut(CHUNK).zip((0..).step_by(CHUNK)) {
            ram.read_at(at, chunk)?;
        }
        Ok(Self(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Compares all bytes of `restored` with this shadow. The error describes the first difference
    /// with the help of the shadow before this one, if there is one.
    pub(super) fn compare(
        &self,
        restored: &dyn PageReader,
        older: Option<&Self>,
    ) -> anyhow::Result<()> {
        let mut found = vec![0; CHUNK];
        for (wanted, at) in self.0.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let found = &mut found[..wanted.len()];
            restored.read_at(at, found)?;
            self.compare_piece(at, found, older)?;
        }
        Ok(())
    }

    /// Compares the bytes `found` at `offset`.
    pub(super) fn compare_piece(
        &self,
        offset: u64,
        found: &[u8],
        older: Option<&Self>,
    ) -> Result<(), Difference> {
        let start = offset as usize;
        let wanted = &self.0[start..start + found.len()];
        if found == wanted {
            return Ok(());
        }
        let mut both = found.chunks(FINEST).zip(wanted.chunks(FINEST));
        let sector = both
            .position(|(found, wanted)| found != wanted)
            .unwrap_or(0);
        let from = sector * FINEST;
        let found = &found[from..found.len().min(from + FINEST)];
        let at = start + from;
        let is_older = older.is_some_and(|older| older.0[at..at + found.len()] == *found);
        Err(Difference {
            at: at as u64,
            what: if is_older {
                PageViolation::Lost
            } else {
                PageViolation::Torn
            },
        })
    }

    /// Finds a byte that has changed since `saved`, and that `dirty` has no mark for: the next diff
    /// would not have it.
    pub(super) fn check_marks<K>(
        &self,
        saved: &Self,
        dirty: &DirtyBitmap<K>,
    ) -> anyhow::Result<()> {
        let chunks = self.0.chunks(CHUNK).zip(saved.0.chunks(CHUNK));
        for ((now, then), start) in chunks.zip((0_u64..).step_by(CHUNK)) {
            if now == then {
                continue;
            }
            let sectors = now.chunks(FINEST).zip(then.chunks(FINEST));
            for ((now, then), at) in sectors.zip((start..).step_by(FINEST)) {
                if now != then && !dirty.is_dirty(at)? {
                    let what = PageViolation::Lost;
                    return Err(Difference { at, what }.into());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8192;

    fn violation(found: anyhow::Result<()>) -> Option<(u64, PageViolation)> {
        let error = found.err()?;
        let Difference { at, what } = error.downcast_ref().expect("a difference");
        Some((*at, *what))
    }

    #[test]
    fn a_page_of_an_older_save_is_lost_and_any_other_torn() {
        let [older, now] = [1_u8, 2].map(|byte| vec![byte; SIZE as usize]);
        let shadow = |ram: &Vec<u8>| Shadow::take(ram, SIZE).expect("a copy");
        let (before, expected) = (shadow(&older), shadow(&now));
        let compare = |found: &Vec<u8>| violation(expected.compare(found, Some(&before)));
        assert_eq!(compare(&now), None);
        assert_eq!(compare(&older), Some((0, PageViolation::Lost)));
        let mut found = now.clone();
        found[5000] = 1;
        assert_eq!(compare(&found), Some((4608, PageViolation::Torn)));
        found[4608..5120].fill(1);
        assert_eq!(compare(&found), Some((4608, PageViolation::Lost)));
    }

    #[test]
    fn what_changed_must_be_marked() {
        let then = vec![0_u8; SIZE as usize];
        let mut now = then.clone();
        now[4100] = 1;
        let shadow = |ram: &Vec<u8>| Shadow::take(ram, SIZE).expect("a copy");
        let dirty = DirtyBitmap::new(0, SIZE, 4096).expect("a bitmap");
        let check = || violation(shadow(&now).check_marks(&shadow(&then), &dirty));
        assert_eq!(check(), Some((4096, PageViolation::Lost)));
        dirty.mark(4096).expect("inside");
        assert_eq!(check(), None);
    }
}
