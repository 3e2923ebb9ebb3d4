//! Whether the bytes of an image are those that were written.

use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};
use std::thread;

use image_format::{Chunk, ChunkSum, Footer, packed_start};
use page_reader::{HostMemory, SecretBuffer};
use sparse_file::{Kind, extents};

use crate::error::ImageError;
use crate::image::Image;

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;
/// More threads than this find no work on any device.
const THREADS: usize = 8;
/// Damages that are listed; more are counted.
const LISTED: usize = 1000;

/// What [`Image::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// Bytes of pages that were summed.
    pub bytes: u64,
    /// Chunks that were summed.
    pub chunks: u64,
    /// What is not as it was written, ascending by offset in the file; no more than the first thousand that were found.
    pub damages: Vec<Damage>,
    /// How many damages were found.
    pub found: u64,
}

impl Verified {
    /// Whether everything is as it was written.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.found == 0
    }
}

/// Bytes that are not as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// The present pages of a chunk don't sum to what they did.
    Chunk {
        /// Its number.
        number: u64,
        /// The guest offsets that it stands for, in bytes.
        guest: Range<u64>,
        /// Where its first present byte is in the file.
        offset: u64,
    },
    /// There is something where nothing was written, in a file with pages at their offsets. Restoring doesn't read it; mapping the file as it is would.
    NotZero {
        /// The offset in RAM and in the file of the first byte.
        offset: u64,
    },
}

impl Damage {
    /// Where it is in the file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Chunk { offset, .. } | Self::NotZero { offset } => *offset,
        }
    }
}

