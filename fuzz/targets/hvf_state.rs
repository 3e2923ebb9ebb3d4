//! Bytes that claim to be the state of a vCPU or of an interrupt controller of Apple's framework:
//! refused, or a state that is written and read again without a change.
#![no_main]

use hvf_backend::{GicState, VcpuState};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(state) = VcpuState::from_bytes(bytes) {
        assert_eq!(VcpuState::from_bytes(&state.to_bytes()), Ok(state));
    }
    if let Ok(state) = GicState::from_bytes(bytes) {
        assert_eq!(GicState::from_bytes(&state.to_bytes()), Ok(state));
    }
});
