//! The bytes of a vCPU's and a virtual machine's state, also damaged ones.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use kvm_backend::{StateError, VcpuState, VmState};
use proptest::prelude::*;
use support::Guest;
use support::state::with_devices;
use test_machine::needs;

/// The state of format 1, without the magic number.
const GOLDEN: &[u8] = include_bytes!("golden/vcpu-state-1.postcard");

fn golden() -> VcpuState {
    postcard::from_bytes(GOLDEN).unwrap()
}

#[test]
fn bytes_are_a_magic_number_and_format_1() {
    let bytes = golden().to_bytes();
    assert_eq!(bytes, [b"RSKVCPU\0", GOLDEN].concat());
    assert_eq!(VcpuState::from_bytes(&bytes).unwrap(), golden());
}

#[test]
fn state_of_a_virtual_machine_is_read_back() {
    needs!(Kvm);
    let guest = Guest::with(with_devices);
    let state = VmState::capture(&guest.vm).unwrap();
    let bytes = state.to_bytes();
    assert_eq!(VmState::from_bytes(&bytes).unwrap(), state);
    // The types are not confused.
    let of_vcpu = VmState::from_bytes(&golden().to_bytes());
    assert!(matches!(
        of_vcpu,
        Err(StateError::NotState {
            of: "a virtual machine"
        })
    ));
    let of_vm = VcpuState::from_bytes(&bytes);
    assert!(matches!(of_vm, Err(StateError::NotState { of: "a vCPU" })));
}

#[test]
fn other_versions_lengths_and_sizes_are_typed_errors() {
    let good = golden().to_bytes();
    let mut newer = good.clone();
    newer[8] = 2;
    let error = VcpuState::from_bytes(&newer).unwrap_err();
    assert_eq!(
        error,
        StateError::Version {
            found: 2,
            supported: 1,
            written_by: "kvm-backend",
        }
    );
    assert!(
        error
            .to_string()
            .contains("use the version of kvm-backend that wrote it")
    );
    for damaged in [
        &[&good[..], &[0]].concat(),
        &good[..good.len() - 1],
        &good[..8],
    ] {
        let error = VcpuState::from_bytes(damaged).unwrap_err();
        assert_eq!(error, StateError::Damaged { of: "a vCPU" });
    }
    let error = VcpuState::from_bytes(b"").unwrap_err();
    assert_eq!(error, StateError::NotState { of: "a vCPU" });

    let invalid = |change: fn(&mut VcpuState)| {
        let mut state = golden();
        change(&mut state);
        VcpuState::from_bytes(&state.to_bytes())
    };
    let refused: [fn(&mut VcpuState); 4] = [
        |state| state.xsave.truncate(4095),
        |state| state.xsave.resize((1 << 20) + 1, 0),
        |state| state.cpuid = vec![Default::default(); 257],
        |state| state.nested = Some(vec![0; 1 << 16]),
    ];
    for change in refused {
        assert!(matches!(invalid(change), Err(StateError::Invalid { .. })));
    }
    assert!(invalid(|state| state.xsave.resize(1 << 20, 0)).is_ok());
    assert!(invalid(|state| state.cpuid = vec![Default::default(); 256]).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(300)
    })]

    /// Every truncation is an error, and every other damage is an error or another state.
    #[test]
    fn damaged_bytes_are_an_error_or_a_state(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = golden().to_bytes();
        prop_assert!(VcpuState::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(state) = VcpuState::from_bytes(&bytes) {
            prop_assert_eq!(VcpuState::from_bytes(&state.to_bytes()).unwrap(), state);
        }
    }

    #[test]
    fn any_bytes_are_an_error_or_a_state(rest in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(VcpuState::from_bytes(&rest).is_err());
        prop_assert!(VcpuState::from_bytes(&[b"RSKVCPU\0\x01", &rest[..]].concat()).is_err());
        if let Ok(state) = VmState::from_bytes(&[b"RSKVM\0\0\0\x01", &rest[..]].concat()) {
            prop_assert_eq!(VmState::from_bytes(&state.to_bytes()).unwrap(), state);
        }
    }
}
