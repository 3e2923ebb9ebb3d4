//! Capture and restore of registers on Macs and systems of several kinds.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

#[cfg(feature = "macos-26")]
mod support;

use fake_hvf::control::{self, System};
use fake_hvf::{SmeState, hv_vcpu_set_sme_state};
use hvf_backend::{
    CaptureError, Encoding, RestoreError, SysReg, UnsupportedFunction, Vcpu, VcpuState, Vm,
};
use rstest::rstest;

/// CPACR_EL1.SMEN, and FPEN.
const SME_ON: u64 = 0b11 << 24 | 0b11 << 20;
/// ID_AA64PFR1_EL1.SME.
const SME: u64 = 0xf << 24;
/// The longest vector length of the fake in bytes.
const LENGTH: usize = 64;

fn vcpu(sme: bool) -> Vcpu {
    let vm = Vm::options().sme(sme).create().unwrap();
    vm.create_vcpu().unwrap()
}

fn set_modes(vcpu: &Vcpu, streaming: bool, za: bool) {
    let modes = SmeState {
        streaming_sve_mode_enabled: streaming,
        za_storage_enabled: za,
    };
    #[allow(unsafe_code)]
    // SAFETY: the vCPU exists and is of this thread.
    let code = unsafe { hv_vcpu_set_sme_state(vcpu.id(), &raw const modes) };
    assert_eq!(code, 0);
}

fn value(state: &VcpuState, register: SysReg) -> Option<u64> {
    let encoding = Encoding(register as u16);
    let mut registers = state.system.iter();
    let found = registers.find(|saved| saved.register == encoding);
    found.map(|saved| saved.value)
}

#[rstest]
#[case::hidden(false, 0)]
#[case::kept(true, 0x200_0000)]
fn sme_is_hidden_unless_it_is_requested(#[case] sme: bool, #[case] visible: u64) {
    let _turn = control::turn();
    let vcpu = vcpu(sme);
    let features = vcpu.system_register(SysReg::ID_AA64PFR1_EL1).unwrap();
    assert_eq!(features & SME, visible);
    // The other features stay.
    assert_eq!(features & !SME, 0x2_0000_0001);
}

#[test]
fn a_vcpu_that_can_not_hide_sme_is_an_error() {
    let _turn = control::turn();
    let vm = Vm::new().unwrap();
    // The first call limits the address bits.
    control::fail("hv_vcpu_set_sys_reg", 2, fake_hvf::Code::DENIED);
    let error = vm.create_vcpu().unwrap_err();
    assert!(error.to_string().contains("hv_vcpu_set_sys_reg"), "{error}");
    assert!(!control::has_vcpu());
}

#[test]
fn a_guest_that_switched_sme_on_is_captured() {
    let _turn = control::turn();
    let vcpu = vcpu(true);
    vcpu.set_system_register(SysReg::CPACR_EL1, SME_ON).unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.sme, None);
    assert_eq!(value(&state, SysReg::SMCR_EL1), Some(0));
}

#[rstest]
fn sme_state_is_restored_with_fpsr(
    #[values(false, true)] streaming: bool,
    #[values(false, true)] za: bool,
) {
    let _turn = control::turn();
    let vcpu = vcpu(true);
    vcpu.set_system_register(SysReg::CPACR_EL1, SME_ON).unwrap();
    vcpu.set_system_register(SysReg::SMCR_EL1, 3).unwrap();
    vcpu.set_system_register(SysReg::TPIDR2_EL0, 0x77).unwrap();
    set_modes(&vcpu, streaming, za);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.sme.is_some(), streaming || za);
    if let Some(sme) = &mut state.sme {
        assert_eq!((sme.streaming.is_some(), sme.za.is_some()), (streaming, za));
        if let Some(streaming) = &mut sme.streaming {
            assert_eq!(streaming.z.len(), 32);
            for (number, z) in streaming.z.iter_mut().enumerate() {
                assert_eq!(z.len(), LENGTH);
                z.fill(number as u8 + 1);
            }
            for (number, p) in streaming.p.iter_mut().enumerate() {
                assert_eq!(p.len(), LENGTH / 8);
                p.fill(number as u8 + 0x40);
            }
        }
        if let Some(registers) = &mut sme.za {
            registers.za = (0..LENGTH * LENGTH).map(|n| n as u8).collect();
            registers.zt0.fill(0x5a);
        }
    }
    // In streaming mode, these are the lowest bytes of Z.
    for (number, q) in state.q.iter_mut().enumerate() {
        *q = u128::from_le_bytes([number as u8 + 1; 16]);
    }
    state.fpsr = 1;
    drop(vcpu);

    let vcpu = self::vcpu(true);
    let restored = state.restore(&vcpu, 0).unwrap();
    assert_eq!(restored.differing, []);
    let again = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(again.sme, state.sme);
    assert_eq!(again.q, state.q);
    assert_eq!(again.fpsr, 1);
    assert_eq!(value(&again, SysReg::SMCR_EL1), Some(3));
    assert_eq!(value(&again, SysReg::TPIDR2_EL0), Some(0x77));
}

