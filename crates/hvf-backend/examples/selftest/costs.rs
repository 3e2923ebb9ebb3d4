//! What the calls of the framework cost on this Mac. Nothing here can fail by being slow.

use std::time::{Duration, Instant};

use dirty_bitmap::{Policy, WriteProtection};
use hvf_backend::{PAGE_SIZE, Stage2, VcpuState, Vm};

use crate::guest::{DATA, HYPERCALL, SIZE, hypercall, machine, run_tracked, start};
use crate::report::{Measured, Outcome, Step, ensure};

pub(crate) const STEPS: [Step; 1] = [Step {
    name: "costs",
    shows: "what faults, exits, protection and states cost",
    run: costs,
}];

const PAGES: u64 = 512;
const EXITS: u32 = 2000;
const ROUNDS: u32 = 10;

fn micros(time: Duration, count: u32) -> f64 {
    let micros = time.as_secs_f64() * 1e6 / f64::from(count);
    (micros * 100.0).round() / 100.0
}

fn costs(measured: &mut Measured) -> Outcome {
    exits(measured)?;
    // page: str x0, [x1]; add x1, x1, x2; subs x3, x3, #1; b.ne page; hvc #0
    let code = [
        0xf900_0020,
        0x8b02_0021,
        0xf100_0463,
        0x54ff_ffa1,
        HYPERCALL,
    ];
    let (vm, stage2) = machine(&Vm::options(), &code)?;
    protection(measured, &stage2)?;
    let tracker = stage2.track(Policy::Pages)?;
    tracker.checkpoint()?.release()?;
    let mut vcpu = vm.create_vcpu()?;
    start(&vcpu, &[1, DATA, PAGE_SIZE, PAGES])?;
    let began = Instant::now();
    let faults = run_tracked(&mut vcpu, &tracker)?;
    measured.add(
        "us for each write fault",
        micros(began.elapsed(), PAGES as u32),
    );
    ensure(faults == PAGES, || {
        format!("{faults} faults of {PAGES} pages")
    })
}

fn exits(measured: &mut Measured) -> Outcome {
    let (vm, _stage2) = machine(&Vm::options(), &[HYPERCALL, 0x17ff_ffff])?; // b .-4
    let mut vcpu = vm.create_vcpu()?;
    start(&vcpu, &[])?;
    let began = Instant::now();
    for _ in 0..EXITS {
        hypercall(vcpu.run()?)?;
    }
    measured.add("us for each run and exit", micros(began.elapsed(), EXITS));
    let began = Instant::now();
    let state = VcpuState::capture(&vcpu)?;
    measured.add("us to capture a vCPU", micros(began.elapsed(), 1));
    drop(vcpu);
    let vcpu = vm.create_vcpu()?;
    let began = Instant::now();
    let _ = state.restore(&vcpu, 0)?;
    measured.add("us to restore a vCPU", micros(began.elapsed(), 1));
    Ok(())
}

fn protection(measured: &mut Measured, stage2: &Stage2) -> Outcome {
    let (mut protect, mut unprotect) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        stage2.protect(0..SIZE)?;
        protect += began.elapsed();
        let began = Instant::now();
        stage2.unprotect(0..SIZE)?;
        unprotect += began.elapsed();
    }
    let mib = SIZE >> 20;
    measured.add(format!("us to protect {mib} MiB"), micros(protect, ROUNDS));
    measured.add(
        format!("us to unprotect {mib} MiB"),
        micros(unprotect, ROUNDS),
    );
    Ok(())
}
