//! Calls of the framework that `applevisor` declares incorrectly, and calls of the system.

#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::uint8x16_t;
// `--cfg hvf_fake`: a vector of the same size, also passed in a vector register.
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m128i as uint8x16_t;
use std::ffi::{c_int, c_void};
use std::io;

use applevisor_sys::{hv_return_t, hv_simd_fp_reg_t, hv_vcpu_set_simd_fp_reg, hv_vcpu_t};

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

// libSystem, <libkern/OSCacheControl.h>
unsafe extern "C" {
    /// Makes code in memory of this process visible to instruction fetches of all CPUs.
    ///
    /// # Safety
    /// The range is mapped.
    pub(crate) fn sys_icache_invalidate(start: *mut c_void, size: usize);
}

/// Keeps memory from processes that this one forks.
///
/// # Safety
/// The range is mapped, and its start is a multiple of the host's page size.
pub(crate) unsafe fn keep_from_children(start: *mut c_void, size: usize) -> io::Result<()> {
    // libSystem, <sys/mman.h>, and VM_INHERIT_NONE of <mach/vm_inherit.h>
    unsafe extern "C" {
        fn minherit(start: *mut c_void, size: usize, inherit: c_int) -> c_int;
    }
    const VM_INHERIT_NONE: c_int = 2;
    // SAFETY: the caller passes mapped memory, whose contents and mapping stay.
    match unsafe { minherit(start, size, VM_INHERIT_NONE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns whether the host offers a hypervisor to processes (`sysctl kern.hv_support`).
pub(crate) fn hypervisor_support() -> io::Result<bool> {
    #[cfg(not(hvf_fake))]
    use libc::sysctlbyname;
    // libc declares it for macOS only.
    #[cfg(hvf_fake)]
    unsafe extern "C" {
        fn sysctlbyname(
            name: *const std::ffi::c_char,
            old: *mut c_void,
            old_size: *mut usize,
            new: *mut c_void,
            new_size: usize,
        ) -> c_int;
    }

    let mut supported: c_int = 0;
    let mut size = size_of::<c_int>();
    // SAFETY: the name ends with a zero byte, the kernel writes at most `size` bytes to
    // `supported`, and no value is set.
    let result = unsafe {
        sysctlbyname(
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
