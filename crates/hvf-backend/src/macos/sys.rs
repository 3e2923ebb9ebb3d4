//! Memory of this process for a guest, and calls of the framework that `applevisor` declares
//! incorrectly or not at all.

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

/// The size of a machine word in bytes. Stores to guest memory are atomic in this unit.
const WORD: usize = size_of::<usize>();

/// A mapping of this process that backs one range of guest RAM. It is readable and writable while
/// the value exists.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Whether the caller owns the mapping, so that it must not be unmapped here.
    adopted: bool,
}

// SAFETY: a mapping belongs to the process, not to a thread, and no method returns a reference to
// it.
unsafe impl Send for Mapping {}
// SAFETY: `store` and `host_memory` access the bytes only with atomic operations, which may race
// with each other and with the guest.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory, which is zero. The host provides pages when
    /// they are touched.
    pub(crate) fn new(len: usize) -> nix::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or(nix::Error::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address, so the new mapping replaces no other.
        let start = unsafe { mmap_anonymous(None, length, access, flags) }?.cast();
        Ok(Self {
            start,
            len,
            adopted: false,
        })
    }

    /// Refers to memory that the caller has mapped.
    ///
    /// # Safety
    /// While the value exists, the range is mapped readable and writable, no Rust reference covers
    /// any of it, and Rust code of this process accesses it only with atomic or volatile
    /// operations.
    pub(crate) unsafe fn adopt(start: NonNull<u8>, len: usize) -> Self {
        Self {
            start,
            len,
            adopted: true,
        }
    }

    /// Returns the address of the first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Returns the `len` bytes from `offset` on.
    pub(crate) fn host_memory(&self, offset: usize, len: usize) -> HostMemory<'_> {
        self.check(offset, len);
        let start = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: the range is inside the mapping (checked), which stays mapped while `self` is
        // borrowed and has no file behind it. No reference to it exists. `store` writes it with
        // atomic operations, and the contract of `adopt` requires the same of other code.
        unsafe { HostMemory::new(start, len) }
    }

    /// Copies `bytes` to `offset`, with a single store for each aligned machine word.
    pub(crate) fn store(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        let mut to = self.start.as_ptr().wrapping_add(offset);
        let (head, rest) = bytes.split_at(to.align_offset(WORD).min(bytes.len()));
        let (words, tail) = rest.as_chunks::<WORD>();
        store_bytes(&mut to, head);
        for word in words {
            // SAFETY: the address is inside the mapping (checked above), and aligned because `head`
            // ends at a multiple of a word. The reference is to an atomic and exists only for this
            // store, so other threads may read and write.
            unsafe { (*to.cast::<AtomicUsize>()).store(usize::from_ne_bytes(*word), Relaxed) };
            to = to.wrapping_add(WORD);
        }
        store_bytes(&mut to, tail);

        fn store_bytes(to: &mut *mut u8, bytes: &[u8]) {
            for byte in bytes {
                // SAFETY: as for words. A byte needs no alignment.
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
            // SAFETY: `new` created the mapping. Every `HostMemory` of it borrows `self`, and a
            // stage 2 that maps it into a guest holds the RAM until the framework has released it.
            // After an error it stays mapped, which is harmless.
            let _ = unsafe { munmap(self.start.cast(), self.len) };
        }
    }
}

/// Calls `hv_vcpu_set_simd_fp_reg` with the calling convention that the framework expects.
///
/// The framework declares the value as a vector (`hv_simd_fp_uchar16_t`, 16 bytes), which AAPCS64
/// passes in V0. On stable Rust `applevisor-sys` declares it as `u128`, which is passed in X2 and
/// X3. The register would then be set to the previous contents of V0.
///
/// # Safety
/// The vCPU exists, and this is the thread that created it.
pub(crate) unsafe fn set_simd_fp_reg(
    vcpu: hv_vcpu_t,
    register: hv_simd_fp_reg_t,
    value: u128,
) -> hv_return_t {
    #[allow(
        improper_ctypes_definitions,
        reason = "the lint rejects all vectors, but rustc passes short vectors as AAPCS64 defines"
    )]
    type AsDeclaredByTheFramework =
        unsafe extern "C" fn(hv_vcpu_t, hv_simd_fp_reg_t, uint8x16_t) -> hv_return_t;
    type AsDeclaredByApplevisor =
        unsafe extern "C" fn(hv_vcpu_t, hv_simd_fp_reg_t, u128) -> hv_return_t;
    // SAFETY: both are pointers to functions of the C ABI. The function is called by the type in
    // the framework's header.
    let set = unsafe {
        std::mem::transmute::<AsDeclaredByApplevisor, AsDeclaredByTheFramework>(
            hv_vcpu_set_simd_fp_reg,
        )
    };
    // SAFETY: both types have 16 bytes, and any 16 bytes are a valid value of each.
    let value = unsafe { std::mem::transmute::<u128, uint8x16_t>(value) };
    // SAFETY: the caller upholds the contract of the function.
    unsafe { set(vcpu, register, value) }
}

/// Returns the host's counter of ticks. The guest's virtual counter has a fixed offset from it.
pub(crate) fn host_counter() -> u64 {
    // libSystem, <mach/mach_time.h>
    unsafe extern "C" {
        safe fn mach_absolute_time() -> u64;
    }
    mach_absolute_time()
}

/// Returns whether the host offers a hypervisor to processes (`sysctl kern.hv_support`).
pub(crate) fn hypervisor_support() -> io::Result<bool> {
    let mut supported: c_int = 0;
    let mut size = size_of::<c_int>();
    // SAFETY: the name ends with a zero byte, the kernel writes at most `size` bytes to
    // `supported`, and no value is set.
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
