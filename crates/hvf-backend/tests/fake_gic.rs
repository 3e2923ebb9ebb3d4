//! The interrupt controller of a framework that can be examined.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(all(hvf_fake, feature = "macos-15"))]

mod support;

use fake_hvf::control;
use hvf_backend::{Encoding, GicError, GicState, RestoreError, VcpuState, Vm};

#[test]
fn a_machine_without_a_controller_has_no_state_of_it() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    let error = vm.capture_gic().unwrap_err();
    assert!(matches!(error, GicError::NoGic), "{error:?}");
    let error = vm.restore_gic(&GicState::new(vec![0])).unwrap_err();
    assert!(matches!(error, GicError::NoGic), "{error:?}");
}

#[test]
fn a_state_after_the_first_run_is_refused() {
    let _turn = control::turn();
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    let gic = vm.capture_gic().unwrap();
    vm.restore_gic(&gic).unwrap();
    vcpu.canceller().cancel().unwrap();
    vcpu.run().unwrap();
    let error = vm.restore_gic(&gic).unwrap_err();
    assert!(matches!(error, GicError::NotTaken(_)), "{error:?}");
    let error = vm.restore_gic(&GicState::new(vec![1; 8])).unwrap_err();
    assert!(matches!(error, GicError::NotTaken(_)), "{error:?}");
}

#[test]
fn a_state_without_controller_needs_none() {
    let _turn = control::turn();
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    state.gic_cpu.clear();
    let error = state.restore(&vcpu, 0).unwrap_err();
    let gic = matches!(error, RestoreError::Gic { captured: false });
    assert!(gic, "{error:?}");
}

#[test]
fn an_unknown_register_of_the_controller_is_an_error() {
    let _turn = control::turn();
    let vm = Vm::options().gic(support::GIC).create().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    state.gic_cpu[0].register = Encoding(1);
    let error = state.restore(&vcpu, 0).unwrap_err();
    let unknown = matches!(error, RestoreError::UnknownRegister(Encoding(1)));
    assert!(unknown, "{error:?}");
}
