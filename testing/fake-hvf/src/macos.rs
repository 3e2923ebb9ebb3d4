//! Functions of macOS beside the framework's.
//!
//! The page size of a Mac is 16 KiB. `sysconf` therefore reports it, and anonymous memory begins at
//! a multiple of it.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::calls::answer;
use crate::memory::{self, Mapped};
use crate::{host, objects, symbols, vcpus};

/// The page size of a Mac in bytes.
const PAGE_SIZE: usize = 16 << 10;

/// Releases an object of the framework. Null is none, as on macOS.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn os_release(object: *mut c_void) {
    // A second release is a crash on macOS.
    assert!(
        object.is_null() || objects::release(object),
        "os_release of an object that does not exist: {object:?}"
    );
}

/// Returns the host's counter.
#[unsafe(no_mangle)]
pub extern "C" fn mach_absolute_time() -> u64 {
    host::ticks()
}

/// Reads `kern.hv_support`, the only name that this crate knows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sysctlbyname(
    name: *const c_char,
    old: *mut c_void,
    size: *mut usize,
    new: *const c_void,
    _new_size: usize,
) -> c_int {
    let fail = |error| {
        // SAFETY: the address is of this thread's variable.
        unsafe { *libc::__errno_location() = error };
        -1
    };
    if answer("sysctlbyname", || Ok(())) != 0 {
        return fail(libc::EPERM);
    }
    // SAFETY: the caller passes a string that ends with a zero byte.
    let known = unsafe { CStr::from_ptr(name) } == c"kern.hv_support";
    // SAFETY: the caller passes the size of its buffer.
    if !known || !new.is_null() || unsafe { *size } < size_of::<c_int>() {
        return fail(libc::ENOENT);
    }
    // SAFETY: the caller's buffer has room for it (checked).
    unsafe {
        old.cast::<c_int>()
            .write(c_int::from(host::has_hypervisor()));
        *size = size_of::<c_int>();
    }
    0
}

/// Forgets all translated code, if guests have any memory of the range.
#[unsafe(no_mangle)]
pub extern "C" fn sys_icache_invalidate(start: *mut c_void, len: usize) {
    let (start, end) = (start.addr(), start.addr().saturating_add(len));
    let is_of_guest = |mapped: &Mapped| {
        mapped.host_start < end && start < mapped.host_start + mapped.size as usize
    };
    if memory::mapped().iter().any(is_of_guest) {
        vcpus::forget_code();
    }
}

/// The task of this process, which [`mach_vm_page_range_query`] takes.
#[unsafe(no_mangle)]
pub static mach_task_self_: u32 = 0x103;

/// Writes a number for each page of a Mac: 1 (`VM_PAGE_QUERY_PAGE_PRESENT`) if any of it was
/// touched, by Linux's page map.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mach_vm_page_range_query(
    task: u32,
    address: u64,
    size: u64,
    dispositions: u64,
    count: *mut u64,
) -> c_int {
    const INVALID_ARGUMENT: c_int = 4;
    /// The page is present, or swapped out.
    const TOUCHED: u64 = 0b11 << 62;
    let page = PAGE_SIZE as u64;
    // SAFETY: the caller passes the address of its number.
    if task != mach_task_self_ || !address.is_multiple_of(page) || unsafe { *count } < size / page {
        return INVALID_ARGUMENT;
    }
    let Ok(map) = File::open("/proc/self/pagemap") else {
        return INVALID_ARGUMENT;
    };
    let numbers = std::ptr::with_exposed_provenance_mut::<c_int>(dispositions as usize);
    for number in 0..size / page {
        // The host has four pages of 4 KiB for each.
        let mut entries = [0; 32];
        let at = (address + number * page) / (4 << 10) * 8;
        if map.read_exact_at(&mut entries, at).is_err() {
            return INVALID_ARGUMENT;
        }
        let (entries, _) = entries.as_chunks::<8>();
        let touched = entries
            .iter()
            .any(|entry| u64::from_le_bytes(*entry) & TOUCHED != 0);
        // SAFETY: the caller's array has room for a number for each page (checked by `count`).
        unsafe { numbers.add(number as usize).write(c_int::from(touched)) };
    }
    // SAFETY: as above.
    unsafe { *count = size / page };
    0
}

