//! What a guest's instructions cause.
#![cfg(all(hvf_fake, target_os = "linux", target_arch = "x86_64"))]
#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "the framework's functions, with variables of the test"
)]

mod support;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fake_hvf::*;
use support::*;

/// Each kind of store, to the address in x1, and by how much it changes x1. x2 and x3 have the
/// value in memory.
const STORES: [(&str, u32, u64); 15] = [
    ("str x0, [x1]", 0xf900_0020, 0),
    ("strb w0, [x1], #1", 0x3800_1420, 1),
    ("stp x0, x0, [x1], #16", 0xa881_0020, 16),
    ("str q0, [x1], #16", 0x3c81_0420, 16),
    ("stlr x0, [x1]", 0xc89f_fc20, 0),
    ("stnp x0, x0, [x1]", 0xa800_0020, 0),
    ("stp q0, q1, [x1], #32", 0xac81_0420, 32),
    ("st1 {v0.16b}, [x1]", 0x4c00_7020, 0),
    ("st4 {v0.2d-v3.2d}, [x1], #64", 0x4c9f_0c20, 64),
    ("cas x2, x0, [x1]", 0xc8a2_7c20, 0),
    ("casp x2, x3, x4, x5, [x1]", 0x4822_7c24, 0),
    ("swpal x0, x2, [x1]", 0xf8e0_8022, 0),
    ("stset x0, [x1]", 0xf820_303f, 0),
    ("ldadd x0, x2, [x1]", 0xf820_0022, 0),
    ("dc zva, x1", 0xd50b_7421, 0),
];

#[test]
fn each_store_faults_and_is_repeated_whole() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    for (number, (name, instruction, moved)) in (0..).zip(STORES) {
        let vcpu = Vcpu::new();
        let program = RAM + number * 16;
        let before = 0x1111_1111_1111_1111_u64;
        ram.write(program, &[instruction, hvc(1)]);
        ram.write(DATA, &[before as u32; 16]);
        ram.protect(DATA, PAGE, READ_AND_EXECUTE);
        vcpu.set(PC, program);
        vcpu.set(X0, 0x4242);
        vcpu.set(X1, DATA);
        vcpu.set(2, before);
        vcpu.set(3, before);
        for _ in 0..2 {
            let fault = vcpu.run();
            assert_eq!(
                fault.syndrome & !0x3f,
                DATA_ABORT << 26 | IL | WRITE,
                "{name}"
            );
            assert_eq!(fault.physical_address, DATA, "{name}");
            assert_eq!((vcpu.get(PC), vcpu.get(X1)), (program, DATA), "{name}");
            assert_eq!(ram.word(DATA), before, "{name}");
        }
        ram.protect(DATA, PAGE, ALL);
        assert_eq!(hypercall(vcpu.run()), 1, "{name}");
        assert_eq!(vcpu.get(X1), DATA + moved, "{name}");
        assert_ne!(ram.word(DATA), before, "{name}");
    }
}

#[test]
fn an_exclusive_store_faults_and_its_loop_ends() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    // ldxr x4, [x1]; stxr w5, x0, [x1]; cbnz w5, the load
    ram.write(RAM, &[0xc85f_7c24, 0xc805_7c20, 0x35ff_ffc5, hvc(1)]);
    ram.write(DATA, &[0x11; 16]);
    ram.protect(DATA, PAGE, READ_AND_EXECUTE);
    vcpu.set(PC, RAM);
    vcpu.set(X0, 0x4242);
    vcpu.set(X1, DATA);
    let fault = vcpu.run();
    let class_and_kind = fault.syndrome & !0x3f;
    assert_eq!(class_and_kind, DATA_ABORT << 26 | IL | WRITE);
    assert_eq!((fault.physical_address, vcpu.get(PC)), (DATA, RAM + 4));
    ram.protect(DATA, PAGE, ALL);
    assert_eq!(hypercall(vcpu.run()), 1);
    assert_eq!(ram.word(DATA), 0x4242);
}

#[test]
fn a_page_is_refused_by_translation_first() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[0xf900_0020, hvc(0)]); // str x0, [x1]
    ram.protect(DATA, PAGE, READ_AND_EXECUTE);
    vcpu.set(X1, DATA);
    let status = |fault: ExitException| fault.syndrome & 0x3f;
    assert_eq!(status(vcpu.run()), TRANSLATION);
    assert_eq!(status(vcpu.run()), PERMISSION);
}

