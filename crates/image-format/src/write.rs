//! A footer as bytes.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::FooterError;
use crate::footer::{Footer, Kind, Placement, Stored};
use crate::read::MAX_FOOTER;

pub(crate) const MAGIC: &[u8; 8] = b"memsnap\0";
pub(crate) const END_MAGIC: &[u8; 8] = b"memsnap\xff";
pub(crate) const VERSION: u32 = 1;
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
        self.data_len() + self.body_len() + TRAILER
    }

    /// Writes the footer to where the pages end in `file`, and cuts off what lies behind. Returns the length of the file.
    ///
    /// Where `RLIMIT_FSIZE` may be lower than [`file_len`](Self::file_len), grow the file first by something that heeds it: writing past the limit is a
    /// deadly signal.
    ///
    /// # Errors
    /// [`FooterError::Invalid`], [`FooterError::TooLarge`] and [`FooterError::Append`], before
    /// anything is written; [`FooterError::Io`].
    pub fn write(&self, file: &File) -> Result<u64, FooterError> {
        self.check()?;
        let len = self.body_len();
        if len > MAX_FOOTER {
            return Err(FooterError::TooLarge { len });
        }
        let start = self.data_len();
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
        let mut out = BufWriter::with_capacity(
            256 << 10,
            Hashing {
                file,
                offset: start,
                hasher: blake3::Hasher::new(),
            },
        );
        self.body(&mut out)
            .and_then(|()| out.flush())
            .map_err(failed(start))?;
        let end = start + len;
        let trailer = trailer(out.get_ref().hasher.finalize().as_bytes(), start, len);
        file.write_all_at(&trailer, end).map_err(failed(end))?;
        let end = end + TRAILER;
        file.set_len(end).map_err(failed(end))?;
        Ok(end)
    }

    /// All that the checksum of the footer is over.
    fn body_len(&self) -> u64 {
        let parts = [
            16 * self.regions.len(),
            24 * self.runs.len(),
            32 * self.checksums.len(),
            self.metadata.len(),
        ];
        HEADER + parts.iter().sum::<usize>() as u64
    }

    fn body(&self, out: &mut impl Write) -> io::Result<()> {
        let parent = self.parent();
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
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
        number(self.runs.len() as u64)?;
        number(self.checksums.len() as u64)?;
        number(self.metadata.len() as u64)?;
        for region in &self.regions {
            number(region.start)?;
            number(region.end - region.start)?;
        }
        for run in &self.runs {
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
}

fn trailer(checksum: &[u8; 32], start: u64, len: u64) -> Vec<u8> {
    let mut bytes = checksum.to_vec();
    bytes.extend(start.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(END_MAGIC);
    bytes
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
