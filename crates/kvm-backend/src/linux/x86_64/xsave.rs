//! Reads and writes the XSAVE area, whose size depends on the processor and on the features that
//! the process may use.

#![allow(unsafe_code)]

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, IntoBytes};

/// The size of `kvm_xsave` without its extension in Linux 5.17.
const LEGACY: usize = size_of::<kvm_xsave>();

/// Returns the number of bytes that KVM reads and writes for a vCPU of a virtual machine.
/// `capability` is the value of its `KVM_CAP_XSAVE2`.
fn size(capability: i32) -> usize {
    LEGACY.max(capability.max(0) as usize)
}

fn area(size: usize) -> Xsave {
    Xsave::new((size - LEGACY).div_ceil(size_of::<u32>())).expect("an XSAVE area is some kilobytes")
}

/// Returns the XSAVE area of a vCPU. `capability` is the value of `KVM_CAP_XSAVE2` of its virtual
/// machine.
pub(super) fn read(capability: i32, vcpu: &VcpuFd) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let size = size(capability);
    let mut area = area(size);
    if capability > 0 {
        // SAFETY: KVM writes the number of bytes that KVM_CAP_XSAVE2 reports for this VM, and
        // `area` has that size.
        unsafe { vcpu.get_xsave2(&mut area) }?;
    } else {
        // SAFETY: only the fixed part is replaced; the length stays.
        unsafe { area.as_mut_fam_struct() }.xsave.region = vcpu.get_xsave()?.region;
    }
    let mut bytes = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(area.as_slice().as_bytes());
    bytes.truncate(size);
    Ok(bytes)
}

/// Writes the XSAVE area of a vCPU. If `bytes` is shorter, the rest is zero: state in its initial
/// configuration.
///
/// If `bytes` is longer, its additional bytes belong to state components that this KVM lacks. If
/// any is in use, XSTATE_BV has its bit, and KVM refuses the area.
///
/// `capability` is the value of `KVM_CAP_XSAVE2` of the virtual machine.
pub(super) fn write(capability: i32, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), kvm_ioctls::Error> {
    let mut words = vec![0u32; size(capability).max(bytes.len()).div_ceil(size_of::<u32>())];
    words.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
    let mut area = area(words.as_bytes().len());
    let (region, extra) = words.split_at(LEGACY / size_of::<u32>());
    area.as_mut_slice().copy_from_slice(extra);
    let fixed = <[u32; 1024]>::read_from_bytes(region.as_bytes()).expect("split at its size");
    // SAFETY: only the fixed part is replaced; the length stays.
    unsafe { area.as_mut_fam_struct() }.xsave.region = fixed;
    // SAFETY: KVM reads the number of bytes that KVM_CAP_XSAVE2 reports for this VM, and `area` has
    // at least those.
    unsafe { vcpu.set_xsave2(&area) }
}
