//! Memory of this process for a guest, and the framework's calls that `applevisor` does not offer as they must be.

#![allow(unsafe_code)]

use std::arch::aarch64::uint8x16_t;
use std::ffi::{c_int, c_void};
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

use applevisor_sys::{hv_return_t, hv_simd_fp_reg_t, hv_vcpu_set_simd_fp_reg, hv_vcpu_t};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use page_reader::HostMemory;

/// The bytes of a machine word, the unit in which guest memory is stored to.
const WORD: usize = size_of::<usize>();

/// Memory of this process that backs one range of guest RAM: readable and writable as long as the value lives.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Somebody else's, and not ours to unmap.
    adopted: bool,
}

// SAFETY: a mapping belongs to the process, not to a thread, and nothing here gives out a reference to it.
unsafe impl Send for Mapping {}
// SAFETY: `store` and `host_memory` access the bytes with atomic operations only, which may race with each other
// and with the guest.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of new anonymous memory: zero, and of the host's pages only what is touched. Private, as the framework's users have it.
    pub(crate) fn new(len: usize) -> nix::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or(nix::Error::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap_anonymous(None, length, access, flags) }?.cast();
        Ok(Self {
            start,
            len,
            adopted: false,
        })
    }

    /// Names memory that is somebody else's.
    ///
    /// # Safety
    /// As long as the value lives, the range is mapped readable and writable, no Rust reference covers any of it, and
    /// Rust code of this process that accesses it does so by atomic or volatile operations.
    pub(crate) unsafe fn adopt(start: NonNull<u8>, len: usize) -> Self {
        Self {
            start,
            len,
            adopted: true,
        }
    }

    /// The address of the first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The bytes from `offset` on, `len` of them.
    pub(crate) fn host_memory(&self, offset: usize, len: usize) -> HostMemory<'_> {
        self.check(offset, len);
        let start = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: inside the mapping (checked), which stays while `self` is borrowed and has no file behind it. No reference to it is ever
        // made; `store` writes it with atomic operations, and `adopt` asks its caller for the same.
        unsafe { HostMemory::new(start, len) }
    }

    /// Copies `bytes` to `offset`, each aligned machine word in a single store.
    pub(crate) fn store(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        let mut to = self.start.as_ptr().wrapping_add(offset);
        let (head, rest) = bytes.split_at(to.align_offset(WORD).min(bytes.len()));
        let (words, tail) = rest.as_chunks::<WORD>();
        store_bytes(&mut to, head);
        for word in words {
            // SAFETY: inside the mapping (checked above), and aligned since `head` took what was missing.
            // The reference is to an atomic, lives for this store, and claims nothing about who else reads or writes.
            unsafe { (*to.cast::<AtomicUsize>()).store(usize::from_ne_bytes(*word), Relaxed) };
            to = to.wrapping_add(WORD);
        }
        store_bytes(&mut to, tail);

        fn store_bytes(to: &mut *mut u8, bytes: &[u8]) {
            for byte in bytes {
                // SAFETY: as for words, of which a byte needs no alignment.
                unsafe { (*to.cast::<AtomicU8>()).store(*byte, Relaxed) };
                *to = to.wrapping_add(1);
            }
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a mapping of {}",
            self.len
        );
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.adopted {
            // SAFETY: the mapping that `new` made. `HostMemory`s of it borrow `self`, and a stage 2 that gives it to a guest holds
            // the RAM until the framework has let go of it. A failure leaves it mapped, which is harmless.
            let _ = unsafe { munmap(self.start.cast(), self.len) };
        }
    }
}

/// `hv_vcpu_set_simd_fp_reg` with the value where the framework looks for it.
///
/// The framework declares the value as a vector (`hv_simd_fp_uchar16_t`, 16 bytes), which AAPCS64 passes in V0. On stable Rust `applevisor-sys`
/// declares it as `u128`, which goes to X2 and X3: the register would be set to whatever V0 held.
///
/// # Safety
/// As the framework's: on the thread that made the vCPU, which exists.
pub(crate) unsafe fn set_simd_fp_reg(
    vcpu: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: u128,
) -> hv_return_t {
    #[allow(
        improper_ctypes_definitions,
        reason = "the lint takes no vector for FFI-safe; AAPCS64 has short vectors, and rustc passes them so"
    )]
    type AsDeclaredByTheFramework =
        unsafe extern "C" fn(hv_vcpu_t, hv_simd_fp_reg_t, uint8x16_t) -> hv_return_t;
    type AsDeclaredByApplevisor =
        unsafe extern "C" fn(hv_vcpu_t, hv_simd_fp_reg_t, u128) -> hv_return_t;
    // SAFETY: both are pointers to functions of the C ABI; the type it is called by is that of the framework's header.
    let set = unsafe {
        std::mem::transmute::<AsDeclaredByApplevisor, AsDeclaredByTheFramework>(
            hv_vcpu_set_simd_fp_reg,
        )
    };
    // SAFETY: 16 bytes either way, and any 16 bytes are a value of both types.
    let value = unsafe { std::mem::transmute::<u128, uint8x16_t>(value) };
    // SAFETY: the caller's promise.
    unsafe { set(vcpu, register, value) }
}

/// The host's counter of ticks, from which the guest's virtual counter is an offset away.
pub(crate) fn host_counter() -> u64 {
    // libSystem, <mach/mach_time.h>
    unsafe extern "C" {
        safe fn mach_absolute_time() -> u64;
    }
    mach_absolute_time()
}

/// Whether this machine has a hypervisor for processes: `sysctl kern.hv_support`.
pub(crate) fn hypervisor_support() -> io::Result<bool> {
    let mut supported: c_int = 0;
    let mut size = size_of::<c_int>();
    // SAFETY: the name ends with a zero, the kernel writes at most `size` bytes to `supported`, and nothing is set.
    let result = unsafe {
        libc::sysctlbyname(
            c"kern.hv_support".as_ptr(),
            (&raw mut supported).cast::<c_void>(),
            &raw mut size,
            std::ptr::null_mut(),
            0,
        )
    };
    match result {
        0 => Ok(supported != 0),
        _ => Err(io::Error::last_os_error()),
    }
}
