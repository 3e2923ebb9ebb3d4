//! The engine that writes chunk after chunk with `pwrite(2)`.

use std::fs::File;
use std::io;
use std::ops::Range;

use host_memory::{AlignedBuffer, HostMemory};

use super::error::WriteError;
use super::job::{Job, Pieces};
use super::progress::Progress;
use super::source::RunSource;
use crate::limit::SizeLimit;
use crate::sys::page_size;

pub(super) fn write<I: Pieces, S: RunSource + ?Sized>(
    mut job: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let mut writer = Pwrite::new(job.file, job.limit, job.chunk_size);
    for chunk in job.chunks {
        let chunk = chunk?;
        let len = chunk.end - chunk.start;
        writer.write(job.source, chunk, &mut job.progress)?;
        job.progress.advance(len)?;
    }
    Ok(job.progress.written())
}

/// Writes on the calling thread, through the page cache unless the file was opened for direct I/O.
#[derive(Debug)]
pub(super) struct Pwrite<'f> {
    file: &'f File,
    limit: SizeLimit,
    chunk_size: usize,
    buffer: Option<AlignedBuffer>,
}

impl<'f> Pwrite<'f> {
    pub(super) fn new(file: &'f File, limit: SizeLimit, chunk_size: usize) -> Self {
        Self {
            file,
            limit,
            chunk_size,
            buffer: None,
        }
    }

    /// Writes `range`, which is at most a chunk. The kernel reads memory directly: that took 0.7 to
    /// 0.8 of the time of a copy through the buffer (256 MiB in chunks of 1 MiB, buffered, on ext4
    /// and tmpfs; `examples/copy_or_direct.rs`).
    pub(super) fn write<S: RunSource + ?Sized>(
        &mut self,
        source: &S,
        range: Range<u64>,
        progress: &mut Progress<'_>,
    ) -> Result<(), WriteError> {
        let mut at = range.start;
        while at < range.end {
            #[allow(clippy::cast_possible_truncation, reason = "at most one chunk")]
            let left = (range.end - at) as usize;
            let memory = match source.host_memory(at, left) {
                Some(memory) if !memory.is_empty() => memory.first(left),
                _ => {
                    let buffer = self
                        .buffer
                        .get_or_insert_with(|| AlignedBuffer::new(self.chunk_size));
                    read(source, at, &mut buffer.bytes_mut()[..left])?;
                    buffer.memory(left)
                }
            };
            write_memory(self.file, self.limit, memory, at, progress)?;
            at += memory.len() as u64;
        }
        Ok(())
    }

    /// Writes the part of `memory` that another engine did not write.
    pub(super) fn finish(
        &self,
        memory: HostMemory<'_>,
        offset: u64,
        progress: &mut Progress<'_>,
    ) -> Result<(), WriteError> {
        write_memory(self.file, self.limit, memory, offset, progress)
    }
}

fn write_memory(
    file: &File,
    limit: SizeLimit,
    memory: HostMemory<'_>,
    offset: u64,
    progress: &mut Progress<'_>,
) -> Result<(), WriteError> {
    let sink = |memory: HostMemory<'_>, offset| {
        limit.allow_write_at(offset)?;
        memory.write_at(file, offset)
    };
    write_all(sink, || progress.wait(), memory, offset)
}

/// Fills `buffer` with the source's bytes from `offset` on. An error has the offset of the first
/// page, counted from `offset`, that cannot be read.
pub(super) fn read<S: RunSource + ?Sized>(
    source: &S,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), WriteError> {
    let failed = match source.read_at(offset, buffer) {
        Ok(()) => return Ok(()),
        Err(error) => WriteError::Source {
            offset,
            source: error,
        },
    };
    // Find the page that cannot be read. It may have become readable.
    let pieces = buffer.chunks_mut(page_size());
    let mut at = offset;
    for piece in pieces {
        if let Err(source) = source.read_at(at, piece) {
            return Err(WriteError::Source { offset: at, source });
        }
        at += piece.len() as u64;
    }
    Err(failed)
}

