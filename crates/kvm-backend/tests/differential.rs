//! Compares random guests with a naive copy of their RAM, and with themselves in another virtual
//! machine.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use dirty_bitmap::DirtyBitmap;
use kvm_backend::{DirtyLog, GuestRam, RamSlots, Reprotect, Vcpu, VcpuState, long_mode};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use support::state::msrs;
use support::{CODE, Guest, HIGH, INPUT, PAGE, Program, STACK, TABLES};
use test_machine::{needs, rounds};

const REGION: u64 = 2 << 20;
const VCPUS: u64 = 3;
/// The size of a vCPU's list of addresses to write to. Each vCPU also has its own stack.
const LIST: u64 = 0x2000;
/// The first address that the programs write to, after their own memory. They also write to the
/// high region.
const FIRST_TARGET: u64 = 0x30000;

/// Pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn address(&mut self) -> u64 {
        let word = match self.below(2) {
            0 => FIRST_TARGET + self.below(REGION - FIRST_TARGET),
            _ => HIGH + self.below(REGION),
        };
        word - word % 8
    }
}

fn start_of(vcpu: u64) -> long_mode::Start {
    long_mode::Start {
        entry: CODE,
        stack: STACK + vcpu * 256,
        page_tables: TABLES,
    }
}

/// Runs a program that writes to random addresses, and waits at the barrier during a pause.
fn write_at_random(
    mut vcpu: Vcpu,
    number: u64,
    ram: &GuestRam,
    pause: &AtomicBool,
    end: &AtomicBool,
    at_pause: &Barrier,
    mut random: Random,
) {
    let list = INPUT + number * LIST;
    loop {
        let count = 1 + random.below(40);
        let addresses = (0..count).flat_map(|_| random.address().to_le_bytes());
        ram.write(list, &addresses.collect::<Vec<u8>>()).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx) = (CODE, list, count);
        vcpu.set_regs(&regs).unwrap();
        support::run(&mut vcpu);
        if pause.load(Ordering::Acquire) {
            vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
            at_pause.wait();
            at_pause.wait();
            if end.load(Ordering::Acquire) {
                return;
            }
        }
    }
}

fn copy<K>(ram: &GuestRam, pages: &DirtyBitmap<K>, image: &mut [u8]) {
    for run in pages.runs() {
        let bytes = &mut image[run.start as usize..run.end as usize];
        ram.read_at(run.start, bytes).unwrap();
    }
}

fn whole(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.layout().ram_size() as usize];
    ram.read_at(0, &mut bytes).unwrap();
    bytes
}

fn assert_same(image: &[u8], ram: &[u8], round: usize) {
    let differs = image.iter().zip(ram).position(|(a, b)| a != b);
    assert_eq!(differs, None, "offset of a lost page in round {round}");
}

