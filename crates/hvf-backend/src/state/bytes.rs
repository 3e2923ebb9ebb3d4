//! The states as bytes that name what they are.

pub use guest_ram::StateError;
use guest_ram::StateFormat;

use super::{GicState, VcpuState};

const WRITTEN_BY: &str = "hvf-backend";

// The types of the states check the versions too.
const VCPU: StateFormat = StateFormat {
    magic: *b"RSHVCPU\0",
    version: 2,
    of: "a vCPU",
    written_by: WRITTEN_BY,
};
const GIC: StateFormat = StateFormat {
    magic: *b"RSHGIC\0\0",
    version: 1,
    of: "an interrupt controller",
    written_by: WRITTEN_BY,
};

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
        VCPU.encode(self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`]. A register that is unknown to this version is an error of
    /// `restore`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        VCPU.decode(bytes)
    }
}

impl GicState {
    /// Returns the state as bytes, for [`from_bytes`](Self::from_bytes) of this version or a later
    /// one. There is no checksum, as in the bytes of a [`VcpuState`].
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        GIC.encode(self)
    }

    /// Reads the bytes of [`to_bytes`](Self::to_bytes). They may come from anywhere: the memory
    /// that is allocated depends on their number, not on what they claim.
    ///
    /// # Errors
    /// Returns a [`StateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        GIC.decode(bytes)
    }
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
                written_by: WRITTEN_BY,
            };
            assert_eq!(error, Err(expected));
        }
    }

    #[test]
    fn bytes_that_are_cut_or_extended_are_damaged() {
        let bytes = vcpu().to_bytes();
        let damaged = Err(StateError::Damaged { of: "a vCPU" });
        for len in VCPU.magic.len()..bytes.len() {
            assert_eq!(VcpuState::from_bytes(&bytes[..len]), damaged, "{len}");
        }
        assert_eq!(VcpuState::from_bytes(&[&bytes[..], &[0]].concat()), damaged);
    }
}