/// Calls `sink` until all of `memory` is written at `offset`. Calls `wait` before a retry of a sink
/// that was not ready.
fn write_all(
    mut sink: impl FnMut(HostMemory<'_>, u64) -> io::Result<usize>,
    mut wait: impl FnMut() -> Result<(), WriteError>,
    mut memory: HostMemory<'_>,
    mut offset: u64,
) -> Result<(), WriteError> {
    while !memory.is_empty() {
        let len = memory.len();
        match sink(memory, offset) {
            Ok(0) => return Err(WriteError::ZeroWrite { offset, len }),
            Ok(taken) => {
                memory = memory.after(taken);
                offset += taken as u64;
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => wait()?,
                // The only address in the call is the source's.
                Some(libc::EFAULT) => {
                    return Err(WriteError::Source {
                        offset,
                        source: error,
                    });
                }
                _ => {
                    return Err(WriteError::Destination {
                        offset,
                        len,
                        source: error,
                    });
                }
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::error::refused;
    use super::*;

    /// The result of one system call: the maximum number of bytes that it writes, or its error.
    type CallResult = Result<usize, i32>;

    /// Writes to a real file through a kernel that follows `script` and then accepts everything.
    fn write_through(script: &[CallResult]) -> (Vec<u8>, Result<(), WriteError>, u32) {
        let bytes: Vec<u8> = (0..100).collect();
        let file = tempfile::tempfile().expect("temporary file");
        let mut script = script.iter();
        let sink = |memory: HostMemory<'_>, offset| match script.next() {
            Some(Err(errno)) => Err(io::Error::from_raw_os_error(*errno)),
            Some(Ok(0)) => Ok(0),
            Some(Ok(most)) => memory.first(*most).write_at(&file, offset),
            None => memory.write_at(&file, offset),
        };
        let mut waits = 0;
        let wait = || {
            waits += 1;
            if waits == 3 {
                return Err(WriteError::Cancelled { written: 0 });
            }
            Ok(())
        };
        let result = write_all(sink, wait, HostMemory::from(bytes.as_slice()), 7);
        let mut stored = vec![0; 107];
        let len = std::os::unix::fs::FileExt::read_at(&file, &mut stored, 0).expect("read");
        stored.truncate(len);
        (stored.split_off(len.min(7)), result, waits)
    }

    #[test]
    fn short_writes_are_continued_where_they_ended() {
        let (stored, result, _) = write_through(&[Ok(1), Ok(30), Ok(68)]);
        result.expect("all written");
        assert_eq!(stored, (0..100).collect::<Vec<u8>>());
    }

    #[test]
    fn interrupted_calls_are_retried_at_once() {
        let (stored, result, waits) =
            write_through(&[Err(libc::EINTR), Ok(50), Err(libc::EINTR), Err(libc::EINTR)]);
        result.expect("all written");
        assert_eq!(stored, (0..100).collect::<Vec<u8>>());
        assert_eq!(waits, 0);
    }

    #[test]
    fn file_that_is_not_ready_is_retried_after_a_wait() {
        let (stored, result, waits) =
            write_through(&[Err(libc::EAGAIN), Ok(50), Err(libc::EAGAIN)]);
        result.expect("all written");
        assert_eq!(stored, (0..100).collect::<Vec<u8>>());
        assert_eq!(waits, 2);
    }

    #[test]
    fn wait_for_a_file_that_is_never_ready_can_be_cancelled() {
        let (_, result, _) = write_through(&[Err(libc::EAGAIN); 5]);
        assert!(matches!(result, Err(WriteError::Cancelled { .. })));
    }

    #[test]
    fn write_of_no_bytes_is_an_error_and_no_endless_loop() {
        let (stored, result, _) = write_through(&[Ok(40), Ok(0)]);
        assert_eq!(stored.len(), 40);
        assert!(matches!(
            result,
            Err(WriteError::ZeroWrite {
                offset: 47,
                len: 60
            })
        ));
    }

    #[test]
    fn failure_names_the_first_unwritten_byte() {
        let (_, result, _) = write_through(&[Ok(40), Err(libc::EIO)]);
        let (offset, len, source) = refused(result);
        assert_eq!((offset, len), (47, 60));
        assert_eq!(source.raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn failed_read_names_the_first_unreadable_page() {
        struct Unreadable(Range<u64>);
        impl RunSource for Unreadable {
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                let end = offset + buf.len() as u64;
                match offset < self.0.end && self.0.start < end {
                    true => Err(io::Error::other(format!("{offset:#x}"))),
                    false => Ok(()),
                }
            }
        }
        let page = page_size() as u64;
        let start = 100 * page;
        let unreadable = Unreadable(103 * page + 5..104 * page);
        let mut buffer = vec![0; 8 * page_size()];
        let Err(WriteError::Source { offset, source }) = read(&unreadable, start, &mut buffer)
        else {
            panic!("the page was read");
        };
        assert_eq!(offset, 103 * page);
        assert_eq!(source.to_string(), format!("{offset:#x}"));
    }
}
