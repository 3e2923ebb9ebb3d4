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
        let planned = self.plan(runs.clone())?;
        let start = planned.start;
        let flags =
            fcntl(file, FcntlArg::F_GETFL).map_err(|errno| write_failed(start)(errno.into()))?;
        if OFlag::from_bits_retain(flags).contains(OFlag::O_APPEND) {
            return Err(FooterError::Append);
        }
        let end = start + planned.len + TRAILER;
        if self.data_start() > 0 {
            let header = Header::new(self, start, end).to_bytes();
            file.write_all_at(&header, 0).map_err(write_failed(0))?;
        }
        let out = AtOffset {
            file,
            offset: start,
        };
        let written = self.write_parts(out, runs, &planned);
        written.map_err(write_failed(start))?;
        file.set_len(end).map_err(write_failed(end))?;
        Ok(end)
    }

    /// Writes the footer to `out`, which has received all bytes before it: the
    /// [header](Self::planned_header) and the pages. Use it for a stream that cannot seek. Returns
    /// the number of bytes written.
    ///
    /// The bytes are those that [`write`](Self::write) writes after the pages. `out` is written in
    /// pieces of up to 256 KiB and is not flushed.
    ///
    /// # Errors
    /// Returns [`FooterError::Invalid`] or [`FooterError::TooLarge`] before anything is written,
    /// and [`FooterError::Io`].
    ///
    /// # Examples
    /// ```
    /// use image_format::{Footer, ImageId, ImageKind, Layout, Run, Version};
    ///
    /// let footer = Footer {
    ///     version: Version::CURRENT,
    ///     id: ImageId::random()?,
    ///     kind: ImageKind::Full,
    ///     layout: Layout::Packed,
    ///     ram_size: 1 << 20,
    ///     page_size: 4096,
    ///     regions: vec![0..1 << 20],
    ///     runs: vec![Run::zeros(0..1 << 20)],
    ///     checksums: Vec::new(),
    ///     metadata: Vec::new(),
    /// };
    /// let mut stream = footer.planned_header(1, 0, 0)?; // 1 run, no checksum, no present page
    /// footer.write_to(&mut stream)?;
    /// assert_eq!(stream.len() as u64, footer.file_len());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_to(&self, out: impl Write) -> Result<u64, FooterError> {
        self.write_runs_to(out, self.runs.iter().copied())
    }

    /// Writes the footer like [`write_to`](Self::write_to), with `runs` in place of
    /// [`runs`](Self::runs), as [`write_with`](Self::write_with) does.
    ///
    /// # Errors
    /// Returns the errors of [`write_to`](Self::write_to).
    pub fn write_runs_to(
        &self,
        out: impl Write,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<u64, FooterError> {
        let planned = self.plan(runs.clone())?;
        let written = self.write_parts(out, runs, &planned);
        written.map_err(write_failed(planned.start))?;
        Ok(planned.len + TRAILER)
    }

    /// Returns the bytes before the first page of an image whose footer will have the given numbers
    /// of `runs` and `checksums`, and `present` bytes in the file: the header of a packed image, or
    /// nothing. It states the length of the file, so a stream that is cut off is recognized.
    ///
    /// The regions and the metadata of the footer must not change afterwards.
    ///
    /// # Errors
    /// Returns [`FooterError::TooLarge`] for a footer of more than [`MAX_FOOTER`] bytes.
    pub fn planned_header(
        &self,
        runs: u64,
        checksums: u64,
        present: u64,
    ) -> Result<Vec<u8>, FooterError> {
        let len = self.planned_len(runs, checksums, present)?;
        if self.data_start() == 0 {
            return Ok(Vec::new());
        }
        let mut header = Header::new(self, self.data_end_for(present), len).to_bytes();
        // The offset of the first page is the size of a page, which fits in memory.
        header.resize(self.data_start() as usize, 0);
        Ok(header)
    }

    /// Checks the footer with `runs`, and finds its place in the file.
    fn plan(&self, runs: impl Iterator<Item = Run> + Clone) -> Result<Planned, FooterError> {
        let totals = self.check_with(runs)?;
        let start = self.data_end_for(totals.present);
        let len = self.body_len(start, totals.runs);
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        Ok(Planned { totals, start, len })
    }

    /// Writes the footer to `out` at the offset that was planned.
    fn write_parts(
        &self,
        out: impl Write,
        runs: impl Iterator<Item = Run>,
        planned: &Planned,
    ) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(
            256 << 10,
            HashingWriter {
                out,
                hasher: blake3::Hasher::new(),
            },
        );
        self.body(&mut out, runs, &planned.totals)?;
        let padding = planned.len - self.parts_len(planned.totals.runs);
        out.write_all(&PADDING[..padding as usize])?;
        out.flush()?;
        let HashingWriter { out, hasher } = out.get_mut();
        out.write_all(&self.trailer(hasher.finalize().as_bytes(), planned))
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

    fn trailer(&self, checksum: &[u8; 32], planned: &Planned) -> Vec<u8> {
        let mut bytes = checksum.to_vec();
        bytes.extend(planned.start.to_le_bytes());
        bytes.extend(planned.len.to_le_bytes());
        bytes.extend(self.version.to_wire().to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(END_MAGIC);
        bytes
    }
}

/// The place of a footer that is valid and within the limit.
struct Planned {
    totals: RunTotals,
    /// The offset in the file.
    start: u64,
    /// The length of the part that the checksum covers.
    len: u64,
}

/// Returns a function that makes the error of a failed write at the file offset `offset`.
fn write_failed(offset: u64) -> impl FnOnce(io::Error) -> FooterError {
    move |source| FooterError::Io {
        operation: "write",
        offset,
        source,
    }
}

/// A writer that hashes the bytes.
struct HashingWriter<W> {
    out: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer at an offset of a file.
struct AtOffset<'f> {
    file: &'f File,
    offset: u64,
}

impl Write for AtOffset<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.offset)?;
        self.offset += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
