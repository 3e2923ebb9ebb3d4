//! Model-specific registers, read and written in batches, around those that KVM refuses.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vcpu_state::Msr;

/// The time-stamp counter (Intel SDM vol. 4, 2.1).
pub(super) const IA32_TSC: u32 = 0x10;
/// The time at which the local APIC's timer fires in TSC-deadline mode (the same).
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Reads the MSRs `indices`: those KVM reads, and those it does not.
pub(super) fn read(
    vcpu: &VcpuFd,
    indices: &[u32],
) -> Result<(Vec<Msr>, Vec<u32>), kvm_ioctls::Error> {
    let (mut readable, mut unreadable) = (Vec::with_capacity(indices.len()), Vec::new());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut entries = entries(batch.iter().map(|index| (*index, 0)));
        // KVM stops before the first that it refuses, and says how many it did.
        let done = vcpu.get_msrs(&mut entries)?;
        readable.extend(entries.as_slice()[..done].iter().map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        unreadable.extend(batch.get(done));
        rest = &rest[done + usize::from(done < batch.len())..];
    }
    Ok((readable, unreadable))
}

/// Writes `msrs`, in order, around those that KVM refuses. What that comes to, [`read`] tells.
pub(super) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), kvm_ioctls::Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let done = vcpu.set_msrs(&entries(batch.iter().map(|msr| (msr.index, msr.value))))?;
        rest = &rest[done + usize::from(done < batch.len())..];
    }
    Ok(())
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entries: Vec<_> = msrs
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        })
        .collect();
    Msrs::from_entries(&entries).expect("a batch has at most KVM_MAX_MSR_ENTRIES")
}
