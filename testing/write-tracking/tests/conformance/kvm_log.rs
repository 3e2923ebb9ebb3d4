//! KVM guests, whose writes KVM logs.

use std::sync::{Arc, Mutex};

use dirty_bitmap::{LoggedEpoch, TakenBitmap};
use kvm_backend::{
    DirtyLog, DirtyLogOptions, PausedHarvest, RamSlots, Reprotect, Vcpu, Vcpus, long_mode,
};
use test_machine::Need;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use write_tracking::LoggedBackend;

use super::kvm::support::{self, CODE, Guest, INPUT, INPUT_SIZE, Program, STACK, TABLES};

const VCPUS: u64 = 4;

/// A KVM guest, and its log.
pub(super) struct Logged {
    vcpus: Vec<Mutex<Vcpu>>,
    all: Vcpus,
    log: DirtyLog,
    ram: Arc<kvm_backend::GuestRam>,
}

/// A log whose pages KVM protects when it is read.
pub(super) struct WhenRead(Logged);

/// A log whose pages KVM protects once they are marked.
pub(super) struct WhenMarked(Logged);

/// A log of guest memory of `vm-memory`, whose host writes are marked in `AtomicBitmap`s.
pub(super) struct AtomicMarks {
    logged: Logged,
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
}

impl Logged {
    fn new(regions: [(u64, u64); 2], reprotect: Reprotect) -> Self {
        let guest = Guest::with_ram(regions, |_| ());
        Self::of_guest(guest, &DirtyLog::options().reprotect(reprotect))
    }

    fn of_guest(guest: Guest, options: &DirtyLogOptions) -> Self {
        guest.boot(Program::Touch);
        let mut vcpus = vec![Mutex::new(guest.vcpu)];
        for number in 1..VCPUS {
            let vcpu = guest.vcpus.create(&guest.vm, number).unwrap();
            let start = long_mode::Start {
                entry: CODE,
                stack: STACK + number * 256,
                page_tables: TABLES,
            };
            long_mode::boot(&guest.kvm, &guest.ram, &vcpu, &start).unwrap();
            vcpus.push(Mutex::new(vcpu));
        }
        Self {
            vcpus,
            all: guest.vcpus,
            log: options.start(&guest.slots).unwrap(),
            ram: guest.ram,
        }
    }

    fn increment(&self, vcpu: usize, addresses: &[u64]) {
        let space = INPUT_SIZE / VCPUS;
        let input = INPUT + space * vcpu as u64;
        let mut vcpu = self.vcpus[vcpu].lock().unwrap();
        for addresses in addresses.chunks((space / 8) as usize) {
            let list: Vec<u8> = addresses.iter().flat_map(|a| a.to_le_bytes()).collect();
            self.ram.write(input, &list).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rsi, regs.rcx) = (CODE, input, addresses.len() as u64);
            vcpu.set_regs(&regs).unwrap();
            support::run(&mut vcpu);
        }
        vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    }

    fn harvest(&self) -> PausedHarvest {
        self.log.harvest(self.all.pause().unwrap()).unwrap()
    }
}

macro_rules! backend {
    ($name:ident, $logged:tt, { $($own:item)* }) => {
        impl LoggedBackend for $name {
            const NEEDS: &'static [Need] = &[Need::Kvm];

            $($own)*

            fn ram(&self) -> &guest_ram::LoggedRam {
                &self.$logged.ram
            }

            fn vcpus(&self) -> usize {
                self.$logged.vcpus.len()
            }

            fn increment(&self, vcpu: usize, addresses: &[u64]) {
                self.$logged.increment(vcpu, addresses);
            }

            fn begin_live(&self) -> LoggedEpoch {
                self.$logged.log.begin_live_epoch().unwrap()
            }

            fn extend_live(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap)) {
                copy(&self.$logged.log.extend_live(epoch).unwrap());
            }

            fn begin_paused(&self, copy: impl FnOnce(LoggedEpoch)) {
                let harvest = self.$logged.harvest();
                copy(harvest.begin_epoch().unwrap());
            }

            fn extend_paused(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap)) {
                let harvest = self.$logged.harvest();
                copy(&harvest.extend(epoch).unwrap());
            }
        }
    };
}
backend!(WhenRead, 0, {
    fn new(regions: [(u64, u64); 2]) -> Self {
        Self(Logged::new(regions, Reprotect::WhenRead))
    }
});
backend!(WhenMarked, 0, {
    fn new(regions: [(u64, u64); 2]) -> Self {
        Self(Logged::new(regions, Reprotect::WhenMarked))
    }
});
backend!(AtomicMarks, logged, {
    fn new(regions: [(u64, u64); 2]) -> Self {
        let ranges = regions.map(|(start, size)| (GuestAddress(start), size as usize));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let ram = guest_ram::GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap();
        let register = |vm: &_, ram: &_| RamSlots::register(vm, ram, 0).unwrap();
        let guest = Guest::of_ram(ram.into(), |_| (), register);
        let marked = Arc::clone(&memory);
        let options =
            DirtyLog::options().mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&marked));
        Self {
            logged: Logged::of_guest(guest, &options),
            memory,
        }
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        let address = GuestAddress(guest_start);
        self.memory.write_slice(bytes, address).unwrap();
    }
});
