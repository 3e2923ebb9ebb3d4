//! Keeps requests in flight. Separates chunks into direct and cached parts, and completes every
//! request.

use std::ops::Range;
use std::{io, mem};

use host_memory::{AlignedBuffer, HostMemory};

use super::error::WriteError;
use super::job::{Job, Pieces};
use super::progress::Progress;
use super::pwrite::{self, Pwrite};
use super::source::RunSource;
use super::target::Alignment;
use crate::limit::SizeLimit;
use crate::{sys, trace};

/// Maximum size of a request in bytes: larger ones were not faster.
const REQUEST: usize = 1 << 20;
/// Maximum number of bytes of all requests in flight.
const IN_FLIGHT: u64 = 32 << 20;
/// Maximum number of bytes of all buffers, for sources that do not expose their memory.
const BUFFERS: usize = 16 << 20;

/// A write of whole blocks. Owns the buffer that the kernel reads, or refers to memory of the
/// source.
#[derive(Debug)]
pub(super) struct Request<'m> {
    offset: u64,
    bytes: Bytes<'m>,
}

#[derive(Debug)]
enum Bytes<'m> {
    Source(HostMemory<'m>),
    Copy { buffer: AlignedBuffer, len: usize },
}

impl Request<'_> {
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the memory to write. Not empty, and at most [`REQUEST`] bytes. Its address does not
    /// change when the request is moved.
    pub(super) fn memory(&self) -> HostMemory<'_> {
        match &self.bytes {
            Bytes::Source(memory) => *memory,
            Bytes::Copy { buffer, len } => buffer.memory(*len),
        }
    }
}

/// A queue of requests in flight. After it is dropped, or after the scope that it belongs to has
/// ended, no request is in flight.
pub(super) trait Queue<'m> {
    /// The maximum number of requests in flight.
    const DEPTH: usize;
    /// The minimum length of a range in bytes. Shorter ranges are faster through the page cache.
    const MIN_LEN: u64;

    /// Submits a request to write all its bytes at its offset.
    fn submit(&mut self, request: Request<'m>);

    /// Waits for any request to complete and returns the number of bytes written. Returns `None` if
    /// no request is in flight.
    fn complete(&mut self) -> Option<(Request<'m>, io::Result<usize>)>;
}

/// Writes the job through `queue`.
///
/// After a failure, no new request is submitted and all requests in flight are waited for. Then the
/// failure at the lowest offset is returned.
pub(super) fn write<'m, Q, I, S>(
    queue: Q,
    alignment: Alignment,
    job: Job<'_, 'm, I, S>,
) -> Result<u64, WriteError>
where
    Q: Queue<'m>,
    I: Pieces,
    S: RunSource + ?Sized,
{
    let mut pipeline = Pipeline {
        queue,
        alignment,
        limit: job.limit,
        rest: Pwrite::new(job.file, job.limit, job.chunk_size),
        in_flight: Vec::with_capacity(Q::DEPTH),
        buffers: Buffers::new(job.chunk_size.min(REQUEST)),
        progress: job.progress,
        refused: false,
    };
    let mut failure = None;
    for chunk in job.chunks {
        if let Err(error) = chunk.and_then(|chunk| pipeline.chunk(job.source, chunk)) {
            failure = Some(error);
            break;
        }
    }
    while let Some(result) = pipeline.complete() {
        if let Err(error) = result {
            failure = Some(lower(failure, error));
        }
    }
    let written = pipeline.progress.written();
    match failure {
        None => Ok(written),
        Some(WriteError::Cancelled { .. }) => Err(WriteError::Cancelled { written }),
        Some(error) => Err(error),
    }
}

/// Returns the failure at the lower offset. One without an offset, such as a cancellation, is
/// returned only if there is no other.
fn lower(first: Option<WriteError>, second: WriteError) -> WriteError {
    let offset = |error: &WriteError| match error {
        WriteError::Source { offset, .. }
        | WriteError::Destination { offset, .. }
        | WriteError::ZeroWrite { offset, .. } => *offset,
        _ => u64::MAX,
    };
    match first {
        Some(first) if offset(&first) <= offset(&second) => first,
        _ => second,
    }
}

struct Pipeline<'a, Q> {
    queue: Q,
    alignment: Alignment,
    limit: SizeLimit,
    /// Writes the parts that cannot be written directly.
    rest: Pwrite<'a>,
    /// The blocks that are being written. They do not overlap.
    in_flight: Vec<Range<u64>>,
    buffers: Buffers,
    progress: Progress<'a>,
    /// Whether the file system has refused a direct write.
    refused: bool,
}