#[test]
fn memory_that_is_not_mapped_faults() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[0xf940_0020, 0xf900_0020, 0xd61f_0020]); // ldr x0, [x1]; str; br x1
    let missing = RAM + SIZE;
    vcpu.set(X1, missing);
    let load = vcpu.run();
    assert_eq!(load.syndrome, DATA_ABORT << 26 | IL | TRANSLATION);
    assert_eq!((load.physical_address, vcpu.get(PC)), (missing, RAM));
    vcpu.set(PC, RAM + 4);
    let store = vcpu.run();
    assert_eq!(store.syndrome, DATA_ABORT << 26 | IL | WRITE | TRANSLATION);
    vcpu.set(PC, RAM + 8);
    let fetch = vcpu.run();
    assert_eq!(fetch.syndrome, INSTRUCTION_ABORT << 26 | IL | TRANSLATION);
    assert_eq!((fetch.physical_address, vcpu.get(PC)), (missing, missing));
    // Memory that is mapped later is there.
    let more = Ram::at(missing, ALL);
    more.write(missing, &[hvc(3)]);
    assert_eq!(hypercall(vcpu.run()), 3);
}

#[test]
fn reads_and_fetches_need_permission() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[0xf940_0020, 0xd61f_0020]); // ldr x0, [x1]; br x1
    vcpu.set(X1, DATA);
    ram.protect(DATA, PAGE, 0b100);
    assert_eq!(class(vcpu.run()), DATA_ABORT);
    ram.protect(DATA, PAGE, 0b011);
    assert_eq!(class(vcpu.run()), INSTRUCTION_ABORT);
    assert_eq!(vcpu.get(PC), DATA);
}

#[test]
fn no_store_lands_after_the_page_is_protected() {
    const ROUNDS: usize = 100;
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    // add x0, x0, #1; str x0, [x1]; b .-8
    ram.write(RAM, &[0x9100_0400, 0xf900_0020, 0x17ff_fffe]);
    thread::scope(|scope| {
        // A channel whose other end is gone ends a thread after a failure.
        let (run, runs) = mpsc::channel();
        let (faulted, faults) = mpsc::channel();
        scope.spawn(move || {
            let vcpu = Vcpu::new();
            vcpu.set(X1, DATA);
            while runs.recv().is_ok() {
                faulted.send(class(vcpu.run())).unwrap();
            }
        });
        for _ in 0..ROUNDS {
            let before = ram.word(DATA);
            run.send(()).unwrap();
            while ram.word(DATA) == before {
                thread::yield_now();
            }
            ram.protect(DATA, PAGE, READ_AND_EXECUTE);
            let last = ram.word(DATA);
            assert_eq!(faults.recv(), Ok(DATA_ABORT));
            assert_eq!(ram.word(DATA), last);
            ram.protect(DATA, PAGE, ALL);
        }
    });
}

#[test]
fn a_call_returns_after_it_or_at_it() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[hvc(9), 0xd400_0003 | 8 << 5, 0xd503_207f]); // hvc; smc; wfi
    assert_eq!(hypercall(vcpu.run()), 9);
    assert_eq!(vcpu.get(PC), RAM + 4);
    let monitor = vcpu.run();
    assert_eq!((class(monitor), monitor.syndrome & 0xffff), (0x17, 8));
    // The VMM skips these.
    assert_eq!(vcpu.get(PC), RAM + 4);
    vcpu.set(PC, RAM + 8);
    assert_eq!(class(vcpu.run()), 0x01);
    assert_eq!(vcpu.get(PC), RAM + 8);
}

#[test]
fn a_guest_handles_its_own_exceptions() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    let vectors = RAM + 0x800;
    ram.write(RAM, &[0xd400_0001 | 5 << 5, hvc(2), 0, 0xd420_0000]); // svc #5; hvc; udf; brk
    ram.write(vectors + 0x200, &[hvc(1), 0xd69f_03e0]); // hvc #1; eret
    vcpu.set_system(VBAR_EL1, vectors).unwrap();
    assert_eq!(hypercall(vcpu.run()), 1);
    assert_eq!(vcpu.system(ESR_EL1), Ok(0x15 << 26 | IL | 5));
    assert_eq!(vcpu.system(ELR_EL1), Ok(RAM + 4));
    assert_eq!(hypercall(vcpu.run()), 2);
    assert_eq!(hypercall(vcpu.run()), 1);
    assert_eq!(vcpu.system(ESR_EL1), Ok(IL));
    vcpu.set(PC, RAM + 12);
    assert_eq!(hypercall(vcpu.run()), 1);
    assert_eq!(vcpu.system(ESR_EL1), Ok(0x3c << 26 | IL));
    // Unless they are trapped.
    done(unsafe { hv_vcpu_set_trap_debug_exceptions(vcpu.id, true) }).unwrap();
    vcpu.set(PC, RAM + 12);
    assert_eq!(class(vcpu.run()), 0x3c);
    assert_eq!(vcpu.get(PC), RAM + 12);
}

