//! Bytes that claim to be the state of a vCPU or of a virtual machine: refused, or a state that is
//! written and read again without a change.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Elsewhere the crate has no state of vCPUs.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    {
        use kvm_backend::{VcpuState, VmState};
        if let Ok(state) = VcpuState::from_bytes(bytes) {
            assert_eq!(VcpuState::from_bytes(&state.to_bytes()), Ok(state));
        }
        if let Ok(state) = VmState::from_bytes(bytes) {
            assert_eq!(VmState::from_bytes(&state.to_bytes()), Ok(state));
        }
    }
    let _ = bytes;
});
