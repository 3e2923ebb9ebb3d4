//! Sends the header and the pages.

use std::io::Write;

use page_reader::{PageReader, SecretBuffer};

use super::{PackedStream, State, cannot_seal, write_failed};
use crate::error::{MemoryIoStep, SnapshotError};
use crate::progress::WriteProgress;
use crate::reader_source::{check_source, name_cause};

/// The largest number of bytes in one write.
const PIECE: usize = 1 << 20;

impl<W: Write> PackedStream<W> {
    /// Writes the header, and the pages that have their place.
    pub(super) fn send<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        progress: &WriteProgress,
    ) -> Result<(), SnapshotError> {
        let name = &self.name;
        let header = self.footer.header();
        let header = header.map_err(|source| cannot_seal(name, source))?;
        let written = self.out.write_all(&header);
        written.map_err(|source| write_failed(name, 0, source))?;

        let mut buffer = SecretBuffer::new();
        let piece = buffer.sized(PIECE);
        let (mut filled, mut sent) = (0, 0);
        let data_start = header.len() as u64;
        let mut write = |bytes: &[u8]| {
            let written = self.out.write_all(bytes);
            written.map_err(|source| write_failed(name, data_start + sent, source))?;
            sent += bytes.len() as u64;
            match progress.wrote(sent).is_break() {
                true => Err(SnapshotError::Cancelled {
                    dest: name.clone(),
                    written: sent,
                }),
                false => Ok(()),
            }
        };
        let (extents, checksums) = self.footer.pages();
        for extent in extents {
            let (mut guest, mut left) = (extent.guest, extent.len);
            while left > 0 {
                // At most the size of the buffer, so it fits in usize.
                let len = left.min((PIECE - filled) as u64) as usize;
                let bytes = &mut piece[filled..filled + len];
                let read = reader.read_at(guest, bytes);
                read.map_err(|source| {
                    let failed = SnapshotError::MemoryIo {
                        dest: name.clone(),
                        step: MemoryIoStep::Read,
                        offset: guest,
                        source,
                    };
                    name_cause(reader, failed)
                })?;
                // Checksum the copy that is written: the guest may change the page concurrently.
                checksums.update(guest, bytes);
                (guest, left) = (guest + len as u64, left - len as u64);
                filled += len;
                if filled == PIECE {
                    write(piece)?;
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            write(&piece[..filled])?;
        }
        check_source(reader, name)?;
        self.state = State::Pages;
        Ok(())
    }
}
