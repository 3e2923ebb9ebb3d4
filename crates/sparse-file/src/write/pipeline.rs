//! Keeps requests in flight, for the engines that can: cuts chunks into what may go directly and what can't, and sees every
//! byte to its end.

use std::io;
use std::ops::Range;

use super::positioned::{self, Positioned};
use super::progress::Progress;
use super::target::Alignment;
use super::{Job, Pieces, Source, WriteError};
use crate::Memory;
use crate::buffer::{ALIGNMENT, AlignedBuffer};
use crate::limit::SizeLimit;

/// Bytes of the largest request: larger ones were no faster.
const REQUEST: usize = 1 << 20;
/// Bytes of all requests in flight.
const IN_FLIGHT: u64 = 32 << 20;
/// Bytes of all buffers, for sources that don't hand out their memory.
const BUFFERS: usize = 16 << 20;

/// A write of whole blocks. It owns what the kernel reads, or names memory of the source.
#[derive(Debug)]
pub(super) struct Request<'m> {
    offset: u64,
    bytes: Bytes<'m>,
}

#[derive(Debug)]
enum Bytes<'m> {
    Source(Memory<'m>),
    Copy { buffer: AlignedBuffer, len: usize },
}

impl Request<'_> {
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Not empty, and at most [`REQUEST`] bytes. Stays where it is when the request is moved.
    pub(super) fn memory(&self) -> Memory<'_> {
        match &self.bytes {
            Bytes::Source(memory) => *memory,
            Bytes::Copy { buffer, len } => buffer.memory(*len),
        }
    }
}

/// Where requests are in flight. When it is dropped, or the scope that it belongs to ends, none is any more.
pub(super) trait Queue<'m> {
    /// How many requests it takes without giving one back.
    const DEPTH: usize;
    /// Bytes below which a range is not worth a request, and better off in the page cache.
    const SMALLEST: u64;

    /// Takes a request to write all its bytes at its offset.
    fn submit(&mut self, request: Request<'m>);

    /// Waits for any request to end, and says how many bytes of it were written; `None` if there is none.
    fn complete(&mut self) -> Option<(Request<'m>, io::Result<usize>)>;
}

/// Writes the job through `queue`.
///
/// After a failure nothing more is begun, all that is in flight is waited for, and what failed at the lowest offset is reported.
pub(super) fn write<'m, Q, I, S>(
    queue: Q,
    alignment: Alignment,
    job: Job<'_, 'm, I, S>,
) -> Result<u64, WriteError>
where
    Q: Queue<'m>,
    I: Pieces,
    S: Source + ?Sized,
{
    let mut pipeline = Pipeline {
        queue,
        alignment,
        limit: job.limit,
        rest: Positioned::new(job.file, job.limit, job.chunk_size),
        in_flight: Vec::with_capacity(Q::DEPTH),
        buffers: Buffers::new(job.chunk_size.min(REQUEST)),
        progress: job.progress,
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

/// The failure at the lower offset; one that has none, as being cancelled, only if there is no other.
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
    /// For what can't be written directly.
    rest: Positioned<'a>,
    /// The blocks that are being written, no two the same.
    in_flight: Vec<Range<u64>>,
    buffers: Buffers,
    progress: Progress<'a>,
}

impl<'m, Q: Queue<'m>> Pipeline<'_, Q> {
    fn chunk<S: Source + ?Sized>(
        &mut self,
        source: &'m S,
        chunk: Range<u64>,
    ) -> Result<(), WriteError> {
        let end = chunk.end.min(self.limit.end()).max(chunk.start);
        let mut blocks = self.alignment.blocks_in(chunk.start..end);
        if blocks.end - blocks.start < Q::SMALLEST {
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

    /// Puts whole blocks in flight.
    fn direct<S: Source + ?Sized>(
        &mut self,
        source: &'m S,
        blocks: Range<u64>,
    ) -> Result<(), WriteError> {
        let mut at = blocks.start;
        while at < blocks.end {
            let left = usize::try_from(blocks.end - at).map_or(REQUEST, |left| left.min(REQUEST));
            let memory = source.memory_at(at, left).map(|memory| memory.first(left));
            let bytes = match memory.and_then(|memory| self.alignment.suitable(memory)) {
                Some(memory) => Bytes::Source(memory),
                None => self.copy(source, at, left)?,
            };
            let request = Request { offset: at, bytes };
            let end = at + request.memory().len() as u64;
            self.make_way(&(at..end))?;
            self.in_flight.push(at..end);
            self.queue.submit(request);
            at = end;
        }
        Ok(())
    }

    fn copy<S: Source + ?Sized>(
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
        positioned::read(source, offset, &mut buffer.bytes()[..len])?;
        Ok(Bytes::Copy { buffer, len })
    }

    /// Writes parts of blocks, on this thread.
    fn cached<S: Source + ?Sized>(
        &mut self,
        source: &S,
        range: Range<u64>,
    ) -> Result<(), WriteError> {
        if range.is_empty() {
            return Ok(());
        }
        let len = range.end - range.start;
        self.make_way(&self.alignment.blocks_around(&range))?;
        self.rest.write(source, range, &mut self.progress)?;
        self.progress.wrote(len)
    }

    /// Waits until there is room for one more request, and none in flight for `blocks`: of two writes to one block the later has
    /// to win, and the page cache must not take up a block that is being written past it.
    fn make_way(&mut self, blocks: &Range<u64>) -> Result<(), WriteError> {
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

    /// Waits for one request and finishes what the kernel left of it; `None` if none is in flight.
    fn complete(&mut self) -> Option<Result<(), WriteError>> {
        let (request, result) = self.queue.complete()?;
        self.in_flight.retain(|one| one.start != request.offset);
        let finished = self.finish(&request, result);
        let len = request.memory().len() as u64;
        if let Bytes::Copy { buffer, .. } = request.bytes {
            self.buffers.free.push(buffer);
        }
        Some(finished.and_then(|()| self.progress.wrote(len)))
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
            // What was interrupted or not ready, what the file system takes only through the page cache, and memory that can't be
            // read somewhere, which a write through the page cache finds to the byte.
            Err(error)
                if error.raw_os_error().is_some_and(|errno| {
                    [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&errno)
                        || [libc::EINVAL, libc::EOPNOTSUPP, libc::EFAULT].contains(&errno)
                }) =>
            {
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

/// A bounded number of buffers, made when they are first needed.
struct Buffers {
    size: usize,
    free: Vec<AlignedBuffer>,
    to_be_made: usize,
}

impl Buffers {
    fn new(size: usize) -> Self {
        Self {
            size,
            free: Vec::new(),
            to_be_made: BUFFERS / (size + ALIGNMENT),
        }
    }

    fn take(&mut self) -> Option<AlignedBuffer> {
        self.free.pop().or_else(|| {
            self.to_be_made = self.to_be_made.checked_sub(1)?;
            Some(AlignedBuffer::new(self.size))
        })
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
