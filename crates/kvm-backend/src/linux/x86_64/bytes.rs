//! The states as bytes that name what they are.
//!
//! The bytes are a magic number of 8 bytes, and the state in the format of postcard. Its first
//! number is the version of the format.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::nested::KvmNestedStateBuffer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::vcpu_state::VcpuState;
use super::vm_state::VmState;

const VCPU: [u8; 8] = *b"RSKVCPU\0";
const VM: [u8; 8] = *b"RSKVM\0\0\0";

/// The version of both formats.
const VERSION: u32 = 1;

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
        encode(VCPU, self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let state: Self = decode(VCPU, "a vCPU", bytes)?;
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
        encode(VM, self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        decode(VM, "a virtual machine", bytes)
    }
}

fn encode(magic: [u8; 8], state: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(state, magic.to_vec()).expect("a vector grows, and no field refuses")
}

fn decode<T: DeserializeOwned>(
    magic: [u8; 8],
    of: &'static str,
    bytes: &[u8],
) -> Result<T, StateError> {
    let bytes = bytes
        .strip_prefix(&magic)
        .ok_or(StateError::NotState { of })?;
    let damaged = |_| StateError::Damaged { of };
    let (version, _) = postcard::take_from_bytes::<u32>(bytes).map_err(damaged)?;
    if version != VERSION {
        return Err(StateError::Version {
            found: version,
            supported: VERSION,
        });
    }
    match postcard::take_from_bytes(bytes).map_err(damaged)? {
        (state, []) => Ok(state),
        _ => Err(StateError::Damaged { of }),
    }
}

/// An error of reading a state from bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes do not begin as the state does.
    #[error("the bytes are not the state of {of}: pass what `to_bytes` of the same type returned")]
    NotState {
        /// What the state is of.
        of: &'static str,
    },
    /// The state has another version of the format.
    #[error(
        "the state is in format {found}, but this version of kvm-backend reads format {supported}: \
         use the version of kvm-backend that wrote it"
    )]
    Version {
        /// The version of the bytes.
        found: u32,
        /// The version that is supported.
        supported: u32,
    },
    /// The bytes are truncated, too many, or not a state.
    #[error(
        "the state of {of} is damaged or truncated: restore it from another copy, or use an older \
         snapshot"
    )]
    Damaged {
        /// What the state is of.
        of: &'static str,
    },
    /// A part of the state is larger or smaller than any that KVM has.
    #[error("the {part} has a size that no vCPU has: the state was not captured from one")]
    Invalid {
        /// The part of the state.
        part: &'static str,
    },
}
