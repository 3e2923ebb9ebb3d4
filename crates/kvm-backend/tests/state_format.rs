//! The serialized format of a vCPU's state.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use kvm_backend::{Msr, VcpuState};
use support::CODE;
use support::state::MSRS;

#[test]
fn damaged_state_and_other_formats_are_errors() {
    let json = include_str!("golden/vcpu-state-1.json");
    let good: serde_json::Value = serde_json::from_str(json).unwrap();
    let read = |change: fn(&mut serde_json::Value)| {
        let mut changed = good.clone();
        change(&mut changed);
        serde_json::from_str::<VcpuState>(&changed.to_string())
    };
    assert!(read(|_| ()).is_ok());
    for (change, says) in [
        (
            (|state| state["format"] = 2.into()) as fn(&mut serde_json::Value),
            "format 2, but this version of kvm-backend reads format 1",
        ),
        (
            |state| cut(&mut state["regs"], 2),
            "expected exactly 144 bytes",
        ),
        (|state| cut(&mut state["regs"], 1), "hexadecimal digits"),
        (
            |state| cut(&mut state["cpuid"], 2),
            "expected a multiple of 40 bytes",
        ),
        (|state| state["regs"] = "zz".into(), "hexadecimal digits"),
    ] {
        let error = read(change).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    let mut binary = include_bytes!("golden/vcpu-state-1.postcard").to_vec();
    assert!(postcard::from_bytes::<VcpuState>(&binary[..binary.len() - 1]).is_err());
    binary[0] = 2; // The format is the first number.
    assert!(postcard::from_bytes::<VcpuState>(&binary).is_err());
}

fn cut(digits: &mut serde_json::Value, count: usize) {
    let text = digits.as_str().unwrap();
    *digits = text[..text.len() - count].into();
}

/// The files were written when format 1 was the newest. Their state is that of `full_of_state`,
/// with devices.
#[test]
fn format_1_stays_readable() {
    let json: VcpuState = serde_json::from_str(include_str!("golden/vcpu-state-1.json")).unwrap();
    let binary: VcpuState =
        postcard::from_bytes(include_bytes!("golden/vcpu-state-1.postcard")).unwrap();
    assert_eq!(json, binary);
    assert_eq!(json.regs.r15, 0x0123_4567_89ab_cdef);
    assert!((CODE..CODE + 0x100).contains(&json.regs.rip));
    assert_eq!(json.debug_regs.db[1], 0x5000);
    assert_eq!(json.xsave[160..176], (1..=16).collect::<Vec<u8>>()); // XMM0
    assert!(json.lapic.is_some() && json.cpuid.len() > 10);
    for (index, value) in MSRS {
        assert!(json.msrs.contains(&Msr { index, value }));
    }
}
