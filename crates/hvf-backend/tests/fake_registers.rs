//! Which registers a capture has, and which errors name them.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(all(hvf_fake, feature = "macos-15"))]

mod support;

use fake_hvf::{Code, control};
use hvf_backend::{CaptureError, Encoding, GicError, VcpuState, Vm};

#[test]
fn all_breakpoints_and_watchpoints_are_captured() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    let has = |register| {
        let mut registers = state.system.iter();
        registers.any(|saved| saved.register == Encoding(register))
    };
    // The fake has 6 breakpoints and 4 watchpoints.
    for number in 0..16 {
        let [value, control] = [0b100, 0b101].map(|register| 0x8000 | number << 3 | register);
        assert_eq!((has(value), has(control)), (number < 6, number < 6));
        let [value, control] = [0b110, 0b111].map(|register| 0x8000 | number << 3 | register);
        assert_eq!((has(value), has(control)), (number < 4, number < 4));
    }
}

#[test]
fn an_unreadable_register_of_the_controller_is_named() {
    let _turn = control::turn();
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    control::fail("hv_gic_get_icc_reg", 1, Code::ERROR);
    let error = VcpuState::capture(&vcpu).unwrap_err();
    let CaptureError::Register { register, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(register.starts_with("ICC_"), "{register}");
    assert!(register.ends_with("_EL1"), "{register}");
}

#[test]
fn a_failed_reset_of_the_controller_is_an_error() {
    let _turn = control::turn();
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    control::fail("hv_gic_reset", 1, Code::ERROR);
    let error = vm.reset_gic().unwrap_err();
    assert!(matches!(error, GicError::Reset(_)), "{error:?}");
    vm.reset_gic().unwrap();
}
