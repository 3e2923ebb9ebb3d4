//! Writes a footer.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::check::RunTotals;
use crate::error::FooterError;
use crate::footer::{Footer, ImageKind};
use crate::header::Header;
use crate::run::{Run, Storage};
use crate::wire::{END_MAGIC, MAGIC, MAX_FOOTER, PADDING, PartCounts, TRAILER, ZERO_RUN, padding};

impl Footer {
    /// Returns the length of the file with the footer, in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        let start = self.data_end();
        start + self.body_len(start, self.runs.len() as u64) + TRAILER
    }

    /// Returns the length of the file with a footer that has the given numbers of `runs` and
    /// `checksums`, and `present` bytes in the file.
    ///
    /// # Errors
    /// Returns [`FooterError::TooLarge`] for a footer of more than [`MAX_FOOTER`] bytes.
    pub fn planned_len(&self, runs: u64, checksums: u64, present: u64) -> Result<u64, FooterError> {
        let len = PartCounts {
            runs,
            checksums,
            ..self.parts()
        }
        .len();
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        let start = self.data_end_for(present);
        Ok(start + len + self.padding(start + len) + TRAILER)
    }

    /// Writes the footer to `file` after the pages, and truncates the file there. For a packed
    /// image, also writes the header. Returns the length of the file.
    ///
    /// If [`file_len`](Self::file_len) may exceed `RLIMIT_FSIZE`, grow the file first by a call
    /// that reports an error: a write past the limit raises a signal that ends the process.
    ///
    /// # Errors
    /// Returns [`FooterError::Invalid`], [`FooterError::TooLarge`] or [`FooterError::Append`]
    /// before anything is written, and [`FooterError::Io`].
    pub fn write(&self, file: &File) -> Result<u64, FooterError> {
        self.write_with(file, self.runs.iter().copied())
    }

    /// Writes the footer like [`write`](Self::write), with `runs` in place of [`runs`](Self::runs).
    /// They need not be in memory at once. They are iterated several times, and must be the same
    /// each time.
    ///
    /// The method allocates 16 bytes for each present run of a packed image if these are not in the
    /// order of the file, and otherwise nothing.
    ///
    /// # Errors
    /// Returns the errors of [`write`](Self::write).
    pub fn write_with(
        &self,
        file: &File,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<u64, FooterError> {
        let totals = self.check_with(runs.clone())?;
        let start = self.data_end_for(totals.present);
        let len = self.body_len(start, totals.runs);
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        let failed = |offset| {
            move |source| FooterError::Io {
                operation: "write",
                offset,
                source,
            }
        };
        let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| failed(start)(errno.into()))?;
        if OFlag::from_bits_retain(flags).contains(OFlag::O_APPEND) {
            return Err(FooterError::Append);
        }
        let end = start + len;
        if self.data_start() > 0 {
            let header = Header::new(self, start, end + TRAILER).to_bytes();
            file.write_all_at(&header, 0).map_err(failed(0))?;
        }
        let mut out = BufWriter::with_capacity(
            256 << 10,
            HashingWriter {
                file,
                offset: start,
                hasher: blake3::Hasher::new(),
            },
        );
        self.body(&mut out, runs, &totals)
            .and_then(|()| {
                out.write_all(
                    &PADDING[..self.padding(start + self.parts_len(totals.runs)) as usize],
                )
            })
            .and_then(|()| out.flush())
            .map_err(failed(start))?;
        let trailer = self.trailer(out.get_ref().hasher.finalize().as_bytes(), start, len);
        file.write_all_at(&trailer, end).map_err(failed(end))?;
        let end = end + TRAILER;
        file.set_len(end).map_err(failed(end))?;
        Ok(end)
    }

    fn parts(&self) -> PartCounts {
        PartCounts {
            regions: self.regions.len() as u64,
            runs: self.runs.len() as u64,
            checksums: self.checksums.len() as u64,
            metadata: self.metadata.len() as u64,
        }
    }

    fn parts_len(&self, runs: u64) -> u64 {
        PartCounts {
            runs,
            ..self.parts()
        }
        .len()
    }

    /// Returns the length of the part that the checksum covers, for a footer at the offset `start`.
    fn body_len(&self, start: u64, runs: u64) -> u64 {
        let len = self.parts_len(runs);
        len + self.padding(start + len)
    }

    /// Returns the length of the padding after the parts, which end at the offset `end`. It makes
    /// the length of the file no multiple of `RAW_UNIT`.
    pub(crate) fn padding(&self, end: u64) -> u64 {
        padding(self.version, end)
    }

    fn body(
        &self,
        out: &mut impl Write,
        runs: impl Iterator<Item = Run>,
        totals: &RunTotals,
    ) -> io::Result<()> {
        let parent = self.parent();
        out.write_all(MAGIC)?;
        out.write_all(&self.version.to_wire().to_le_bytes())?;
        out.write_all(&[
            // A footer of a layout without one was refused before.
            self.layout.number().unwrap_or(0),
            u8::from(self.kind != ImageKind::Full),
            u8::from(parent.is_some()),
            0,
        ])?;
        out.write_all(&self.id.to_bytes())?;
        out.write_all(&parent.map_or([0; 16], |parent| parent.to_bytes()))?;
        let mut number = |number: u64| out.write_all(&number.to_le_bytes());
        number(self.ram_size)?;
        number(self.page_size)?;
        number(self.regions.len() as u64)?;
        number(totals.runs)?;
        number(self.checksums.len() as u64)?;
        number(self.metadata.len() as u64)?;
        for region in &self.regions {
            number(region.start)?;
            number(region.end - region.start)?;
        }
        for run in runs {
            number(run.start)?;
            number(run.len)?;
            number(match run.stored {
                Storage::At(offset) => offset,
                Storage::Zeros => ZERO_RUN,
            })?;
        }
        for checksum in &self.checksums {
            out.write_all(checksum)?;
        }
        out.write_all(&self.metadata)
    }

    fn trailer(&self, checksum: &[u8; 32], start: u64, len: u64) -> Vec<u8> {
        let mut bytes = checksum.to_vec();
        bytes.extend(start.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(self.version.to_wire().to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(END_MAGIC);
        bytes
    }
}

/// A writer at a file offset that hashes the bytes.
struct HashingWriter<'f> {
    file: &'f File,
    offset: u64,
    hasher: blake3::Hasher,
}

impl Write for HashingWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.offset)?;
        self.hasher.update(&bytes[..written]);
        self.offset += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
