//! The states as bytes that name what they are.

pub use guest_ram::StateError;
use guest_ram::StateFormat;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::nested::KvmNestedStateBuffer;

use super::vcpu_state::VcpuState;
use super::vm_state::VmState;

const VCPU: StateFormat = StateFormat {
    magic: *b"RSKVCPU\0",
    version: 1,
    of: "a vCPU",
    written_by: "kvm-backend",
};
const VM: StateFormat = StateFormat {
    magic: *b"RSKVM\0\0\0",
    of: "a virtual machine",
    ..VCPU
};

/// The sizes of an XSAVE area in bytes: the part that every processor has, and more than any
/// processor has (11 KiB with AMX).
const XSAVE: std::ops::RangeInclusive<usize> = 4096..=1 << 20;

impl VcpuState {
    /// Returns the state as bytes, for [`from_bytes`](Self::from_bytes) of this version or a later
    /// one: 8 KiB and more. There is no checksum: store the bytes where damage is detected, such as
    /// in the metadata of a sealed or packed image.
    ///
    /// # Examples
    /// ```no_run
    /// use kvm_backend::VcpuState;
    ///
    /// # fn example(state: VcpuState) -> Result<(), Box<dyn std::error::Error>> {
    /// std::fs::write("vcpu-0.state", state.to_bytes())?;
    /// let state = VcpuState::from_bytes(&std::fs::read("vcpu-0.state")?)?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        VCPU.encode(self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self = VCPU.decode(bytes)?;
        let valid = |part, valid| match valid {
            true => Ok(()),
            false => Err(StateError::Invalid { part }),
        };
        valid("XSAVE area", XSAVE.contains(&state.xsave.len()))?;
        valid("list of CPUID", state.cpuid.len() <= KVM_MAX_CPUID_ENTRIES)?;
        let nested = state.nested.as_ref().map_or(0, Vec::len);
        valid("nested state", nested <= size_of::<KvmNestedStateBuffer>())?;
        Ok(state)
    }
}

impl VmState {
    /// Returns the state as bytes, for [`from_bytes`](Self::from_bytes) of this version or a later
    /// one. There is no checksum, as in the bytes of a [`VcpuState`].
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        VM.encode(self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        VM.decode(bytes)
    }
}