#[rstest]
fn image_of_every_pause_of_several_vcpus_equals_the_ram(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let guest = Guest::with_ram([(0, REGION), (HIGH, REGION)], |_| ());
    guest.boot(Program::Touch);
    let Guest {
        vcpu,
        vcpus,
        slots,
        ram,
        vm,
        kvm,
    } = guest;
    let bitmap = Arc::clone(ram.dirty_bitmap());
    let mut all = vec![vcpu];
    for number in 1..VCPUS {
        let vcpu = vcpus.create(&vm, number).unwrap();
        long_mode::boot(&kvm, &ram, &vcpu, &start_of(number)).unwrap();
        all.push(vcpu);
    }
    let start = || {
        DirtyLog::options()
            .reprotect(reprotect)
            .start(&slots)
            .unwrap()
    };
    let mut log = Some(start());
    let mut image = vec![0xee; 2 * REGION as usize];
    let (pause, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let at_pause = Barrier::new(VCPUS as usize + 1);
    let rounds = rounds(12, 1000);
    thread::scope(|scope| {
        for (vcpu, number) in all.into_iter().zip(0..) {
            let (ram, pause, end, at_pause) = (&ram, &pause, &end, &at_pause);
            let random = Random(random.next() | 1);
            scope.spawn(move || {
                write_at_random(vcpu, number, ram, pause, end, at_pause, random);
            });
        }
        for round in 0..rounds {
            // While the guest runs, change the log, other slots, or the RAM.
            let mut other = None;
            match random.below(6) {
                0 => {
                    drop(log.take());
                    log = Some(start());
                }
                1 => {
                    log.take().unwrap().stop().unwrap();
                    log = Some(start());
                }
                2 => {
                    let layout = RamLayout::single(2 * HIGH, REGION).unwrap();
                    let second = Arc::new(GuestRam::new(layout).unwrap());
                    let second = Arc::new(RamSlots::register(&vm, &second, 8).unwrap());
                    other = Some(
                        DirtyLog::options()
                            .reprotect(reprotect)
                            .start(&second)
                            .unwrap(),
                    );
                }
                3 => {
                    ram.write(random.address(), &random.next().to_le_bytes())
                        .unwrap();
                }
                4 => bitmap.rebuild(512 << random.below(8)).unwrap(),
                _ => {}
            }
            let log = log.as_ref().unwrap();
            let mut epoch = log.begin_live_epoch().unwrap();
            copy(&ram, epoch.bitmap(), &mut image);
            for _ in 0..random.below(3) {
                copy(&ram, &log.extend_live(&mut epoch).unwrap(), &mut image);
            }
            drop(other);
            pause.store(true, Ordering::Release);
            at_pause.wait();
            let harvest = log.harvest(vcpus.pause().unwrap()).unwrap();
            copy(&ram, &harvest.extend(&mut epoch).unwrap(), &mut image);
            assert_same(&image, &whole(&ram), round);
            pause.store(false, Ordering::Release);
            end.store(round + 1 == rounds, Ordering::Release);
            drop(harvest);
            at_pause.wait();
            match random.below(4) {
                // The save failed: dropping the epoch restores the marks.
                0 => drop(epoch),
                _ => epoch.release().unwrap(),
            }
        }
    });
    // The virtual machine ends without a last harvest.
    drop(log);
    drop(slots);
    copy(&ram, &bitmap, &mut image);
    assert_same(&image, &whole(&ram), rounds);
}

/// Fills registers of each kind with random values that a guest's kernel may set.
fn fill_with_random_state(guest: &Guest, random: &mut Random) {
    guest.set_regs(|regs| {
        let kvm_regs { rdi, rsp, rip, .. } = *regs;
        *regs = kvm_regs {
            rax: random.next(),
            rbx: random.next(),
            rdx: random.next(),
            rbp: random.next(),
            r8: random.next(),
            r12: random.next(),
            r13: 1 + random.below(5000),
            r15: random.next(),
            // Arithmetic flags.
            rflags: 2 | random.next() & 0x8d5,
            rdi,
            rsp,
            rip,
            ..kvm_regs::default()
        };
    });
    let canonical = |random: &mut Random| (random.next() << 17) as i64 >> 17;
    let entries = [0xc000_0082_u32, 0xc000_0102, 0x176].map(|index| kvm_msr_entry {
        index,
        data: canonical(random) as u64,
        ..kvm_msr_entry::default()
    });
    let written = guest.vcpu.set_msrs(&Msrs::from_entries(&entries).unwrap());
    assert_eq!(written.unwrap(), entries.len());
    let mut xsave = guest.vcpu.get_xsave().unwrap();
    // Registers xmm0 to xmm15 of the legacy area, and the bit that marks them as in use.
    for word in &mut xsave.region[40..104] {
        *word = random.next() as u32;
    }
    xsave.region[128] |= 3;
    // SAFETY: the buffer came from the same vCPU, with the same features.
    #[allow(unsafe_code)]
    unsafe { guest.vcpu.set_xsave(&xsave) }.unwrap();
    let mut debug = guest.vcpu.get_debug_regs().unwrap();
    debug.db[random.below(4) as usize] = random.below(REGION);
    guest.vcpu.set_debug_regs(&debug).unwrap();
    // Interrupts that were requested and not delivered, of vectors that the program never unmasks.
    let mut lapic = guest.vcpu.get_lapic().unwrap();
    for vector in [32 + random.below(200), 32 + random.below(200)] {
        let register = 0x200 + vector as usize / 32 * 16;
        let byte = register + vector as usize % 32 / 8;
        lapic.regs[byte] |= 1 << (vector % 8);
    }
    guest.vcpu.set_lapic(&lapic).unwrap();
    let mut events = guest.vcpu.get_vcpu_events().unwrap();
    events.nmi.masked = random.below(2) as u8;
    guest.vcpu.set_vcpu_events(&events).unwrap();
}

fn capture(guest: &mut Guest) -> VcpuState {
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    let paused = guest.vcpus.pause().unwrap();
    let mut state = VcpuState::capture(&msrs(&guest.kvm), &paused, &guest.vcpu).unwrap();
    // The time-stamp counter runs on.
    let time_stamp_counter = |index: u32| index == 0x10;
    state.msrs.retain(|msr| !time_stamp_counter(msr.index));
    state
}

fn fingerprint(state: &VcpuState) -> serde_json::Value {
    serde_json::to_value(state).unwrap()
}

#[test]
fn restored_random_state_runs_like_the_original() {
    needs!(Kvm);
    let mut random = Random(0x0123_4567_89ab_cdef);
    for case in 0..rounds(10, 1000) {
        let regions = [(0, REGION), (HIGH, REGION)];
        let with_devices = |vm: &kvm_ioctls::VmFd| vm.create_irq_chip().unwrap();
        let mut guest = Guest::with_ram(regions, with_devices);
        guest.boot(Program::Mix);
        guest.set_regs(|regs| regs.rdi = FIRST_TARGET + random.below(100) * PAGE);
        fill_with_random_state(&guest, &mut random);
        for _ in 0..random.below(20) {
            guest.run();
        }
        let state = capture(&mut guest);
        let mut other = Guest::with_ram(regions, with_devices);
        other.ram.write_at(0, &whole(&guest.ram)).unwrap();
        let restored = state.restore(&other.vm, &other.vcpu).unwrap();
        assert_eq!(restored.differing_msrs, [], "case {case}");
        let restored = capture(&mut other);
        assert_eq!(fingerprint(&restored), fingerprint(&state), "case {case}");
        for _ in 0..1 + random.below(20) {
            assert_eq!(guest.run(), other.run(), "case {case}");
        }
        let (state, restored) = (capture(&mut guest), capture(&mut other));
        assert_eq!(fingerprint(&restored), fingerprint(&state), "case {case}");
        assert_same(&whole(&other.ram), &whole(&guest.ram), case);
    }
}