const IRQ: u32 = 0;
const FIQ: u32 = 1;

#[test]
fn each_exit_clears_pending_interrupts() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[hvc(0)]);
    vcpu.set_pending(IRQ, true);
    vcpu.set_pending(FIQ, true);
    assert!(vcpu.pending(IRQ) && vcpu.pending(FIQ));
    // Both are masked.
    assert_eq!(hypercall(vcpu.run()), 0);
    assert!(!vcpu.pending(IRQ) && !vcpu.pending(FIQ));
    let unknown = unsafe { hv_vcpu_set_pending_interrupt(vcpu.id, 2, true) };
    assert_eq!(done(unknown), Err(Code::BAD_ARGUMENT));
}

#[test]
fn interrupts_are_taken_when_unmasked() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vectors = RAM + 0x800;
    ram.write(RAM, &[0xd503_201f, 0xd503_43ff, 0xd503_201f]); // nop; msr daifclr, #3; nop
    ram.write(vectors + 0x280, &[hvc(1)]);
    ram.write(vectors + 0x300, &[hvc(2)]);
    for (kind, vector) in [(IRQ, 1), (FIQ, 2)] {
        let vcpu = Vcpu::new();
        vcpu.set_system(VBAR_EL1, vectors).unwrap();
        vcpu.set_pending(kind, true);
        assert_eq!(hypercall(vcpu.run()), vector);
        assert_eq!(vcpu.system(ELR_EL1), Ok(RAM + 8));
        assert_eq!(vcpu.get(CPSR) & 0xc0, 0xc0); // masked in the handler
    }
}

#[test]
fn the_timer_exits_once_until_it_is_unmasked() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    let (control, compare) = (0xdf19, 0xdf1a);
    ram.write(RAM, &[hvc(0), 0x17ff_ffff]);
    vcpu.set_system(compare, 0).unwrap();
    vcpu.set_system(control, 1).unwrap();
    assert_eq!(vcpu.system(control), Ok(0b101)); // ISTATUS
    assert_eq!(vcpu.run_any().reason, 2);
    assert_eq!(hypercall(vcpu.run()), 0);
    done(unsafe { hv_vcpu_set_vtimer_mask(vcpu.id, false) }).unwrap();
    assert_eq!(vcpu.run_any().reason, 2);
    vcpu.set_system(control, 0b11).unwrap(); // IMASK
    done(unsafe { hv_vcpu_set_vtimer_mask(vcpu.id, false) }).unwrap();
    assert_eq!(hypercall(vcpu.run()), 0);
}

#[test]
fn replaced_code_runs_after_the_caches_are_invalidated() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    let code = |number: u32| [0xd280_0000 | number << 5, hvc(0)]; // mov x0, #number; hvc
    let run = || {
        vcpu.set(PC, RAM);
        assert_eq!(hypercall(vcpu.run()), 0);
        vcpu.get(X0)
    };
    ram.write(RAM, &code(1));
    assert_eq!(run(), 1);
    ram.write(RAM, &code(2));
    assert_eq!(run(), 1);
    sys_icache_invalidate(ram.host(), 4);
    assert_eq!(run(), 2);
    // By the guest: ic ivau, x1; hvc #3
    ram.write(DATA, &[0xd50b_7521, hvc(3)]);
    ram.write(RAM, &code(4));
    assert_eq!(run(), 2);
    vcpu.set(X1, RAM);
    vcpu.set(PC, DATA);
    assert_eq!(hypercall(vcpu.run()), 3);
    assert_eq!(run(), 4);
}

#[test]
fn a_run_is_canceled_while_it_runs_and_before() {
    let _turn = turn();
    let _machine = Machine::new();
    let ram = Ram::new();
    let vcpu = Vcpu::new();
    ram.write(RAM, &[0x1400_0000]); // b .
    vcpu.cancel();
    assert_eq!(vcpu.run_any().reason, 0);
    let id = vcpu.id;
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(5));
        done(unsafe { hv_vcpus_exit(&raw const id, 1) }).unwrap();
    });
    assert_eq!(vcpu.run_any().reason, 0);
    other.join().unwrap();
}
