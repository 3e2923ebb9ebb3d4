//! Write protection by userfaultfd (Linux): a write to a protected page stops its thread, including
//! writes by the kernel or a virtual machine. A handler thread calls back and then lets the write
//! continue.

#![allow(unsafe_code)]

use std::fmt;
use std::io::{self, PipeReader, PipeWriter};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};

use dirty_bitmap::WriteProtection;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_reader::PageReader;
use uffd::{Event, FaultFlags, Features, Modes, OpenError, Stop};

use super::{FaultHandler, OnWrite, PageFaults, page_size};

/// Opens a userfaultfd that write-protects any memory, touched or not (Linux 6.4).
///
/// # Errors
/// The reason why the kernel or the permissions do not allow it.
pub fn open_userfaultfd() -> Result<uffd::Userfaultfd, OpenError> {
    let features =
        Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED;
    uffd::Userfaultfd::options().features(features).open()
}

/// Protects memory by userfaultfd: a [`Memory`](super::Memory), or any other that is mapped in this
/// process.
#[derive(Clone)]
pub struct Userfaultfd {
    inner: Arc<Inner>,
}

impl fmt::Debug for Userfaultfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Userfaultfd")
            .field("fault", &self.inner.fault)
            .finish_non_exhaustive()
    }
}

struct Inner {
    fault: uffd::Userfaultfd,
    pieces: Vec<Piece>,
    page: u64,
    threads: usize,
    /// Threads that may have taken a fault which is not handled yet.
    answering: AtomicUsize,
    /// Keeps the memory mapped.
    _memory: Arc<dyn PageReader + Send + Sync>,
}

/// A contiguous part of the memory.
struct Piece {
    offset: u64,
    address: u64,
    len: u64,
}

impl Userfaultfd {
    /// Creates a protection for the first `len` bytes of `memory`, all of which it must
    /// [expose](PageReader::host_memory), in any number of pieces of whole pages. No page is
    /// protected yet. `threads` threads will handle faults.
    ///
    /// # Errors
    /// Memory that is not exposed, or that userfaultfd refuses: mapped by an unsupported kind of
    /// file, or registered already.
    pub fn new(
        memory: &Arc<impl PageReader + Send + Sync + 'static>,
        len: u64,
        threads: usize,
    ) -> io::Result<Self> {
        let fault = open_userfaultfd().map_err(io::Error::other)?;
        let mut pieces = Vec::new();
        let mut offset = 0;
        while offset < len {
            let rest = usize::try_from(len - offset).unwrap_or(usize::MAX);
            let piece = memory.host_memory(offset, rest);
            let piece = piece
                .ok_or_else(|| io::Error::other("the memory does not expose its host address"))?;
            let (address, len) = (piece.as_ptr() as u64, piece.len() as u64);
            let range = address..address + len;
            // SAFETY: mapped as long as `memory` is kept. No missing page waits.
            let registered = unsafe { fault.register(range, Modes::WRITE_PROTECT) };
            registered.map_err(io::Error::other)?;
            pieces.push(Piece {
                offset,
                address,
                len,
            });
            offset += len;
        }
        let inner = Inner {
            fault,
            pieces,
            page: page_size()?,
            threads,
            answering: AtomicUsize::new(0),
            _memory: Arc::clone(memory) as _,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }
}

impl WriteProtection for Userfaultfd {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.set(range, Set::Protect)
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.set(range, Set::Unprotect)
    }
}