/// Keeps memory from processes that this one forks. On Linux, `madvise` does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn minherit(start: *mut c_void, size: usize, inherit: c_int) -> c_int {
    const NONE: c_int = 2;
    if answer("minherit", || Ok(())) != 0 || inherit != NONE {
        // SAFETY: the address is of this thread's variable.
        unsafe { *libc::__errno_location() = libc::EINVAL };
        return -1;
    }
    // SAFETY: the caller's range.
    unsafe { libc::madvise(start, size, libc::MADV_DONTFORK) }
}

/// Finds the framework's functions that the system has, and what libc finds otherwise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void {
    type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

    // SAFETY: the caller passes a string that ends with a zero byte.
    let text = unsafe { CStr::from_ptr(name) };
    if text.to_bytes().starts_with(b"hv_") {
        return symbols::symbol(text).unwrap_or(std::ptr::null_mut());
    }
    // SAFETY: both strings end with a zero byte. This is the version of x86-64.
    let next = unsafe { libc::dlvsym(libc::RTLD_NEXT, c"dlsym".as_ptr(), c"GLIBC_2.2.5".as_ptr()) };
    assert!(!next.is_null(), "libc has no dlsym");
    // SAFETY: this is the type of the function.
    let next = unsafe { std::mem::transmute::<*mut c_void, Dlsym>(next) };
    // SAFETY: the caller's arguments.
    unsafe { next(library, name) }
}

/// Returns the next definition of a function, behind that of this crate.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: the name ends with a zero byte.
    let function = unsafe { dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    assert!(!function.is_null(), "libc has no {name:?}");
    function
}

/// Replaces the page size in the answers of libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sysconf(name: c_int) -> c_long {
    if name == libc::_SC_PAGESIZE {
        return PAGE_SIZE as c_long;
    }
    // SAFETY: this is the type of the function.
    let next: unsafe extern "C" fn(c_int) -> c_long =
        unsafe { std::mem::transmute(next(c"sysconf")) };
    // SAFETY: any number may be passed.
    unsafe { next(name) }
}

type Mmap = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;

/// Maps memory at a multiple of a Mac's page size where the kernel chooses the address, and
/// everything else as libc does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    size: usize,
    access: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: this is the type of the function.
    let next: Mmap = unsafe { std::mem::transmute(next(c"mmap")) };
    // SAFETY: the caller's arguments, or a place that is reserved here.
    let map = |place: *mut c_void, flags| unsafe { next(place, size, access, flags, file, offset) };
    let Some(larger) = size.checked_add(PAGE_SIZE) else {
        return map(address, flags);
    };
    if !address.is_null() || size == 0 {
        return map(address, flags);
    }
    let reserved = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses the address.
    let start = unsafe {
        next(
            std::ptr::null_mut(),
            larger,
            libc::PROT_NONE,
            reserved,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return start;
    }
    let padding = start.addr().next_multiple_of(PAGE_SIZE) - start.addr();
    let aligned = start.map_addr(|start| start + padding);
    let end = aligned.map_addr(|aligned| aligned + size.next_multiple_of(4 << 10));
    let unused = [
        (start, padding),
        (end, larger - padding - (end.addr() - aligned.addr())),
    ];
    let mapped = map(aligned, flags | libc::MAP_FIXED);
    // SAFETY: a call without arguments that have requirements.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the variable of this thread.
    let failure = unsafe { *errno };
    let of_failure = (mapped == libc::MAP_FAILED).then_some((aligned, size));
    for (from, size) in unused.into_iter().chain(of_failure) {
        if size > 0 {
            // SAFETY: this part of the reserved place is in no use.
            unsafe { libc::munmap(from, size) };
        }
    }
    // SAFETY: as above. The caller sees why its mapping failed.
    unsafe { *errno = failure };
    mapped
}

/// As [`mmap`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    size: usize,
    access: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's arguments.
    unsafe { mmap(address, size, access, flags, file, offset) }
}