#[test]
fn sme_state_of_another_vector_length_is_an_error() {
    let _turn = control::turn();
    let vcpu = vcpu(true);
    set_modes(&vcpu, true, true);
    let state = VcpuState::capture(&vcpu).unwrap();
    let restore = |change: fn(&mut hvf_backend::SmeState)| {
        let mut state = state.clone();
        change(state.sme.as_mut().unwrap());
        state.restore(&vcpu, 0).unwrap_err()
    };
    let error = restore(|sme| sme.streaming.as_mut().unwrap().z[3].truncate(32));
    let text = "the state has 32 bytes of Z3, but it has 64 bytes on this Mac";
    assert!(error.to_string().contains(text), "{error}");
    let error = restore(|sme| sme.za.as_mut().unwrap().zt0.push(0));
    let size = matches!(&error, RestoreError::SmeSize { register, .. } if register == "ZT0");
    assert!(size, "{error:?}");
    let error = restore(|sme| sme.streaming.as_mut().unwrap().p.clear());
    assert!(matches!(error, RestoreError::SmeRegisters), "{error:?}");
}

#[test]
fn sme_needs_macos_15_2_only_if_the_guest_uses_it() {
    let _turn = control::turn();
    control::set_system(System::MacOs15);
    let vcpu = vcpu(true);
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(value(&state, SysReg::SMCR_EL1), None);
    assert_eq!(value(&state, SysReg::ACTLR_EL1), Some(0));
    vcpu.set_system_register(SysReg::CPACR_EL1, SME_ON).unwrap();
    let error = VcpuState::capture(&vcpu).unwrap_err();
    let CaptureError::Sme(UnsupportedFunction {
        function, since, ..
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((function, since), ("hv_vcpu_get_sme_state", "15.2"));
}

#[test]
fn sme_state_on_an_older_system_is_an_error() {
    let _turn = control::turn();
    let vcpu = vcpu(true);
    set_modes(&vcpu, false, true);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    control::set_system(System::MacOs15);
    let error = state.restore(&vcpu, 0).unwrap_err();
    let text = "this macOS has no hv_sme_config_get_max_svl_bytes, which macOS 15.2 and later have";
    assert!(error.to_string().contains(text), "{error}");
    // Without the state, only registers that are not 0 are missing.
    state.sme = None;
    let _ = state.restore(&vcpu, 0).unwrap();
    let tpidr2 = Encoding(SysReg::TPIDR2_EL0 as u16);
    let mut registers = state.system.iter_mut();
    let saved = registers.find(|saved| saved.register == tpidr2).unwrap();
    saved.value = 1;
    let error = state.restore(&vcpu, 0).unwrap_err();
    let tpidr2 =
        matches!(&error, RestoreError::Register { register, .. } if register == "TPIDR2_EL0");
    assert!(tpidr2, "{error:?}");
}

#[test]
fn a_mac_without_sme_has_no_state_of_it() {
    let _turn = control::turn();
    control::set_sme(false);
    let vcpu = vcpu(true);
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(state.sme, None);
    assert_eq!(value(&state, SysReg::SMCR_EL1), None);
    assert_eq!(state.restore(&vcpu, 0).unwrap().differing, []);
}

/// Everything that needs no newer system works on the oldest.
#[rstest]
fn a_guest_is_saved_and_restored_on_every_system(
    #[values(
        System::MacOs12_1,
        System::MacOs13,
        System::MacOs15,
        System::MacOs15_2,
        System::MacOs26
    )]
    system: System,
) {
    let _turn = control::turn();
    control::set_system(system);
    let vcpu = vcpu(false);
    assert_eq!(vcpu.vm().address_bits(), 36);
    vcpu.set_system_register(SysReg::TPIDR_EL1, 5).unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    drop(vcpu);
    let vcpu = self::vcpu(false);
    assert_eq!(state.restore(&vcpu, 0).unwrap().differing, []);
    assert_eq!(vcpu.system_register(SysReg::TPIDR_EL1).unwrap(), 5);
}

#[test]
fn an_unknown_name_of_a_file_is_an_error_of_the_restore() {
    let _turn = control::turn();
    let vcpu = vcpu(false);
    let state = VcpuState::capture(&vcpu).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    assert!(text.contains("\"TPIDR_EL1\""), "{text}");
    let later = text.replace("\"TPIDR_EL1\"", "\"TPIDR9_EL1\"");
    let later: VcpuState = serde_json::from_str(&later).unwrap();
    let error = later.restore(&vcpu, 0).unwrap_err();
    let named = matches!(&error, RestoreError::UnknownName(name) if name == "TPIDR9_EL1");
    assert!(named, "{error:?}");
    let same: VcpuState = serde_json::from_str(&text).unwrap();
    assert_eq!(same.restore(&vcpu, 0).unwrap().differing, []);
}

