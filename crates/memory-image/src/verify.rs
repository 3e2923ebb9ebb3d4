//! Verifies the bytes of an image against its checksums.

use std::io;
use std::ops::Range;

use image_format::{Chunk, ChunkSum, Footer, HEADER_PAGE, Placement};
use page_reader::{SecretBuffer, is_zeros};
use sparse_file::{ExtentKind, Progress, ProgressFn, extents};

use crate::damage::{Damage, VerifyReport};
use crate::error::{ReadImageError, VerifyError};
use crate::image::{Image, READ_SIZE};
use crate::parallel;

/// Maximum number of listed damaged places. Further ones are only counted.
const LISTED: usize = 1000;

impl VerifyReport {
    fn add(&mut self, checked: Checked) {
        if checked.chunk {
            self.chunks += 1;
            self.bytes += checked.bytes;
        }
        if let Some(damage) = checked.damage {
            self.damage_count += 1;
            if self.damage.len() < LISTED {
                self.damage.push(damage);
            }
        }
    }
}

impl Image {
    /// Reads all pages and compares them with the footer's checksums. Also finds nonzero bytes
    /// between the pages of a sealed image, or before the pages of a packed image. A part that the
    /// system cannot read is [damage](Damage::Unreadable) too: the other parts are still verified.
    ///
    /// `progress` is called before the first byte and after each piece. It may cancel. Verification
    /// allocates 1 MiB for each thread. The number of threads is the number of processors, at most
    /// 8.
    ///
    /// # Errors
    /// Returns a [`VerifyError`]. Damage is not an error. If the file was [written
    /// to](Self::check_unchanged) since it was opened, the error is [`ReadImageError::Changed`],
    /// whether damage was found or not.
    ///
    /// # Examples
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use memory_image::Image;
    /// # use memory_writer::{Layout, MemoryWriter};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("full.mem");
    /// # let options = MemoryWriter::options().layout(Layout::Sealed);
    /// # let mut writer = options.open(&path, 1 << 20, 4096)?;
    /// # writer.write_full(&vec![1; 1 << 20])?;
    /// # writer.commit()?;
    ///
    /// let found = Image::open(&path)?.verify(&mut |_progress| ControlFlow::Continue(()))?;
    /// assert!(found.is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify(&self, progress: &mut ProgressFn<'_>) -> Result<VerifyReport, VerifyError> {
        let Some(footer) = &self.footer else {
            return Err(VerifyError::NotSealed {
                path: self.path.clone(),
            });
        };
        let gaps = self.gaps(footer)?;
        let gap_bytes: u64 = gaps.iter().map(|gap| gap.end - gap.start).sum();
        let total = footer.present_bytes() + gap_bytes;
        let pieces = gaps.into_iter().flat_map(|gap| {
            let end = gap.end;
            let starts = gap.step_by(READ_SIZE as usize);
            starts.map(move |start| Work::Gap(start..end.min(start + READ_SIZE)))
        });
        let work = || footer.chunks().map(Work::Chunk).chain(pieces.clone());
        if progress(Progress::new(0, total)).is_break() {
            return Err(VerifyError::Cancelled);
        }
        let (mut found, mut done) = (VerifyReport::default(), 0);
        parallel::for_each(
            // A chain may have thousands of images with one or two pages each: start no thread
            // without work.
            work().count(),
            work(),
            |work, buffer| self.check(&work, buffer),
            |checked| {
                let checked = checked?;
                done += checked.bytes;
                found.add(checked);
                match progress(Progress::new(done, total)).is_break() {
                    true => Err(VerifyError::Cancelled),
                    false => Ok(()),
                }
            },
        )?;
        // Chunks of several versions may each match their checksums, or match none.
        self.check_unchanged()?;
        found.damage.sort_by_key(Damage::offset);
        Ok(found)
    }

    /// Returns the ranges of the file that are data and in no present run. They are zeros unless
    /// the file was modified. They begin behind the header, which was read with the footer. A
    /// packed image has such bytes only before its first page.
    fn gaps(&self, footer: &Footer) -> Result<Vec<Range<u64>>, ReadImageError> {
        let start = footer.data_start();
        let (end, by_offset) = match footer.layout.placement() {
            Placement::ByOffset => (footer.data_end(), true),
            Placement::Appended => (start, false),
        };
        let all = start.min(HEADER_PAGE as u64)..end;
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let mut present = footer
            .runs
            .iter()
            .filter(|_| by_offset)
            .filter_map(|run| {
                let at = run.stored_at(run.start)?;
                Some(at..at + run.len)
            })
            .peekable();
        let mut gaps = Vec::new();
        let mut add = |data: Range<u64>| {
            let mut at = data.start.max(all.start);
            let end = data.end.min(all.end);
            while at < end {
                while present.next_if(|run| run.end <= at).is_some() {}
                let next = present.peek().filter(|run| run.start < end);
                let (gap_end, after) = next.map_or((end, end), |run| (run.start, run.end));
                if at < gap_end {
                    gaps.push(at..gap_end);
                }
                at = after.max(gap_end);
            }
        };
        if !self.has_file() {
            // A reader has no holes.
            add(all.clone());
            return Ok(gaps);
        }
        let failed = |source| self.read_error(0, source);
        let file = self.file()?;
        for extent in extents(&file).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            if extent.kind == ExtentKind::Data {
                add(extent.range);
            }
        }
        Ok(gaps)
    }

    fn check(&self, work: &Work<'_>, buffer: &mut SecretBuffer) -> Result<Checked, ReadImageError> {
        match work {
            Work::Chunk(chunk) => {
                let mut sum = ChunkSum::new();
                let (mut bytes, mut first, mut unread) = (0, None, None);
                for (range, offset) in chunk.pieces() {
                    let len = range.end - range.start;
                    bytes += len;
                    first.get_or_insert(offset);
                    if unread.is_some() {
                        continue;
                    }
                    // Inside a chunk, so at most 1 MiB.
                    let stored = buffer.sized(len as usize);
                    match self.read_file(offset, stored) {
                        Ok(()) => sum.update(stored),
                        Err(error) => unread = Some(unreadable(error)?),
                    }
                }
                let damage = match unread {
                    Some((offset, reason)) => Some(Damage::Unreadable {
                        chunk: Some((chunk.number, chunk.range.clone())),
                        offset,
                        reason,
                    }),
                    None => (sum.finish() != chunk.checksum).then(|| Damage::Chunk {
                        number: chunk.number,
                        guest: chunk.range.clone(),
                        offset: first.unwrap_or(0),
                    }),
                };
                Ok(Checked {
                    chunk: true,
                    bytes,
                    damage,
                })
            }
            Work::Gap(range) => {
                let gap = buffer.sized((range.end - range.start) as usize);
                let damage = match self.read_file(range.start, gap) {
                    Err(error) => {
                        let (offset, reason) = unreadable(error)?;
                        Some(Damage::Unreadable {
                            chunk: None,
                            offset,
                            reason,
                        })
                    }
                    Ok(()) if is_zeros(gap) => None,
                    Ok(()) => {
                        let at = gap.iter().position(|byte| *byte != 0);
                        at.map(|at| Damage::NotZero {
                            offset: range.start + at as u64,
                        })
                    }
                };
                Ok(Checked {
                    chunk: false,
                    bytes: range.end - range.start,
                    damage,
                })
            }
        }
    }
}

/// Returns the offset and the reason of a read that failed for a part of the file. A file that ends
/// early was changed, and a file that cannot be opened again has no part that can be read.
fn unreadable(error: ReadImageError) -> Result<(u64, String), ReadImageError> {
    match error {
        ReadImageError::Read { offset, source, .. }
            if source.kind() != io::ErrorKind::UnexpectedEof =>
        {
            Ok((offset, source.to_string()))
        }
        other => Err(other),
    }
}

enum Work<'f> {
    Chunk(Chunk<'f>),
    Gap(Range<u64>),
}

struct Checked {
    chunk: bool,
    bytes: u64,
    damage: Option<Damage>,
}
