//! Operations that neither std nor nix offers as safe functions: the action of a signal, the
//! standard streams as the process got them, and writes through a mapping.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::libc;

/// A bit for each standard stream that this process was started with and that can be used: stdin
/// for reading, stdout and stderr for writing.
static USABLE: AtomicU8 = AtomicU8::new(0);

/// Runs [`look_at_streams`] before `main`: the runtime of Rust opens `/dev/null` in the place of a
/// closed stream, and so hides it.
// SAFETY: the section lists functions of this type, which the C runtime calls once before `main`.
// The function needs nothing that is initialized later.
#[used]
#[cfg_attr(target_os = "macos", unsafe(link_section = "__DATA,__mod_init_func"))]
#[cfg_attr(not(target_os = "macos"), unsafe(link_section = ".init_array"))]
static AT_START: extern "C" fn() = look_at_streams;

extern "C" fn look_at_streams() {
    use_one_arena();
    let mut usable = 0;
    for (stream, unusable) in [libc::O_WRONLY, libc::O_RDONLY, libc::O_RDONLY]
        .into_iter()
        .enumerate()
    {
        // SAFETY: reads the flags of a descriptor, and fails if it is closed.
        let flags = unsafe { libc::fcntl(stream as libc::c_int, libc::F_GETFL) };
        if flags != -1 && flags & libc::O_ACCMODE != unusable {
            usable |= 1 << stream;
        }
    }
    USABLE.store(usable, Ordering::Relaxed);
}

/// Lets all threads allocate from one arena. Others reserve 64 MiB of addresses each, which count
/// against `RLIMIT_AS` and would take the memory that is
/// [set aside](crate::memory_reserve). Threads allocate little but large buffers.
fn use_one_arena() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: changes a parameter of the allocator, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Returns whether stdin was open for reading when the process started.
pub fn stdin_was_open() -> bool {
    USABLE.load(Ordering::Relaxed) & 1 << libc::STDIN_FILENO != 0
}

/// Returns whether stdout was open for writing when the process started.
pub fn stdout_was_open() -> bool {
    USABLE.load(Ordering::Relaxed) & 1 << libc::STDOUT_FILENO != 0
}

/// Returns whether stderr was open for writing when the process started.
pub fn stderr_was_open() -> bool {
    USABLE.load(Ordering::Relaxed) & 1 << libc::STDERR_FILENO != 0
}

/// Returns whether this process was started with `signal` ignored, as `nohup` does, or a shell that
/// starts a job in the background.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action is given, so nothing changes; the old one is written to the structure,
    // of which all zeros are a value too.
    let action = unsafe {
        if libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) != 0 {
            return false;
        }
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Returns whether two descriptors, each of a process, are of different open files. `false` if the
/// kernel does not say.
#[cfg(target_os = "linux")]
pub fn are_different_open_files(one: (u32, u32), other: (u32, u32)) -> bool {
    const KCMP_FILE: libc::c_long = 0;
    let [first, second, fd, other_fd] = [one.0, other.0, one.1, other.1].map(libc::c_long::from);
    // SAFETY: compares numbers inside the kernel, and accesses no memory of this process.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, first, second, KCMP_FILE, fd, other_fd) };
    order > 0
}

/// Returns the listening Unix socket that a service manager has passed as the first descriptor
/// after the standard streams. It may be called once.
#[cfg(target_os = "linux")]
pub fn passed_listener() -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
    use nix::sys::socket::{getsockopt, sockopt};

    const FIRST: i32 = libc::STDERR_FILENO + 1;
    let address: SockaddrStorage = getsockname(FIRST).ok()?;
    if address.family() != Some(AddressFamily::Unix) {
        return None;
    }
    // SAFETY: the descriptor is open, and was passed to this process for this use. Nothing else in
    // it has the number.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    let flags = FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC);
    let listens = getsockopt(&socket, sockopt::AcceptConn).ok()?;
    (listens && fcntl(&socket, flags).is_ok()).then_some(socket)
}

#[cfg(target_os = "linux")]
pub use mapping::Mapping;

#[cfg(target_os = "linux")]
mod mapping {
    use std::fs::File;
    use std::io;
    use std::num::NonZeroUsize;
    use std::ptr::{self, NonNull};

    use nix::errno::Errno;
    use nix::libc::c_void;
    use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

    /// A shared mapping of a file, for writing to hugetlbfs, which has no `write(2)`.
    #[derive(Debug)]
    pub struct Mapping {
        start: NonNull<c_void>,
        len: NonZeroUsize,
    }

    impl Mapping {
        /// Maps the first `len` bytes. On hugetlbfs, this reserves the missing huge pages.
        pub fn of(file: &File, len: u64) -> io::Result<Self> {
            let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
            let len = len.ok_or(Errno::EINVAL)?;
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping, where the kernel chooses.
            let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) }?;
            Ok(Self { start, len })
        }

        /// Writes `bytes` at `offset`. Fails if a page cannot be allocated.
        ///
        /// # Panics
        /// Panics if the range ends past the mapping.
        pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            let offset = usize::try_from(offset).map_err(io::Error::other)?;
            let end = offset.checked_add(bytes.len());
            assert!(
                end.is_some_and(|end| end <= self.len.get()),
                "{} bytes at {offset} of a mapping of {}",
                bytes.len(),
                self.len
            );
            // madvise requires the start of a page. The mapping starts at one.
            let before = offset % 4096;
            loop {
                let populate = MmapAdvise::MADV_POPULATE_WRITE;
                // SAFETY: inside the mapping, by the assertion; no byte changes by it.
                match unsafe {
                    let start = self.start.byte_add(offset - before);
                    madvise(start, before + bytes.len(), populate)
                } {
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    // Linux before 5.14 has no such advice.
                    Ok(()) | Err(Errno::EINVAL) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            let to = self.start.cast::<u8>().as_ptr();
            // SAFETY: the range is inside the mapping, by the assertion. The mapping is writable
            // and lives as long as `self`. Its address never leaves this type, so `bytes` does not
            // overlap it.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(offset), bytes.len()) };
            Ok(())
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped by `of`, and the address never left this type.
            let unmapped = unsafe { munmap(self.start, self.len.get()) };
            debug_assert_eq!(unmapped, Ok(()));
        }
    }
}
