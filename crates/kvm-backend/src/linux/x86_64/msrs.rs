//! The model-specific registers that KVM knows. Reads and writes them in batches, and skips those
//! that KVM refuses.

use std::io;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::vcpu_state::Msr;

/// The number of MSRs in one call. KVM refuses its own constant, 256, as one too many (`msr_io` in
/// Linux arch/x86/kvm/x86.c compares with `>=`).
const BATCH: usize = KVM_MAX_MSR_ENTRIES - 1;

/// The time-stamp counter (Intel SDM vol. 4, 2.1).
pub(super) const IA32_TSC: u32 = 0x10;
/// The time at which the local APIC's timer fires in TSC-deadline mode (Intel SDM vol. 4, 2.1).
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The model-specific registers that this host's KVM captures and restores
/// (`KVM_GET_MSR_INDEX_LIST`).
///
/// KVM lists them by the descriptor of `/dev/kvm`. A VMM asks once, before its sandbox closes the
/// descriptor, and passes the list to each [`VcpuState::capture`](crate::VcpuState::capture). A
/// process that cannot open the device gets the numbers from one that can.
///
/// # Examples
/// ```
/// use kvm_backend::MsrList;
///
/// # if !test_machine::Need::Kvm.met("the example of MsrList") { return Ok(()); }
/// let msrs = MsrList::query(&kvm_backend::open_kvm()?)?;
/// let elsewhere = MsrList::from_indices(msrs.indices());
/// assert_eq!(elsewhere, msrs);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrList(Box<[u32]>);

impl MsrList {
    /// Returns the list of this host.
    ///
    /// # Errors
    /// Returns the error of `KVM_GET_MSR_INDEX_LIST`.
    pub fn query(kvm: &Kvm) -> io::Result<Self> {
        Ok(Self::from_indices(kvm.get_msr_index_list()?.as_slice()))
    }

    /// Creates a list of these registers. A register that is missing from the list is missing from
    /// the captured state: pass the [indices](Self::indices) of a list that KVM returned.
    #[must_use]
    pub fn from_indices(indices: &[u32]) -> Self {
        Self(indices.into())
    }

    /// Returns the numbers of the registers, the operands of `rdmsr`, in KVM's order.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.0
    }
}

/// Reads the MSRs `indices`. Returns those that KVM read, and the indices of those that it refused.
pub(super) fn read(
    vcpu: &VcpuFd,
    indices: &[u32],
) -> Result<(Vec<Msr>, Vec<u32>), kvm_ioctls::Error> {
    let (mut readable, mut unreadable) = (Vec::with_capacity(indices.len()), Vec::new());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let mut entries = entries(batch.iter().map(|index| (*index, 0)));
        // KVM stops before the first that it refuses, and returns the number that it read.
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

/// Writes `msrs` in order, and skips those that KVM refuses. [`read`] shows the result.
pub(super) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), kvm_ioctls::Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
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
    Msrs::from_entries(&entries).expect("a batch is smaller than KVM_MAX_MSR_ENTRIES")
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;
    use test_machine::needs;

    #[test]
    fn read_skips_and_reports_the_msrs_that_kvm_refuses() {
        needs!(Kvm);
        let vm = crate::create_vm(&crate::open_kvm().unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let (pat, none) = (0x277, 0x4b56_4dff);
        // More than one batch, with refusals at its border and at the end.
        let mut indices = vec![pat; 600];
        for refused in [0, BATCH, BATCH + 1, 300, 599] {
            indices[refused] = none;
        }
        let (readable, unreadable) = read(&vcpu, &indices).unwrap();
        assert_eq!(unreadable, [none; 5]);
        assert_eq!(readable.len(), 595);
        assert!(
            readable
                .iter()
                .all(|msr| msr.index == pat && msr.value != 0)
        );
    }
}
