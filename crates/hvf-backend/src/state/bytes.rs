//! The states as bytes that name what they are.
//!
//! The bytes are a magic number of 8 bytes, and the state in the format of postcard. Its first
//! number is that of the format.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::{GicState, VcpuState};

const VCPU: [u8; 8] = *b"RSHVCPU\0";
const GIC: [u8; 8] = *b"RSHGIC\0\0";

/// The numbers of the formats, which the types of the states check too.
const VCPU_FORMAT: u16 = 2;
const GIC_FORMAT: u16 = 1;

impl VcpuState {
    /// Returns the state as bytes, for [`from_bytes`](Self::from_bytes) of this version or a later
    /// one: about 3 KiB, and the SME state. There is no checksum: store the bytes where damage is
    /// detected, such as in the metadata of a sealed or packed image.
    ///
    /// # Examples
    /// ```
    /// use hvf_backend::VcpuState;
    ///
    /// let mut state = VcpuState::default();
    /// state.pc = 0x8000_0000;
    /// assert_eq!(VcpuState::from_bytes(&state.to_bytes())?, state);
    /// # Ok::<(), hvf_backend::StateError>(())
    /// ```
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(VCPU, self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`]. A register that is unknown to this version is an error of
    /// `restore`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        decode(VCPU, VCPU_FORMAT, "a vCPU", bytes)
    }
}

impl GicState {
    /// Returns the state as bytes, for [`from_bytes`](Self::from_bytes) of this version or a later
    /// one. There is no checksum, as in the bytes of a [`VcpuState`].
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(GIC, self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        decode(GIC, GIC_FORMAT, "an interrupt controller", bytes)
    }
}

fn encode(magic: [u8; 8], state: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(state, magic.to_vec()).expect("a vector grows, and no field refuses")
}

fn decode<T: DeserializeOwned>(
    magic: [u8; 8],
    supported: u16,
    of: &'static str,
    bytes: &[u8],
) -> Result<T, StateError> {
    let bytes = bytes
        .strip_prefix(&magic)
        .ok_or(StateError::NotState { of })?;
    let damaged = |_| StateError::Damaged { of };
    let (found, _) = postcard::take_from_bytes::<u16>(bytes).map_err(damaged)?;
    if found != supported {
        return Err(StateError::Version { found, supported });
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
    /// The state has another number of the format.
    #[error(
        "the state is in format {found}, but this version of hvf-backend reads format {supported}: \
         use the version of hvf-backend that wrote it"
    )]
    Version {
        /// The number in the bytes.
        found: u16,
        /// The number that is supported.
        supported: u16,
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
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;
    use crate::state::{Encoding, SystemRegister};

    fn vcpu() -> VcpuState {
        VcpuState {
            pc: 0x8000_0000,
            system: vec![SystemRegister {
                register: Encoding(0xc684),
                value: 5,
            }],
            ..VcpuState::default()
        }
    }

    #[test]
    fn states_are_read_from_their_bytes() {
        assert_eq!(VcpuState::from_bytes(&vcpu().to_bytes()), Ok(vcpu()));
        let gic = GicState::new(vec![1, 2, 3]);
        assert_eq!(GicState::from_bytes(&gic.to_bytes()), Ok(gic));
    }

    #[test]
    fn bytes_of_another_state_are_refused() {
        let gic = GicState::new(Vec::new()).to_bytes();
        let error = VcpuState::from_bytes(&gic).unwrap_err();
        assert_eq!(error, StateError::NotState { of: "a vCPU" });
        let error = GicState::from_bytes(&vcpu().to_bytes()).unwrap_err();
        assert!(matches!(error, StateError::NotState { .. }), "{error:?}");
    }

    #[test]
    fn another_format_is_named() {
        for (mut bytes, supported) in [
            (vcpu().to_bytes(), 2),
            (GicState::new(Vec::new()).to_bytes(), 1),
        ] {
            bytes[8] = 9;
            let error = VcpuState::from_bytes(&bytes).map(drop);
            let error = error.or_else(|error| match error {
                StateError::NotState { .. } => GicState::from_bytes(&bytes).map(drop),
                other => Err(other),
            });
            let expected = StateError::Version {
                found: 9,
                supported,
            };
            assert_eq!(error, Err(expected));
        }
    }

    #[test]
    fn bytes_that_are_cut_or_extended_are_damaged() {
        let bytes = vcpu().to_bytes();
        let damaged = Err(StateError::Damaged { of: "a vCPU" });
        for len in VCPU.len()..bytes.len() {
            assert_eq!(VcpuState::from_bytes(&bytes[..len]), damaged, "{len}");
        }
        assert_eq!(VcpuState::from_bytes(&[&bytes[..], &[0]].concat()), damaged);
    }
}
