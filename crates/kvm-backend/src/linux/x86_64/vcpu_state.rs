//! What a vCPU holds, as data.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::abi::{self, FormatVersion};

/// The state of one vCPU: what a new one must be given so that the guest goes on as if nothing had happened.
///
/// [Captured](Self::capture) from a vCPU that is [paused](crate::Vcpus::pause), [restored](Self::restore) into one that has never run. In between it is data, for
/// any serde format: kernel structures stand in it byte for byte (as hexadecimal digits in readable formats), and the
/// number of the format stands first, so that state of another format is an error and not misread.
///
/// # Examples
/// ```no_run
/// use kvm_backend::VcpuState;
/// # fn example(kvm: &kvm_ioctls::Kvm, vcpus: &kvm_backend::Vcpus, vcpu: &kvm_backend::Vcpu,
/// #     new_vm: &kvm_ioctls::VmFd, new_vcpu: &kvm_ioctls::VcpuFd) -> Result<(), Box<dyn std::error::Error>> {
/// let paused = vcpus.pause()?; // after each has completed its I/O
/// let state = VcpuState::capture(kvm, &paused, vcpu)?;
/// let bytes = postcard::to_stdvec(&state)?;
///
/// let state: VcpuState = postcard::from_bytes(&bytes)?; // the RAM is restored already
/// let restored = state.restore(new_vm, new_vcpu)?;
/// for msr in &restored.differing_msrs {
///     eprintln!("MSR {:#x} is not {:#x}, as it was", msr.index, msr.value);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
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
    /// Extended control registers: XCR0 says which vector state is on.
    #[serde(with = "abi")]
    pub xcrs: kvm_xcrs,
    /// x87, SSE, AVX and further vector state: an XSAVE area in the standard (not compacted) format, at least 4096 bytes.
    #[serde(with = "abi::list")]
    pub xsave: Vec<u8>,
    /// Model-specific registers, in the order in which KVM lists them.
    pub msrs: Vec<Msr>,
    /// MSRs that KVM lists and would not read. They are not in [`msrs`](Self::msrs).
    pub unreadable_msrs: Vec<u32>,
    /// Pending and injected exceptions, interrupts and NMIs, the interrupt shadow, SMM.
    #[serde(with = "abi")]
    pub events: kvm_vcpu_events,
    /// Whether it runs, halts or waits for a startup IPI.
    #[serde(with = "abi")]
    pub mp_state: kvm_mp_state,
    /// The local APIC, where it is in the kernel.
    #[serde(with = "abi::option")]
    pub lapic: Option<kvm_lapic_state>,
    /// What CPUID answers. Empty where it was never set.
    #[serde(with = "abi::list")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The rate of the time-stamp counter in kHz, where KVM knows it.
    pub tsc_khz: Option<u32>,
    /// A hypervisor's state inside the guest (`KVM_GET_NESTED_STATE`), where this KVM can nest.
    #[serde(with = "nested")]
    pub nested: Option<Vec<u8>>,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number, as `rdmsr` takes it.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The nested state: bytes that may be missing.
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
