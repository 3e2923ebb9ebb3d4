//! A footer as bytes.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::FooterError;
use crate::footer::{Counted, Footer, Kind, Placement, RAW_UNIT, Run, Stored, Version};
use crate::header::Header;
use crate::read::MAX_FOOTER;

pub(crate) const MAGIC: &[u8; 8] = b"memsnap\0";
pub(crate) const END_MAGIC: &[u8; 8] = b"memsnap\xff";
/// Bytes before the regions.
pub(crate) const HEADER: u64 = 96;
/// Bytes after the metadata.
pub(crate) const TRAILER: u64 = 64;
/// Where a run of zeros is stored.
pub(crate) const NOWHERE: u64 = u64::MAX;

impl Footer {
    /// How long the file is with the footer, in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        let start = self.data_end();
        start + self.body_len(start, self.runs.len() as u64) + TRAILER
    }

    /// The length of the file with the footer, which has `runs` and `checksums` of them, of which `present` bytes are in the file.
    ///
    /// # Errors
    /// [`FooterError::TooLarge`] for a footer of more than [`MAX_FOOTER`] bytes.
    pub fn planned_len(&self, runs: u64, checksums: u64, present: u64) -> Result<u64, FooterError> {
        let len = Parts {
            runs,
            checksums,
            ..self.parts()
        }
        .len();
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        let start = self.end_of(present);
        Ok(start + len + self.padding(start + len) + TRAILER)
    }

    /// Writes the footer to where the pages end in `file`, and cuts off what lies behind. Of a packed image, also writes the header to the start of the
    /// file. Returns the length of the file.
    ///
    /// Where `RLIMIT_FSIZE` may be lower than [`file_len`](Self::file_len), grow the file first by something that heeds it: writing past the limit is a
    /// deadly signal.
    ///
    /// # Errors
    /// [`FooterError::Invalid`], [`FooterError::TooLarge`] and [`FooterError::Append`], before
    /// anything is written; [`FooterError::Io`].
    pub fn write(&self, file: &File) -> Result<u64, FooterError> {
        self.write_with(file, self.runs.iter().copied())
    }

    /// As [`write`](Self::write), with `runs` in place of [`runs`](Self::runs): they need not be in memory at once. They are gone through several times,
    /// and must be the same each time.
    ///
    /// Takes memory for 16 bytes a run where a packed image's present runs are not in the order of the file, and otherwise none.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_with(
        &self,
        file: &File,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<u64, FooterError> {
        let counted = self.check_with(runs.clone())?;
        let start = self.end_of(counted.present);
        let len = self.body_len(start, counted.runs);
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        let failed = |offset| {
            move |source| FooterError::Io {
                operation: "written",
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
            Hashing {
                file,
                offset: start,
                hasher: blake3::Hasher::new(),
            },
        );
        self.body(&mut out, runs, &counted)
            .and_then(|()| {
                out.write_all(
                    &PADDING[..self.padding(start + self.parts_len(counted.runs)) as usize],
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

    fn parts(&self) -> Parts {
        Parts {
            regions: self.regions.len() as u64,
            runs: self.runs.len() as u64,
            checksums: self.checksums.len() as u64,
            metadata: self.metadata.len() as u64,
        }
    }

    fn parts_len(&self, runs: u64) -> u64 {
        Parts {
            runs,
            ..self.parts()
        }
        .len()
    }

    /// All that the checksum of the footer is over, where it begins at `start`.
    fn body_len(&self, start: u64, runs: u64) -> u64 {
        let len = self.parts_len(runs);
        len + self.padding(start + len)
    }

    /// The bytes of padding, behind everything up to the offset `end`, that make the file's length no multiple of [`RAW_UNIT`].
    pub(crate) fn padding(&self, end: u64) -> u64 {
        padding(self.version, end)
    }

    fn body(
        &self,
        out: &mut impl Write,
        runs: impl Iterator<Item = Run>,
        counted: &Counted,
    ) -> io::Result<()> {
        let parent = self.parent();
        out.write_all(MAGIC)?;
        out.write_all(&self.version.number().to_le_bytes())?;
        out.write_all(&[
            u8::from(self.placement == Placement::Packed),
            u8::from(self.kind != Kind::Full),
            u8::from(parent.is_some()),
            0,
        ])?;
        out.write_all(&self.id.to_bytes())?;
        out.write_all(&parent.map_or([0; 16], |parent| parent.to_bytes()))?;
        let mut number = |number: u64| out.write_all(&number.to_le_bytes());
        number(self.ram_size)?;
        number(self.page_size)?;
        number(self.regions.len() as u64)?;
        number(counted.runs)?;
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
                Stored::At(offset) => offset,
                Stored::Zeros => NOWHERE,
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
        bytes.extend(self.version.number().to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(END_MAGIC);
        bytes
    }
}

/// How many of each part a footer has.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) regions: u64,
    pub(crate) runs: u64,
    pub(crate) checksums: u64,
    pub(crate) metadata: u64,
}

impl Parts {
    /// The bytes of all of them; too many for a file where they are too many for a number.
    pub(crate) fn len(self) -> u64 {
        let parts = [
            self.regions.saturating_mul(16),
            self.runs.saturating_mul(24),
            self.checksums.saturating_mul(32),
            self.metadata,
        ];
        parts.into_iter().fold(HEADER, u64::saturating_add)
    }
}

/// The length of the padding, where there is any.
const PADDING: [u8; 8] = [0; 8];

/// See [`Footer::padding`].
pub(crate) fn padding(version: Version, end: u64) -> u64 {
    match version {
        Version::V1 => 0,
        Version::V2 if end.saturating_add(TRAILER).is_multiple_of(RAW_UNIT) => PADDING.len() as u64,
        Version::V2 => 0,
    }
}

/// Writes to a place in a file, and hashes.
struct Hashing<'f> {
    file: &'f File,
    offset: u64,
    hasher: blake3::Hasher,
}

impl Write for Hashing<'_> {
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