impl Image {
    /// Reads all pages and compares them with the footer's checksums; also finds what is not zero between the pages of a sealed image, or before those of
    /// a packed one.
    ///
    /// `progress` is told the bytes that are done and, first, how many there are; it may cancel. Takes memory for one piece of 1 MiB a
    /// thread, and as many threads as the machine has processors, at most 8.
    ///
    /// # Errors
    /// [`ImageError::Footer`] for a raw image, [`ImageError::Read`] where the file can't be read, [`ImageError::Cancelled`]. Damage is no error.
    ///
    /// # Examples
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use memory_image::Image;
    /// # use memory_writer::{Layout, MemoryWriter, Seal};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("full.mem");
    /// # let mut writer = MemoryWriter::options().layout(Layout::Sealed(Seal::new())).open(&path, 1 << 20, 4096)?;
    /// # writer.write_full(&vec![1; 1 << 20])?;
    /// # writer.commit()?;
    ///
    /// let found = Image::open(&path)?.verify(&|_done, _total| ControlFlow::Continue(()))?;
    /// assert!(found.is_whole());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify(
        &self,
        progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
    ) -> Result<Verified, ImageError> {
        let Some(footer) = &self.footer else {
            return Err(ImageError::Footer {
                path: self.path.clone(),
                source: image_format::FooterError::NotSealed,
            });
        };
        let gaps = self.gaps(footer)?;
        let gap_bytes: u64 = gaps.iter().map(|gap| gap.end - gap.start).sum();
        // A chain may have thousands of images with a page or two each: no thread for nothing.
        let most = footer.checksums.len() + (gap_bytes / PIECE) as usize + gaps.len();
        let total = footer.present_bytes() + gap_bytes;
        let pieces = gaps.into_iter().flat_map(|gap| {
            let end = gap.end;
            let starts = gap.step_by(PIECE as usize);
            starts.map(move |start| Work::Gap(start..end.min(start + PIECE)))
        });
        let work = Mutex::new(footer.chunks().map(Work::Chunk).chain(pieces));
        let state = Mutex::new(State::default());
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let work_on = || {
            let mut buffer = SecretBuffer::new();
            loop {
                let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(next) = next else { return };
                let result = self.look_at(&next, &mut buffer);
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.take(result, total, progress).is_break() {
                    return;
                }
            }
        };
        if progress(0, total).is_break() {
            return Err(ImageError::Cancelled);
        }
        thread::scope(|scope| {
            for _ in 1..threads.min(THREADS).min(most) {
                // Fewer threads take longer, and that is all.
                let _ = thread::Builder::new().spawn_scoped(scope, work_on);
            }
            work_on();
        });
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = state.failed {
            return Err(error);
        }
        let mut found = state.found;
        found.damages.sort_by_key(Damage::offset);
        Ok(found)
    }

    /// What of the file is data and in no run that is present: zeros, if nobody wrote to it. A packed image has such bytes only between its header,
    /// which was read with the footer, and its first page.
    fn gaps(&self, footer: &Footer) -> Result<Vec<Range<u64>>, ImageError> {
        let all = match self.in_place() {
            true => 0..self.size,
            false => packed_start(0).min(footer.data_start())..footer.data_start(),
        };
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let mut present = footer
            .runs
            .iter()
            .filter(|run| self.in_place() && run.stored_at(run.start).is_some())
            .map(|run| run.range())
            .peekable();
        let mut gaps = Vec::new();
        let failed = |source| self.read_error(0, source);
        let file = self.file()?;
        for extent in extents(&file).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            if extent.kind != Kind::Data {
                continue;
            }
            let mut at = extent.range.start.max(all.start);
            let end = extent.range.end.min(all.end);
            while at < end {
                while present.next_if(|run| run.end <= at).is_some() {}
                let next = present.peek().filter(|run| run.start < end);
                let (gap_end, after) = next.map_or((end, end), |run| (run.start, run.end));
                if at < gap_end {
                    gaps.push(at..gap_end);
                }
                at = after.max(gap_end);
            }
        }
        Ok(gaps)
    }

    fn look_at(&self, work: &Work<'_>, buffer: &mut SecretBuffer) -> Result<Look, ImageError> {
        match work {
            Work::Chunk(chunk) => {
                let mut sum = ChunkSum::new();
                let (mut bytes, mut first) = (0, None);
                for (range, offset) in chunk.pieces() {
                    let len = range.end - range.start;
                    // Within a chunk, so no more than 1 MiB.
                    let stored = buffer.sized(len as usize);
                    self.read_file(offset, stored)?;
                    sum.update(stored);
                    bytes += len;
                    first.get_or_insert(offset);
                }
                let damage = (sum.finish() != chunk.checksum).then(|| Damage::Chunk {
                    number: chunk.number,
                    guest: chunk.range.clone(),
                    offset: first.unwrap_or(0),
                });
                Ok(Look {
                    chunk: true,
                    bytes,
                    damage,
                })
            }
            Work::Gap(range) => {
                let gap = buffer.sized((range.end - range.start) as usize);
                self.read_file(range.start, gap)?;
                let at = match HostMemory::from(&gap[..]).is_zero() {
                    true => None,
                    false => gap.iter().position(|byte| *byte != 0),
                };
                Ok(Look {
                    chunk: false,
                    bytes: range.end - range.start,
                    damage: at.map(|at| Damage::NotZero {
                        offset: range.start + at as u64,
                    }),
                })
            }
        }
    }
}

enum Work<'f> {
    Chunk(Chunk<'f>),
    Gap(Range<u64>),
}

struct Look {
    chunk: bool,
    bytes: u64,
    damage: Option<Damage>,
}

#[derive(Default)]
struct State {
    found: Verified,
    /// Chunks and gaps.
    done: u64,
    failed: Option<ImageError>,
}

impl State {
    fn take(
        &mut self,
        result: Result<Look, ImageError>,
        total: u64,
        progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
    ) -> ControlFlow<()> {
        if self.failed.is_some() {
            return ControlFlow::Break(());
        }
        let look = match result {
            Ok(look) => look,
            Err(error) => {
                self.failed = Some(error);
                return ControlFlow::Break(());
            }
        };
        self.done += look.bytes;
        if look.chunk {
            self.found.chunks += 1;
            self.found.bytes += look.bytes;
        }
        if let Some(damage) = look.damage {
            self.found.found += 1;
            if self.found.damages.len() < LISTED {
                self.found.damages.push(damage);
            }
        }
        let flow = progress(self.done, total);
        if flow.is_break() {
            self.failed = Some(ImageError::Cancelled);
        }
        flow
    }
}