#[test]
fn bits_that_no_cpu_keeps_are_not_compared() {
    let _turn = control::turn();
    let vcpu = vcpu(false);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    state.cpsr |= 1 << 40 | 1 << 19 | 1 << 5;
    state.fpsr |= 1 << 31 | 1 << 12 | 1 << 5;
    state.fpcr |= 1 << 31 | 0b11 << 20 | 1 << 4;
    let _ = state.restore(&vcpu, 0).unwrap();
}

#[test]
fn a_bit_that_this_cpu_does_not_keep_is_an_error() {
    let _turn = control::turn();
    let vcpu = vcpu(false);
    let mut state = VcpuState::capture(&vcpu).unwrap();
    // PSTATE.TCO, of a CPU with memory tagging.
    state.cpsr |= 1 << 25;
    let error = state.restore(&vcpu, 0).unwrap_err();
    let not_taken = matches!(&error, RestoreError::NotTaken { register, .. } if register == "CPSR");
    assert!(not_taken, "{error:?}");
}

#[test]
fn the_status_of_the_timer_is_not_compared() {
    let _turn = control::turn();
    let vcpu = vcpu(false);
    let compare = 1 << 60;
    let at_least_compare = 0_u64.wrapping_sub(compare);
    vcpu.set_system_register(SysReg::CNTV_CVAL_EL0, compare)
        .unwrap();
    vcpu.set_system_register(SysReg::CNTV_CTL_EL0, 1).unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    let _ = state.restore(&vcpu, at_least_compare).unwrap();
    let state = VcpuState::capture(&vcpu).unwrap();
    assert_eq!(value(&state, SysReg::CNTV_CTL_EL0), Some(0b101));
    // The counter is below the compare value.
    let restored = state.restore(&vcpu, 0).unwrap();
    assert_eq!(restored.differing, []);
    let control = vcpu.system_register(SysReg::CNTV_CTL_EL0).unwrap();
    assert_eq!(control, 1);
}

#[test]
fn a_vcpu_reports_the_address_bits_of_its_machine() {
    let _turn = control::turn();
    let range = |vcpu: &Vcpu| vcpu.system_register(SysReg::ID_AA64MMFR0_EL1).unwrap() & 0xf;
    let of_default = vcpu(false);
    assert_eq!(of_default.vm().address_bits(), 36);
    assert_eq!(range(&of_default), 1);
    drop(of_default);
    #[cfg(feature = "macos-13")]
    {
        let vm = Vm::options().address_bits(40).create().unwrap();
        assert_eq!(vm.address_bits(), 40);
        assert_eq!(range(&vm.create_vcpu().unwrap()), 2);
    }
}

#[cfg(feature = "macos-13")]
mod options {
    use hvf_backend::CreateVmError;

    use super::*;

    #[test]
    fn more_address_bits_than_the_mac_has_are_an_error() {
        let _turn = control::turn();
        control::set_max_address_bits(39);
        assert_eq!(Vm::max_address_bits().unwrap(), 39);
        let error = Vm::options().address_bits(40).create().unwrap_err();
        let bits = matches!(
            error,
            CreateVmError::AddressBits {
                requested: 40,
                max: 39
            }
        );
        assert!(bits, "{error:?}");
        let text = "addresses of at most 39 bits, but 40 were requested";
        assert!(error.to_string().contains(text), "{error}");
        assert!(Vm::options().address_bits(39).create().is_ok());
    }

    #[test]
    fn before_macos_13_a_machine_has_36_address_bits() {
        let _turn = control::turn();
        control::set_system(System::MacOs12_1);
        assert_eq!(Vm::max_address_bits().unwrap(), 36);
        let error = Vm::options().address_bits(40).create().unwrap_err();
        let bits = matches!(error, CreateVmError::AddressBits { max: 36, .. });
        assert!(bits, "{error:?}");
        assert_eq!(
            missing(&Vm::options().address_bits(36)),
            Some(("hv_vm_config_create", "13.0"))
        );
    }

    /// Returns the function that the system lacks for the options, and the first with it.
    fn missing(options: &hvf_backend::VmOptions) -> Option<(&'static str, &'static str)> {
        match options.create() {
            Ok(_) => None,
            Err(CreateVmError::UnsupportedFunction(missing)) => {
                Some((missing.function, missing.since))
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    #[cfg(feature = "macos-26")]
    #[test]
    fn an_option_of_a_newer_system_names_the_function() {
        let _turn = control::turn();
        control::set_system(System::MacOs13);
        let gic = Vm::options().gic(crate::support::GIC);
        assert_eq!(missing(&gic), Some(("hv_gic_config_create", "15.0")));
        let small_pages = Vm::options().small_pages(true);
        let function = ("hv_vm_config_set_ipa_granule", "26.0");
        assert_eq!(missing(&small_pages), Some(function));
        // Nothing is left of the machine.
        assert_eq!(control::objects(), 0);
        assert_eq!(missing(&Vm::options()), None);
        control::set_system(System::MacOs26);
        assert_eq!((missing(&gic), missing(&small_pages)), (None, None));
    }
}
