//! Keeps requests in flight in an `io_uring(7)`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::error::{WriteError, unavailable};
use super::job::{Job, Pieces};
use super::options::Engine;
use super::pipeline::{self, Queue, Request};
use super::source::RunSource;
use super::target::Target;

const ENTRIES: u32 = 64;
/// Number of queued bytes after which requests are submitted, so that small ones share a system
/// call.
const BATCH: usize = 256 << 10;
/// Pause before a retry after the kernel had no resources for a request.
const PAUSE: Duration = Duration::from_millis(1);

pub(super) fn write<I: Pieces, S: RunSource + ?Sized>(
    job: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let target = Target::of(job.file).map_err(unavailable(Engine::IoUring))?;
    let ring = Ring::new(&target.file).map_err(unavailable(Engine::IoUring))?;
    pipeline::write(ring, target.alignment, job)
}

/// A ring for one call of `write_runs`.
pub(super) struct Ring<'f, 'm> {
    ring: IoUring,
    file: &'f File,
    /// The requests in flight, indexed by the number that the kernel returns.
    slots: Vec<Option<Request<'m>>>,
    free: Vec<usize>,
    /// Queued bytes that are not submitted yet.
    waiting: usize,
}

impl<'f> Ring<'f, '_> {
    /// Creates a ring for `file`.
    ///
    /// # Errors
    /// `ENOSYS` if the kernel does not support it; `EPERM` or `EACCES` if it is forbidden, by
    /// `kernel.io_uring_disabled` or a container's seccomp filter; `ENOMEM`.
    pub(super) fn new(file: &'f File) -> io::Result<Self> {
        // Handle completions when this thread polls for them, not by interrupting it: Linux 6.1.
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(ENTRIES),
                _ => Err(error),
            })?;
        // A filter may forbid io_uring_enter alone. SAFETY: an operation that has neither memory
        // nor a descriptor.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        while ring.completion().next().is_none() {
            match ring.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => return Err(error),
                _ => {}
            }
        }
        let slots = ENTRIES as usize;
        Ok(Self {
            ring,
            file,
            slots: (0..slots).map(|_| None).collect(),
            free: (0..slots).collect(),
            waiting: 0,
        })
    }

    /// Submits queued requests and waits for `wanted` completions. May return early.
    fn enter(&mut self, wanted: usize) {
        self.waiting = 0;
        match self.ring.submit_and_wait(wanted) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            // EAGAIN or EBUSY: no memory for a request, which remains queued. Retry, because the
            // requests in flight must be waited for.
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

impl<'m> Queue<'m> for Ring<'_, 'm> {
    const DEPTH: usize = ENTRIES as usize;
    const MIN_LEN: u64 = 0;

    fn submit(&mut self, request: Request<'m>) {
        let slot = self
            .free
            .pop()
            .expect("at most DEPTH requests are in flight");
        let (offset, memory) = (request.offset(), request.memory());
        let len = u32::try_from(memory.len()).expect("a request is at most 1 MiB");
        let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), memory.as_ptr(), len)
            .offset(offset)
            .build()
            .user_data(slot as u64);
        self.waiting += memory.len();
        self.slots[slot] = Some(request);
        // SAFETY: the kernel only reads the memory, which the request owns or whose mapping was
        // promised for 'm. The request stays in its slot until its completion was seen, also when
        // this ring is dropped; it outlives neither 'm nor the file that the ring borrows.
        unsafe { self.ring.submission().push(&entry) }.expect("the queue has an entry per slot");
        if self.waiting >= BATCH {
            self.enter(0);
        }
    }

    fn complete(&mut self) -> Option<(Request<'m>, io::Result<usize>)> {
        if self.free.len() == self.slots.len() {
            return None;
        }
        let done = loop {
            if let Some(done) = self.ring.completion().next() {
                break done;
            }
            self.enter(1);
        };
        #[allow(clippy::cast_possible_truncation, reason = "a slot's number")]
        let slot = done.user_data() as usize;
        let request = self.slots[slot]
            .take()
            .expect("a completed request was in flight");
        self.free.push(slot);
        let result = usize::try_from(done.result())
            .map_err(|_| io::Error::from_raw_os_error(-done.result()));
        Some((request, result))
    }
}

/// Waits for all requests in flight.
impl Drop for Ring<'_, '_> {
    fn drop(&mut self) {
        while self.complete().is_some() {}
    }
}
