//! The KVM calls that `kvm-ioctls` lacks.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;

/// Clears the pages set in `words` (those of the log from `first_page` on) in KVM's log, and
/// protects them again (`KVM_CLEAR_DIRTY_LOG`).
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    words: &[u64],
) -> nix::Result<()> {
    assert!(words.len() as u64 * 64 >= u64::from(num_pages));
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the descriptor is that of a VM. KVM reads `num_pages` bits, which `words` has
    // (asserted), and writes only the bits of the structure.
    unsafe { ioctl::clear_dirty_log(vm.as_raw_fd(), &raw mut clear) }.map(drop)
}

mod ioctl {
    use super::{KVMIO, kvm_clear_dirty_log};

    // Linux include/uapi/linux/kvm.h: _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)
    nix::ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
}
