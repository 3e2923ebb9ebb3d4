//! The life of a machine, and the state of a vCPU.

use hvf_backend::{
    CpuFeatures, Encoding, Register, RestoreError, SmeState, SysReg, VcpuState, Vm, ZaRegisters,
};

use crate::guest::{HYPERCALL, PROGRAM, hypercall, machine, start};
use crate::report::{Measured, NotPassed, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 5] = [
    Step {
        name: "lifecycle",
        shows: "a machine is created, runs, ends, and is created again",
        run: lifecycle,
    },
    Step {
        name: "registers",
        shows: "every register that is written reads back, and is captured as it was restored",
        run: registers,
    },
    Step {
        name: "clock",
        shows: "no time passes for the guest between capture and restore",
        run: clock,
    },
    Step {
        name: "features",
        shows: "CPU features are hidden by writing the identification registers",
        run: features,
    },
    Step {
        name: "sme",
        shows: "the state of the scalable matrix extension is restored",
        run: sme,
    },
];

fn lifecycle(measured: &mut Measured) -> Outcome {
    measured.add("address bits", Vm::max_address_bits()?);
    for _ in 0..2 {
        let (vm, stage2) = machine(&Vm::options(), &[HYPERCALL])?;
        measured.add("address bits by default", vm.address_bits());
        let mut vcpu = vm.create_vcpu()?;
        start(&vcpu, &[])?;
        ensure(hypercall(vcpu.run()?)? == 0, || {
            "another hypercall".to_owned()
        })?;
        ensure(crate::guest::pc(&vcpu)? == PROGRAM + 4, || {
            "the program counter is not behind the hypercall".to_owned()
        })?;
        // In an order in which each has to keep the next.
        drop(vm);
        drop(stage2);
        drop(vcpu);
    }
    Ok(())
}

fn registers(measured: &mut Measured) -> Outcome {
    let vm = Vm::new()?;
    let vcpu = vm.create_vcpu()?;
    start(&vcpu, &[])?;
    let mut state = VcpuState::capture(&vcpu)?;
    for (number, x) in (1..).zip(&mut state.x) {
        *x = number << 32 | number;
    }
    for (number, q) in (1..).zip(&mut state.q) {
        *q = number << 96 | number;
    }
    for saved in &mut state.system {
        if saved.register == Encoding(SysReg::TPIDR_EL1 as u16) {
            saved.value = 0x1234_5678;
        }
    }
    drop(vcpu);
    let vcpu = vm.create_vcpu()?;
    let restored = state.restore(&vcpu, state.vtimer.resuming_offset())?;
    for saved in &restored.differing {
        measured.add_hex(format!("not taken: {}", saved.register), saved.value);
    }
    let again = VcpuState::capture(&vcpu)?;
    measured.add("system registers", again.system.len());
    let same = (again.x, again.q) == (state.x, state.q) && again.system == state.system;
    ensure(same || !restored.differing.is_empty(), || {
        "the captured state differs from the restored one".to_owned()
    })?;
    ensure(restored.differing.is_empty(), || {
        "registers were not taken".to_owned()
    })
}

fn clock(measured: &mut Measured) -> Outcome {
    // mrs x0, cntvct_el0; mrs x1, cntfrq_el0
    let (vm, _stage2) = machine(&Vm::options(), &[0xd53b_e040, 0xd53b_e001, HYPERCALL])?;
    let mut vcpu = vm.create_vcpu()?;
    start(&vcpu, &[])?;
    let mut state = VcpuState::capture(&vcpu)?;
    state.vtimer.counter = 1 << 50; // far from the host's
    let _ = state.restore(&vcpu, state.vtimer.resuming_offset())?;
    hypercall(vcpu.run()?)?;
    let passed = vcpu.register(Register::X0)?.wrapping_sub(1 << 50);
    let frequency = vcpu.register(Register::X1)?;
    measured.add("ticks a second", frequency);
    measured.add("ticks that passed", passed);
    ensure(passed < 60 * frequency, || {
        "the guest's counter jumped".to_owned()
    })
}

fn features(measured: &mut Measured) -> Outcome {
    let own = Vm::new()?.create_vcpu()?.cpu_features()?;
    let mut taken = 0;
    for (register, value) in own.registers() {
        measured.add_hex(register.to_string(), value);
        // The highest field that is not 0.
        let Some(highest) = value.checked_ilog2() else {
            continue;
        };
        let less = value & !(0xf << (highest & !3));
        let others = own.registers().map(|(other, own)| match other == register {
            true => (other, less),
            false => (other, own),
        });
        let less = CpuFeatures::new(others);
        let vm = Vm::options().cpu_features(less).create()?;
        match vm.create_vcpu() {
            Ok(_) => taken += 1,
            Err(error) => measured.add(format!("{register} is not hidden"), error.to_string()),
        }
    }
    measured.add("registers that hide features", taken);
    ensure(taken > 0, || "no feature can be hidden".to_owned())
}

fn sme(measured: &mut Measured) -> Outcome {
    let vm = Vm::options().sme(true).create()?;
    let vcpu = vm.create_vcpu()?;
    let features = vcpu.system_register(SysReg::ID_AA64PFR1_EL1)?;
    measured.add_hex("ID_AA64PFR1_EL1", features);
    if features >> 24 & 0xf == 0 {
        let reason = "this chip has no SME for guests".to_owned();
        return Err(NotPassed::Unsupported(reason));
    }
    vcpu.set_system_register(SysReg::CPACR_EL1, 0b11 << 24 | 0b11 << 20)?;
    let mut state = VcpuState::capture(&vcpu)?;
    let with = |za: usize| {
        let mut sme = SmeState::default();
        sme.za = Some(ZaRegisters {
            za: (0..za).map(|n| n as u8).collect(),
            zt0: vec![7; 64],
        });
        sme
    };
    // The error for a wrong size has the right one.
    state.sme = Some(with(1));
    let size = match state.restore(&vcpu, 0) {
        Err(RestoreError::SmeSize { size, .. }) => size,
        other => {
            let reason = format!("ZA of one byte is not an error of its size: {other:?}");
            return Err(NotPassed::Failed(reason));
        }
    };
    measured.add("bytes of ZA", size);
    state.sme = Some(with(size));
    drop(vcpu);
    let vcpu = vm.create_vcpu()?;
    let _ = state.restore(&vcpu, 0)?;
    let again = VcpuState::capture(&vcpu)?;
    ensure(again.sme == state.sme, || {
        "ZA and ZT0 differ from the restored ones".to_owned()
    })
}
