//! Guest memory for tests, and mappings that hold it.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test binary uses a part"
)]
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};
use page_reader::HostMemory;

#[cfg(target_os = "linux")]
pub(crate) mod child;
#[cfg(target_os = "linux")]
pub(crate) mod populated;
#[cfg(target_os = "linux")]
pub(crate) mod target;
#[cfg(target_os = "linux")]
pub(crate) mod uffd;

/// Returns from the test `$test` if the machine lacks `$need`.
#[cfg(target_os = "linux")]
macro_rules! need {
    ($need:ident, $test:expr) => {
        if !test_machine::Need::$need.met($test) {
            return;
        }
    };
}

#[cfg(target_os = "linux")]
pub(crate) use need;

pub(crate) const PAGE: usize = 4096;

/// Large mappings reserve address space only.
const NO_RESERVE: MapFlags = MapFlags::MAP_NORESERVE;

/// Returns bytes in which adjacent pages differ, and adjacent words of a page differ.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Anonymous memory, shared with forked children or private to each process.
///
/// Private memory is between guard pages: the kernel merges adjacent mappings of the same kind,
/// also those of two tests, and then lists them as one.
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
    /// The size of the guard on each side in bytes.
    guard: usize,
}

impl Mapping {
    pub(crate) fn private(len: usize) -> Self {
        Self::new(len, MapFlags::MAP_PRIVATE | NO_RESERVE)
    }

    pub(crate) fn shared(len: usize) -> Self {
        Self::new(len, MapFlags::MAP_SHARED)
    }

    pub(crate) fn private_with(bytes: &[u8]) -> Self {
        let mapping = Self::new(bytes.len(), MapFlags::MAP_PRIVATE);
        mapping.write(bytes);
        mapping
    }

    /// Reserves address space.
    pub(crate) fn inaccessible(len: usize) -> Self {
        Self::reserved(len, 0, MapFlags::MAP_PRIVATE | NO_RESERVE)
    }

    fn new(len: usize, flags: MapFlags) -> Self {
        let guard = if flags.contains(MapFlags::MAP_PRIVATE) {
            PAGE
        } else {
            0
        };
        let mapping = Self::reserved(len, guard, flags);
        mapping.allow(len);
        mapping
    }

    fn reserved(len: usize, guard: usize, flags: MapFlags) -> Self {
        let whole = NonZeroUsize::new(len + 2 * guard).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }.unwrap();
        // SAFETY: inside the mapping.
        let start = unsafe { start.byte_add(guard) };
        Self { start, len, guard }
    }

    pub(crate) fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: mapped and writable. These tests have no other writer meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr(), bytes.len()) }
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn of_file(file: BorrowedFd<'_>, len: usize, shared: bool) -> Self {
        let kind = if shared {
            MapFlags::MAP_SHARED
        } else {
            MapFlags::MAP_PRIVATE
        };
        let flags = kind | NO_RESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZeroUsize::new(len).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { nix::sys::mman::mmap(None, length, protection, flags, file, 0) };
        Self {
            start: start.unwrap(),
            len,
            guard: 0,
        }
    }

    pub(crate) fn write_at(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        let to = self.as_ptr().wrapping_add(offset);
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Makes the first `len` bytes readable and writable.
    pub(crate) fn allow(&self, len: usize) {
        assert!(len <= self.len);
        // SAFETY: inside the mapping, which is borrowed only as memory that may change.
        unsafe {
            mprotect(
                self.start,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            )
        }
        .unwrap();
    }

    pub(crate) fn advise(&self, range: Range<usize>, advice: MmapAdvise) -> nix::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        let start = self.start.as_ptr().wrapping_byte_add(range.start);
        // SAFETY: inside the mapping, which is borrowed only as memory that may change.
        unsafe { madvise(NonNull::new(start).unwrap(), range.len(), advice) }
    }

    /// Returns how many bytes of the mapping are in this process's page tables.
    #[cfg(target_os = "linux")]
    pub(crate) fn resident(&self) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let header = format!("{:x}-", self.address());
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&header));
        let rss = mapping
            .filter_map(|line| line.strip_prefix("Rss:"))
            .next()
            .unwrap();
        rss.trim()
            .strip_suffix(" kB")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    pub(crate) fn address(&self) -> u64 {
        self.as_ptr() as u64
    }

    pub(crate) fn memory(&self) -> HostMemory<'_> {
        // SAFETY: mapped until drop, which the borrow prevents; written through raw pointers only.
        unsafe { HostMemory::new(self.as_ptr(), self.len) }
    }
}

// SAFETY: an address range, which any thread may use.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (guard, whole) = (self.guard, self.len + 2 * self.guard);
        // SAFETY: this value owns the mapping, and no borrow of it is left.
        unsafe { munmap(self.start.byte_sub(guard), whole) }.unwrap();
    }
}

/// Binds this thread to its current processor.
///
/// `MADV_PAGEOUT` swaps out the new pages of the processor that calls it, and keeps those of other
/// processors in memory.
#[cfg(target_os = "linux")]
pub(crate) fn stay_on_this_processor() {
    // SAFETY: the set is a local variable of integers, which is read during the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().cast_unsigned() as usize, &mut set);
        let result = libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
        assert_eq!(result, 0);
    }
}

/// An enabled swap file.
#[cfg(target_os = "linux")]
pub(crate) struct Swap {
    path: std::ffi::CString,
    _dir: tempfile::TempDir,
}

#[cfg(target_os = "linux")]
impl Swap {
    /// Enables a swap file of `len` bytes, or prints that `test` is not run and returns `None` if
    /// the file system does not support swap files.
    pub(crate) fn on(len: usize, test: &str) -> Option<Self> {
        let swap = Self::in_temp_dir(len);
        if swap.is_none() {
            let why = "the directory for temporary files is on a file system without swap files";
            test_machine::not_run(test, why);
        }
        swap
    }

    fn in_temp_dir(len: usize) -> Option<Self> {
        use std::os::unix::ffi::OsStrExt;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let mut file = vec![0; len];
        // A swap header: version and last page after the boot block, the magic at the end of the
        // page.
        file[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        file[1028..1032].copy_from_slice(&((len / PAGE - 1) as u32).to_ne_bytes());
        file[PAGE - 10..PAGE].copy_from_slice(b"SWAPSPACE2");
        std::fs::write(&path, &file).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string.
        let on = unsafe { libc::swapon(path.as_ptr(), 0) } == 0;
        // Made only where it is in use: its drop ends that.
        on.then(|| Self { path, _dir: dir })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: a C string.
        let off = unsafe { libc::swapoff(self.path.as_ptr()) };
        assert_eq!(off, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Copies this program to a directory where every user can execute it, until the value is dropped.
#[cfg(target_os = "linux")]
pub(crate) fn world_executable() -> Program {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test");
    // Copied by another process: a child that a thread forks meanwhile inherits the descriptors of
    // this one, and a file that is open for writing cannot be executed.
    let copied = std::process::Command::new("cp")
        .arg(std::env::current_exe().unwrap())
        .arg(&path)
        .status()
        .unwrap();
    assert!(copied.success());
    for path in [dir.path(), &path] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    Program { path, _dir: dir }
}

#[cfg(target_os = "linux")]
pub(crate) struct Program {
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

#[cfg(target_os = "linux")]
impl Program {
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }
}