impl<'m, Q: Queue<'m>> Pipeline<'_, Q> {
    fn chunk<S: RunSource + ?Sized>(
        &mut self,
        source: &'m S,
        chunk: Range<u64>,
    ) -> Result<(), WriteError> {
        let end = chunk.end.min(self.limit.end()).max(chunk.start);
        let mut blocks = self.alignment.blocks_in(chunk.start..end);
        if blocks.end - blocks.start < Q::MIN_LEN {
            blocks = end..end;
        }
        self.cached(source, chunk.start..blocks.start)?;
        self.direct(source, blocks.clone())?;
        self.cached(source, blocks.end..end)?;
        if end == chunk.end {
            return Ok(());
        }
        self.limit
            .allow_write_at(end)
            .map_err(|source| WriteError::Destination {
                offset: end,
                len: usize::try_from(chunk.end - end).unwrap_or(usize::MAX),
                source,
            })
    }

    /// Submits whole blocks.
    fn direct<S: RunSource + ?Sized>(
        &mut self,
        source: &'m S,
        blocks: Range<u64>,
    ) -> Result<(), WriteError> {
        let mut at = blocks.start;
        while at < blocks.end {
            let left = usize::try_from(blocks.end - at).map_or(REQUEST, |left| left.min(REQUEST));
            let memory = source
                .host_memory(at, left)
                .map(|memory| memory.first(left));
            let bytes = match memory.and_then(|memory| self.alignment.suitable(memory)) {
                Some(memory) => Bytes::Source(memory),
                None => self.copy(source, at, left)?,
            };
            let request = Request { offset: at, bytes };
            let end = at + request.memory().len() as u64;
            self.wait_for_slot(&(at..end))?;
            self.in_flight.push(at..end);
            self.queue.submit(request);
            at = end;
        }
        Ok(())
    }

    fn copy<S: RunSource + ?Sized>(
        &mut self,
        source: &S,
        offset: u64,
        len: usize,
    ) -> Result<Bytes<'m>, WriteError> {
        let mut buffer = loop {
            match self.buffers.take() {
                Some(buffer) => break buffer,
                None => self.complete().transpose()?,
            };
        };
        let len = len.min(self.buffers.size);
        pwrite::read(source, offset, &mut buffer.bytes_mut()[..len])?;
        Ok(Bytes::Copy { buffer, len })
    }

    /// Writes parts of blocks on this thread.
    fn cached<S: RunSource + ?Sized>(
        &mut self,
        source: &S,
        range: Range<u64>,
    ) -> Result<(), WriteError> {
        if range.is_empty() {
            return Ok(());
        }
        let len = range.end - range.start;
        self.wait_for_slot(&self.alignment.blocks_around(&range))?;
        self.rest.write(source, range, &mut self.progress)?;
        self.progress.advance(len)
    }

    /// Waits until another request can be submitted and none is in flight for `blocks`. Of two
    /// writes to one block the later must win, and the page cache must not read a block while a
    /// direct write to it is in flight.
    fn wait_for_slot(&mut self, blocks: &Range<u64>) -> Result<(), WriteError> {
        let meets = |other: &Range<u64>| other.start < blocks.end && blocks.start < other.end;
        while self.in_flight.len() == Q::DEPTH
            || self.bytes_in_flight() >= IN_FLIGHT
            || self.in_flight.iter().any(meets)
        {
            self.complete().transpose()?;
        }
        Ok(())
    }

    fn bytes_in_flight(&self) -> u64 {
        self.in_flight.iter().map(|one| one.end - one.start).sum()
    }

    /// Waits for one request and finishes what the kernel did not write. Returns `None` if no
    /// request is in flight.
    fn complete(&mut self) -> Option<Result<(), WriteError>> {
        let (request, result) = self.queue.complete()?;
        self.in_flight.retain(|one| one.start != request.offset);
        let finished = self.finish(&request, result);
        let len = request.memory().len() as u64;
        if let Bytes::Copy { buffer, .. } = request.bytes {
            self.buffers.free.push(buffer);
        }
        Some(finished.and_then(|()| self.progress.advance(len)))
    }

    fn finish(
        &mut self,
        request: &Request<'_>,
        result: io::Result<usize>,
    ) -> Result<(), WriteError> {
        let memory = request.memory();
        let taken = match result {
            Ok(taken) if taken == memory.len() => return Ok(()),
            Ok(taken) => taken,
            // Retry through the page cache: the request was interrupted or not ready, the file
            // system refuses direct I/O for it, or a part of the memory is unreadable. The retry
            // finds the exact offset of the failure.
            Err(error)
                if sys::is_unsupported_argument(&error)
                    || error.raw_os_error().is_some_and(is_retried) =>
            {
                if sys::is_unsupported_argument(&error) && !mem::replace(&mut self.refused, true) {
                    trace::direct_write_refused(request.offset, &error);
                }
                0
            }
            Err(source) => {
                return Err(WriteError::Destination {
                    offset: request.offset,
                    len: memory.len(),
                    source,
                });
            }
        };
        let offset = request.offset + taken as u64;
        self.rest
            .finish(memory.after(taken), offset, &mut self.progress)
    }
}

/// Returns whether a request that failed with this error number is repeated through the page cache.
fn is_retried(errno: i32) -> bool {
    [libc::EINTR, libc::EAGAIN, libc::ECANCELED, libc::EFAULT].contains(&errno)
}

/// A bounded number of buffers, created on first use.
struct Buffers {
    size: usize,
    free: Vec<AlignedBuffer>,
    remaining: usize,
}

impl Buffers {
    fn new(size: usize) -> Self {
        Self {
            size,
            free: Vec::new(),
            remaining: BUFFERS / (size + AlignedBuffer::ALIGNMENT),
        }
    }

    fn take(&mut self) -> Option<AlignedBuffer> {
        self.free.pop().or_else(|| {
            self.remaining = self.remaining.checked_sub(1)?;
            Some(AlignedBuffer::new(self.size))
        })
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
