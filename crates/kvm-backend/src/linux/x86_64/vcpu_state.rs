//! The state of a vCPU as data.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::abi::{self, FormatVersion};

/// The state of one vCPU, from which a new vCPU continues the guest.
///
/// It is [captured](Self::capture) from a vCPU that is [paused](crate::Vcpus::pause), and
/// [restored](Self::restore) into one that has never run. In between it is [bytes](Self::to_bytes),
/// or data for any serde format. Kernel structures are stored byte for byte (as hexadecimal digits
/// in human-readable formats). The version of the format is the first field, so that state of
/// another format is an error and is not misread.
///
/// # Examples
/// ```no_run
/// use kvm_backend::VcpuState;
/// # fn example(
/// #     msrs: &kvm_backend::MsrList,
/// #     vcpus: &kvm_backend::Vcpus,
/// #     vcpu: &kvm_backend::Vcpu,
/// #     new_vm: &kvm_ioctls::VmFd,
/// #     new_vcpu: &kvm_ioctls::VcpuFd,
/// # ) -> Result<(), Box<dyn std::error::Error>> {
/// let paused = vcpus.pause()?; // after each vCPU has completed its I/O
/// let state = VcpuState::capture(msrs, &paused, vcpu)?;
/// let bytes = state.to_bytes();
///
/// let state = VcpuState::from_bytes(&bytes)?; // after the RAM is restored
/// let restored = state.restore(new_vm, new_vcpu)?;
/// for msr in &restored.differing_msrs {
///     eprintln!("MSR {:#x} was not restored to {:#x}", msr.index, msr.value);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[must_use = "the state is lost unless it is saved"]
pub struct VcpuState {
    pub(super) format: FormatVersion<1>,
    /// General registers, instruction pointer and flags.
    #[serde(with = "abi")]
    pub regs: kvm_regs,
    /// Segments, descriptor tables, control registers, EFER, APIC base.
    #[serde(with = "abi")]
    pub sregs: kvm_sregs,
    /// Debug registers.
    #[serde(with = "abi")]
    pub debug_regs: kvm_debugregs,
    /// Extended control registers. XCR0 has the enabled vector state.
    #[serde(with = "abi")]
    pub xcrs: kvm_xcrs,
    /// x87, SSE, AVX and further vector state: an XSAVE area in the standard (not compacted)
    /// format, of at least 4096 bytes.
    #[serde(with = "abi::list")]
    pub xsave: Vec<u8>,
    /// Model-specific registers, in the order in which KVM lists them.
    pub msrs: Vec<Msr>,
    /// The indices of MSRs that KVM lists but refuses to read. They are not in
    /// [`msrs`](Self::msrs).
    pub unreadable_msrs: Vec<u32>,
    /// Pending and injected exceptions, interrupts and NMIs, the interrupt shadow, SMM.
    #[serde(with = "abi")]
    pub events: kvm_vcpu_events,
    /// The run state: running, halted or waiting for a startup IPI.
    #[serde(with = "abi")]
    pub mp_state: kvm_mp_state,
    /// The local APIC, if it is in the kernel.
    #[serde(with = "abi::option")]
    pub lapic: Option<kvm_lapic_state>,
    /// The CPUID entries. Empty if CPUID was never set.
    #[serde(with = "abi::list")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The rate of the time-stamp counter in kHz, if KVM knows it.
    pub tsc_khz: Option<u32>,
    /// The state of a hypervisor inside the guest (`KVM_GET_NESTED_STATE`), if this KVM can nest.
    #[serde(with = "nested")]
    pub nested: Option<Vec<u8>>,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The number of the register, the operand of `rdmsr`.
    pub index: u32,
    /// The value of the register.
    pub value: u64,
}

/// Serialization of the nested state as optional bytes.
mod nested {
    use super::abi;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Bytes(#[serde(with = "abi::list")] Vec<u8>);

    pub(super) fn serialize<S: Serializer>(
        state: &Option<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        state.clone().map(Bytes).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        Ok(Option::<Bytes>::deserialize(deserializer)?.map(|Bytes(state)| state))
    }
}
