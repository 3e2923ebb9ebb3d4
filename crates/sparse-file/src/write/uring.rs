//! Requests in flight in an `io_uring(7)`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::pipeline::{self, Queue, Request};
use super::target::Target;
use super::{Engine, Job, Pieces, Source, WriteError, unavailable};

const ENTRIES: u32 = 64;
/// The kernel is told of new requests once so many bytes wait, so that small ones share a system call.
const BATCH: usize = 256 << 10;
/// Before the kernel is asked again after it had no resources for a request.
const PAUSE: Duration = Duration::from_millis(1);

pub(super) fn write<I: Pieces, S: Source + ?Sized>(
    job: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let target = Target::of(job.file).map_err(unavailable(Engine::IoUring))?;
    let ring = Ring::new(&target.file).map_err(unavailable(Engine::IoUring))?;
    pipeline::write(ring, target.alignment, job)
}

/// A ring of its own for one call.
pub(super) struct Ring<'f, 'm> {
    ring: IoUring,
    file: &'f File,
    /// What is in flight, by the number that the kernel gives back.
    slots: Vec<Option<Request<'m>>>,
    free: Vec<usize>,
    /// Bytes that the kernel has not been told of.
    waiting: usize,
}

impl<'f> Ring<'f, '_> {
    /// # Errors
    /// `ENOSYS` where the kernel has none; `EPERM` or `EACCES` where it is forbidden, by `kernel.io_uring_disabled` or a
    /// container's seccomp filter; `ENOMEM`.
    pub(super) fn new(file: &'f File) -> io::Result<Self> {
        // Completions are handled when this thread asks for them, not by interrupting it: Linux 6.1.
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(ENTRIES),
                _ => Err(error),
            })?;
        // A filter may forbid io_uring_enter alone.
        // SAFETY: an operation that has neither memory nor a descriptor.
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

    /// Hands over what waits, and waits for `wanted` completions. It may return early.
    fn enter(&mut self, wanted: usize) {
        self.waiting = 0;
        match self.ring.submit_and_wait(wanted) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            // EAGAIN or EBUSY: no memory for a request, which stays in the queue. What is in flight can't be left there.
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

impl<'m> Queue<'m> for Ring<'_, 'm> {
    const DEPTH: usize = ENTRIES as usize;
    const SMALLEST: u64 = 0;

    fn submit(&mut self, request: Request<'m>) {
        let slot = self.free.pop().expect("no more than DEPTH at a time");
        let (offset, memory) = (request.offset(), request.memory());
        let len = u32::try_from(memory.len()).expect("a request is at most 1 MiB");
        let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), memory.as_ptr(), len)
            .offset(offset)
            .build()
            .user_data(slot as u64);
        self.waiting += memory.len();
        self.slots[slot] = Some(request);
        // SAFETY: the kernel only reads the memory, which the request owns or whose mapping was promised for 'm. The request stays
        // in its slot until its completion was seen, also when this ring is dropped; it outlives neither 'm nor the file that
        // the ring borrows.
        unsafe { self.ring.submission().push(&entry) }.expect("as many entries as slots");
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
            .expect("what completes was in flight");
        self.free.push(slot);
        let result = usize::try_from(done.result())
            .map_err(|_| io::Error::from_raw_os_error(-done.result()));
        Some((request, result))
    }
}

/// Waits for all that is in flight.
impl Drop for Ring<'_, '_> {
    fn drop(&mut self) {
        while self.complete().is_some() {}
    }
}