impl PageFaults for Userfaultfd {
    fn answer(
        &self,
        on_write: impl Fn(u64) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<FaultHandler> {
        let on_write: Arc<OnWrite> = Arc::new(Box::new(on_write));
        let (closed, hang_up) = io::pipe()?;
        let closed = Arc::new(closed);
        let mut threads = Threads {
            inner: Arc::clone(&self.inner),
            hang_up: Some(hang_up),
            running: Vec::new(),
        };
        for _ in 0..self.inner.threads.max(1) {
            let (inner, closed) = (Arc::clone(&self.inner), Arc::clone(&closed));
            let on_write = Arc::clone(&on_write);
            let thread = thread::Builder::new().name("userfaultfd".into());
            let thread = thread.spawn(move || inner.handle(&closed, &on_write))?;
            threads.running.push(thread);
        }
        Ok(FaultHandler::new(threads))
    }

    /// The kernel drops a fault that no thread has taken when its write continues.
    fn wait_until_answered(&self) {
        while self.inner.answering.load(SeqCst) != 0 {
            thread::yield_now();
        }
    }
}

struct Threads {
    inner: Arc<Inner>,
    /// Closing this end stops the threads.
    hang_up: Option<PipeWriter>,
    running: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Make the memory writable first, which wakes waiting threads: a fault without a handler
        // would wait forever.
        let len = self.inner.pieces.iter().map(|piece| piece.len).sum();
        let writable = self.inner.set(0..len, Set::UnprotectAndWake);
        debug_assert!(writable.is_ok());
        drop(self.hang_up.take());
        for thread in self.running.drain(..) {
            // The thread returns or aborts the process; it does not unwind.
            let _ = thread.join();
        }
    }
}

impl Inner {
    /// Handles faults until `closed` hangs up.
    fn handle(&self, closed: &PipeReader, on_write: &OnWrite) {
        if let Err(error) = self.answer(closed, on_write) {
            // Abort: threads in a fault would wait forever, and closing the descriptor would let
            // writes pass unmarked.
            eprintln!("error: the userfaultfd handler failed: {error}");
            std::process::abort();
        }
    }

    fn answer(&self, closed: &PipeReader, on_write: &OnWrite) -> io::Result<()> {
        loop {
            let mut ready = [
                PollFd::new(self.fault.as_fd(), PollFlags::POLLIN),
                PollFd::new(closed.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => _ = polled?,
            }
            // Count first, so that every taken fault is counted.
            self.answering.fetch_add(1, SeqCst);
            let taken = self.fault.read_event();
            let answered = match &taken {
                Ok(Some(event)) => self.handle_write(event, on_write),
                _ => Ok(()),
            };
            self.answering.fetch_sub(1, SeqCst);
            answered?;
            if taken?.is_none() && ready[1].any() == Some(true) {
                return Ok(());
            }
        }
    }

    /// Calls back for a waiting write, and then lets it continue.
    fn handle_write(&self, event: &Event, on_write: &OnWrite) -> io::Result<()> {
        let address = match event {
            Event::PageFault { address, flags, .. }
                if flags.contains(FaultFlags::WRITE_PROTECT) =>
            {
                *address
            }
            other => return Err(io::Error::other(format!("unexpected event {other:?}"))),
        };
        let piece = |piece: &&Piece| (piece.address..piece.address + piece.len).contains(&address);
        let piece = self.pieces.iter().find(piece);
        let piece =
            piece.ok_or_else(|| io::Error::other("fault at an address outside the memory"))?;
        on_write(piece.offset + (address - piece.address))?;
        // A thread that is woken without need checks the page again.
        let page = address & !(self.page - 1);
        self.fault.wake(page..page + self.page)
    }

    fn set(&self, range: Range<u64>, set: Set) -> io::Result<()> {
        for piece in &self.pieces {
            let start = range.start.max(piece.offset);
            let end = range.end.min(piece.offset + piece.len);
            if start < end {
                let address = piece.address + (start - piece.offset);
                self.set_in_piece(&(address..address + (end - start)), set)?;
            }
        }
        Ok(())
    }

    fn set_in_piece(&self, range: &Range<u64>, set: Set) -> io::Result<()> {
        loop {
            let range = range.clone();
            let done = match set {
                Set::Protect => self.fault.write_protect(range),
                Set::Unprotect => self.fault.write_unprotect(range, false),
                Set::UnprotectAndWake => self.fault.write_unprotect(range, true),
            };
            match done {
                // The address space is being changed: try again.
                Err(Stop::Changing) => {}
                done => return Ok(done?),
            }
        }
    }
}

/// What happens to the protection of pages.
#[derive(Clone, Copy)]
enum Set {
    Protect,
    Unprotect,
    UnprotectAndWake,
}
