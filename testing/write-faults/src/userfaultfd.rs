//! Write protection by userfaultfd (Linux): a write to a protected page stops its thread, including
//! writes by the kernel or a virtual machine. A handler thread calls back and then lets the write
//! continue.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};

use dirty_bitmap::WriteProtection;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_reader::PageReader;

use super::{FaultHandler, OnWrite, PageFaults, page_size};

/// The kernel's interface: Linux `include/uapi/linux/userfaultfd.h`.
mod abi {
    pub(super) const API: u64 = 0xaa;
    pub(super) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Shared memory too (Linux 5.19).
    pub(super) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Untouched pages are protected as well (Linux 6.4).
    pub(super) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
    pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
    pub(super) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
    pub(super) const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    pub(super) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
    /// `struct uffd_msg`: the event in byte 0, a page fault's flags in bytes 8..16, its address in
    /// 16..24.
    pub(super) const MESSAGE: usize = 32;

    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    pub(super) struct Register {
        pub(super) start: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) len: u64,
    }

    #[repr(C)]
    pub(super) struct WriteProtect {
        pub(super) start: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
    }

    nix::ioctl_write_int_bad!(new, nix::request_code_none!(0xaa, 0x00));
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_read!(wake, 0xaa, 0x02, Range);
    nix::ioctl_readwrite!(write_protect, 0xaa, 0x06, WriteProtect);
}

/// Opens a userfaultfd that write-protects any memory, touched or not.
///
/// # Errors
/// The reason why the kernel or the permissions do not allow it.
pub fn open_userfaultfd() -> io::Result<File> {
    let failed =
        |what: &str, source: io::Error| io::Error::new(source.kind(), format!("{what}: {source}"));
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .map_err(|error| failed("/dev/userfaultfd does not open", error))?;
    // SAFETY: the request takes flags and returns a new descriptor, which has no other owner.
    let descriptor = unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let descriptor = abi::new(device.as_raw_fd(), flags)
            .map_err(|error| failed("/dev/userfaultfd gives no descriptor", error.into()))?;
        File::from_raw_fd(descriptor)
    };
    let mut api = abi::Api {
        api: abi::API,
        features: abi::FEATURE_PAGEFAULT_FLAG_WP
            | abi::FEATURE_WP_HUGETLBFS_SHMEM
            | abi::FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: `Api` is laid out as the kernel's struct and outlives the call.
    unsafe { abi::api(descriptor.as_raw_fd(), &raw mut api) }.map_err(|error| {
        let what = "userfaultfd does not write-protect untouched pages: that takes Linux 6.4";
        failed(what, error.into())
    })?;
    Ok(descriptor)
}

/// Protects memory by userfaultfd: a [`Memory`](super::Memory), or any other that is mapped in this
/// process.
#[derive(Clone)]
pub struct Userfaultfd {
    inner: Arc<Inner>,
}

struct Inner {
    descriptor: File,
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
        let descriptor = open_userfaultfd()?;
        let mut pieces = Vec::new();
        let mut offset = 0;
        while offset < len {
            let rest = usize::try_from(len - offset).unwrap_or(usize::MAX);
            let piece = memory.host_memory(offset, rest);
            let piece = piece
                .ok_or_else(|| io::Error::other("the memory does not expose its host address"))?;
            let mut register = abi::Register {
                start: piece.as_ptr() as u64,
                len: piece.len() as u64,
                mode: abi::REGISTER_MODE_WP,
                ioctls: 0,
            };
            // SAFETY: `Register` is laid out as the kernel's struct; the range is mapped as long as
            // `memory` is kept.
            unsafe { abi::register(descriptor.as_raw_fd(), &raw mut register) }?;
            pieces.push(Piece {
                offset,
                address: register.start,
                len: register.len,
            });
            offset += register.len;
        }
        let inner = Inner {
            descriptor,
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
        self.inner.set(range, abi::WRITEPROTECT_MODE_WP)
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.set(range, abi::WRITEPROTECT_MODE_DONTWAKE)
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
        let writable = self.inner.set(0..len, 0);
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
        let mut message = [0; abi::MESSAGE];
        loop {
            let mut ready = [
                PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN),
                PollFd::new(closed.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => _ = polled?,
            }
            // Count first, so that every taken fault is counted.
            self.answering.fetch_add(1, SeqCst);
            let taken = (&self.descriptor).read(&mut message);
            let answered = match taken {
                Ok(abi::MESSAGE) => self.handle_write(&message, on_write),
                _ => Ok(()),
            };
            self.answering.fetch_sub(1, SeqCst);
            answered?;
            match taken {
                Ok(abi::MESSAGE) => {}
                Ok(short) => {
                    return Err(io::Error::other(format!(
                        "short userfaultfd message of {short} bytes"
                    )));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if ready[1].any() == Some(true) {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Calls back for a waiting write, and then lets it continue.
    fn handle_write(&self, message: &[u8; abi::MESSAGE], on_write: &OnWrite) -> io::Result<()> {
        let word = |at: usize| {
            u64::from_ne_bytes(
                message[at..at + 8]
                    .try_into()
                    .expect("the slice has eight bytes"),
            )
        };
        let (flags, address) = (word(8), word(16));
        if message[0] != abi::EVENT_PAGEFAULT || flags & abi::PAGEFAULT_FLAG_WP == 0 {
            return Err(io::Error::other(format!(
                "unexpected event {:#x} with flags {flags:#x}",
                message[0]
            )));
        }
        let piece = |piece: &&Piece| (piece.address..piece.address + piece.len).contains(&address);
        let piece = self.pieces.iter().find(piece);
        let piece =
            piece.ok_or_else(|| io::Error::other("fault at an address outside the memory"))?;
        on_write(piece.offset + (address - piece.address))?;
        let mut waiting = abi::Range {
            start: address & !(self.page - 1),
            len: self.page,
        };
        // SAFETY: `Range` is laid out as the kernel's struct; a thread that is woken without need
        // checks the page again.
        unsafe { abi::wake(self.descriptor.as_raw_fd(), &raw mut waiting) }?;
        Ok(())
    }

    fn set(&self, range: Range<u64>, mode: u64) -> io::Result<()> {
        for piece in &self.pieces {
            let start = range.start.max(piece.offset);
            let end = range.end.min(piece.offset + piece.len);
            if start < end {
                self.set_in_piece(piece.address + (start - piece.offset), end - start, mode)?;
            }
        }
        Ok(())
    }

    fn set_in_piece(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        loop {
            let mut request = abi::WriteProtect { start, len, mode };
            // SAFETY: `WriteProtect` is laid out as the kernel's struct; the range is inside a
            // piece, which is kept mapped.
            match unsafe { abi::write_protect(self.descriptor.as_raw_fd(), &raw mut request) } {
                // The address space is being changed: try again (userfaultfd_writeprotect(2),
                // EAGAIN).
                Err(Errno::EAGAIN) => {}
                done => return done.map(drop).map_err(io::Error::from),
            }
        }
    }
}
