//! Writes tracked by userfaultfd write-protection (Linux): a write to a protected page stops its thread; a
//! handler thread marks the page and lets the write go on.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, PipeWriter, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Guard;
use super::memory::Memory;

/// The kernel's interface: Linux `include/uapi/linux/userfaultfd.h`.
mod abi {
    pub(super) const API: u64 = 0xaa;
    pub(super) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Pages never touched are protected as well (Linux 6.4).
    pub(super) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
    pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
    pub(super) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
    pub(super) const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    pub(super) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
    /// `struct uffd_msg`: the event in byte 0, a page fault's flags in bytes 8..16, its address in 16..24.
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

/// Tracks the writes to one [`Memory`].
pub struct Userfaultfd {
    faults: Arc<Faults>,
    handler: Option<JoinHandle<()>>,
    /// The handler ends when the other end hangs up.
    hang_up: Option<PipeWriter>,
}

struct Faults {
    descriptor: File,
    memory: Arc<Memory>,
    dirty: Arc<DirtyBitmap>,
}

/// A userfaultfd with what this tracker needs, or why there is none.
pub fn open() -> anyhow::Result<File> {
    let device = "/dev/userfaultfd";
    let opened = File::options().read(true).write(true).open(device);
    let opened = opened.with_context(|| format!("{device} does not open"))?;
    // SAFETY: the request takes flags and returns a new descriptor, which nobody else owns.
    let descriptor = unsafe {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let descriptor = abi::new(opened.as_raw_fd(), flags);
        File::from_raw_fd(descriptor.with_context(|| format!("{device} gives no descriptor"))?)
    };
    let mut api = abi::Api {
        api: abi::API,
        features: abi::FEATURE_PAGEFAULT_FLAG_WP | abi::FEATURE_WP_UNPOPULATED,
        ioctls: 0,
    };
    // SAFETY: `Api` is laid out as the kernel's struct and outlives the call.
    unsafe { abi::api(descriptor.as_raw_fd(), &raw mut api) }
        .context("userfaultfd does not write-protect untouched pages: that takes Linux 6.4")?;
    Ok(descriptor)
}

impl Userfaultfd {
    /// Protects all of `memory`; from now on `dirty` says what is written.
    pub fn new(memory: Arc<Memory>, dirty: Arc<DirtyBitmap>) -> anyhow::Result<Self> {
        let descriptor = open()?;
        let mut register = abi::Register {
            start: memory.start() as u64,
            len: memory.len() as u64,
            mode: abi::REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: `Register` is laid out as the kernel's struct; the range is a mapping that `Faults` keeps alive.
        unsafe { abi::register(descriptor.as_raw_fd(), &raw mut register) }
            .context("userfaultfd does not take the memory")?;
        let faults = Arc::new(Faults {
            descriptor,
            memory,
            dirty,
        });
        let (closed, hang_up) = io::pipe()?;
        let handler = std::thread::Builder::new()
            .name("userfaultfd".into())
            .spawn({
                let faults = Arc::clone(&faults);
                move || faults.handle(&closed)
            })?;
        let guard = Self {
            faults,
            handler: Some(handler),
            hang_up: Some(hang_up),
        };
        let whole = 0..guard.faults.memory.len() as u64;
        guard.protect(&mut [whole].into_iter())?;
        Ok(guard)
    }
}

impl Guard for Userfaultfd {
    fn protect(&self, runs: &mut dyn Iterator<Item = Range<u64>>) -> io::Result<()> {
        for run in runs {
            self.faults.set_writable(run, false)?;
        }
        Ok(())
    }
}

impl Drop for Userfaultfd {
    fn drop(&mut self) {
        drop(self.hang_up.take());
        if let Some(handler) = self.handler.take() {
            // The handler returns or aborts the process; it does not unwind.
            let _ = handler.join();
        }
    }
}

impl Faults {
    /// Answers faults until `closed` hangs up.
    fn handle(&self, closed: &io::PipeReader) {
        if let Err(error) = self.answer(closed) {
            // Whoever waits in a fault would wait for ever, and closing the descriptor would let writes pass unmarked.
            eprintln!("error: the userfaultfd handler can't go on: {error}");
            std::process::abort();
        }
    }

    fn answer(&self, closed: &io::PipeReader) -> io::Result<()> {
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
            match (&self.descriptor).read(&mut message) {
                Ok(abi::MESSAGE) => self.admit(&message)?,
                Ok(short) => return Err(io::Error::other(format!("a message of {short} bytes"))),
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

    /// Makes the page that a write waits for writable, marks it, and only then lets the write go on: were the mark first, a save could
    /// take it out and protect the page in between, and the write that follows would go unseen.
    fn admit(&self, message: &[u8; abi::MESSAGE]) -> io::Result<()> {
        let word = |at: usize| {
            u64::from_ne_bytes(
                message[at..at + 8]
                    .try_into()
                    .expect("eight bytes are eight"),
            )
        };
        let (flags, address) = (word(8), word(16));
        if message[0] != abi::EVENT_PAGEFAULT || flags & abi::PAGEFAULT_FLAG_WP == 0 {
            return Err(io::Error::other(format!(
                "event {:#x} with flags {flags:#x}",
                message[0]
            )));
        }
        let page = self.dirty.page_size();
        let offset = address.wrapping_sub(self.memory.start() as u64) & !(page - 1);
        self.set_writable(offset..offset + page, true)?;
        self.dirty.set_dirty(offset).map_err(io::Error::other)?;
        let mut waiting = abi::Range {
            start: self.memory.start() as u64 + offset,
            len: page,
        };
        // SAFETY: `Range` is laid out as the kernel's struct; waking a thread that need not wait makes it look again.
        unsafe { abi::wake(self.descriptor.as_raw_fd(), &raw mut waiting) }?;
        Ok(())
    }

    fn set_writable(&self, range: Range<u64>, writable: bool) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.memory.len() as u64);
        loop {
            let mut request = abi::WriteProtect {
                start: self.memory.start() as u64 + range.start,
                len: range.end - range.start,
                mode: if writable {
                    abi::WRITEPROTECT_MODE_DONTWAKE
                } else {
                    abi::WRITEPROTECT_MODE_WP
                },
            };
            // SAFETY: `WriteProtect` is laid out as the kernel's struct; the range, checked above, is inside the mapping.
            match unsafe { abi::write_protect(self.descriptor.as_raw_fd(), &raw mut request) } {
                // The address space is being changed: try again (userfaultfd_writeprotect(2), EAGAIN).
                Err(Errno::EAGAIN) => {}
                done => return done.map(drop).map_err(io::Error::from),
            }
        }
    }
}
