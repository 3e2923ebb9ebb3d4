//! Guests that move between Macs with other CPU features.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

use fake_hvf::control;
use hvf_backend::{CpuFeatures, CreateVcpuError, Encoding, RestoreError, SysReg, VcpuState, Vm};

const ISAR0: Encoding = Encoding(SysReg::ID_AA64ISAR0_EL1 as u16);
const ISAR1: Encoding = Encoding(SysReg::ID_AA64ISAR1_EL1 as u16);

/// SHA2 1, CRC32 1, ATOMIC 2
const OLD_ISAR0: u64 = 0x21_1000;
/// SHA2 2, CRC32 1, ATOMIC 3, and RNDR 1
const NEW_ISAR0: u64 = 0x1000_0000_0031_2000;

fn set(register: Encoding, value: u64) {
    control::set_identification(register.0, value);
}

/// Makes vCPUs those of an older Mac. Returns their features.
fn old_mac() -> CpuFeatures {
    set(ISAR0, OLD_ISAR0);
    set(ISAR1, 0x0000_0011_0021_1000);
    features()
}

/// Makes vCPUs those of a newer Mac. Returns their features.
fn new_mac() -> CpuFeatures {
    set(ISAR0, NEW_ISAR0);
    set(ISAR1, 0x0011_1111_0021_1500);
    features()
}

fn features() -> CpuFeatures {
    let vm = Vm::new().unwrap();
    vm.create_vcpu().unwrap().cpu_features().unwrap()
}

#[test]
fn a_guest_with_common_features_moves_both_ways() {
    let _turn = control::turn();
    let both = old_mac().intersect(&new_mac());
    assert_eq!(both.value(ISAR0), Some(OLD_ISAR0));
    let capture = || {
        let vm = Vm::options().cpu_features(both.clone()).create().unwrap();
        let vcpu = vm.create_vcpu().unwrap();
        assert_eq!(vcpu.cpu_features().unwrap(), both);
        VcpuState::capture(&vcpu).unwrap()
    };
    let restore = |state: &VcpuState| {
        let vcpu = Vm::new().unwrap().create_vcpu().unwrap();
        let restored = state.restore(&vcpu, 0).unwrap();
        assert_eq!(restored.differing, []);
        // The guest sees what it saw before.
        assert_eq!(vcpu.cpu_features().unwrap(), both);
    };
    let of_new = capture();
    old_mac();
    restore(&of_new);
    let of_old = capture();
    new_mac();
    restore(&of_old);
}

#[test]
fn restoring_on_a_cpu_with_less_names_the_fields() {
    let _turn = control::turn();
    new_mac();
    let vcpu = Vm::new().unwrap().create_vcpu().unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    drop(vcpu);
    old_mac();
    let vcpu = Vm::new().unwrap().create_vcpu().unwrap();
    let error = state.restore(&vcpu, 0).unwrap_err();
    let RestoreError::MissingFeatures { missing } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(missing[0].register, ISAR0);
    for name in [
        "ID_AA64ISAR0_EL1.SHA2 is 1 and not 2",
        "ID_AA64ISAR0_EL1.Atomic is 2 and not 3",
        "ID_AA64ISAR0_EL1.RNDR is 0 and not 1",
        "ID_AA64ISAR1_EL1.API is 0 and not 5",
    ] {
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
    // Nothing was written.
    assert_eq!(
        vcpu.system_register(SysReg::ID_AA64ISAR0_EL1),
        Ok(OLD_ISAR0)
    );
}

#[test]
fn features_that_the_mac_lacks_are_an_error() {
    let _turn = control::turn();
    let newer = new_mac();
    old_mac();
    let vm = Vm::options().cpu_features(newer).create().unwrap();
    let error = vm.create_vcpu().unwrap_err();
    let missing = matches!(error, CreateVcpuError::MissingFeatures { .. });
    assert!(missing, "{error:?}");
    assert!(error.to_string().contains("RNDR is 0 and not 1"), "{error}");
    assert!(!control::has_vcpu());
}

#[test]
fn features_are_hidden_on_a_system_without_later_registers() {
    let _turn = control::turn();
    let with_sme = features();
    control::set_system(fake_hvf::control::System::MacOs12_1);
    let both = with_sme.intersect(&features());
    let zfr0 = Encoding(SysReg::ID_AA64ZFR0_EL1 as u16);
    assert_eq!(both.value(zfr0), Some(0));
    let vm = Vm::options().cpu_features(both).create().unwrap();
    let vcpu = vm.create_vcpu().unwrap();
    assert_eq!(vcpu.cpu_features().unwrap().value(zfr0), None);
}

#[test]
fn a_feature_that_stays_visible_is_an_error() {
    let _turn = control::turn();
    let both = old_mac().intersect(&new_mac());
    control::keep(ISAR0.0);
    let vm = Vm::options().cpu_features(both.clone()).create().unwrap();
    let error = vm.create_vcpu().unwrap_err();
    let kept = matches!(
        error,
        CreateVcpuError::NotTaken {
            register: ISAR0,
            written: OLD_ISAR0,
            found: NEW_ISAR0,
        }
    );
    assert!(kept, "{error:?}");
    assert!(!control::has_vcpu());
    drop(vm);
    // A restore reports the register.
    let vcpu = Vm::new().unwrap().create_vcpu().unwrap();
    let mut state = VcpuState::capture(&vcpu).unwrap();
    for saved in &mut state.system {
        if saved.register == ISAR0 {
            saved.value = OLD_ISAR0;
        }
    }
    let restored = state.restore(&vcpu, 0).unwrap();
    assert_eq!(restored.differing.len(), 1);
    assert_eq!(restored.differing[0].register, ISAR0);
}
