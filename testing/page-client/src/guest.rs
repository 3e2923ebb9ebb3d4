//! A KVM guest whose RAM a page server fills.

use std::io;
use std::sync::Arc;

use kvm_backend::{GuestRam, RamSlots, long_mode, open_kvm};
use kvm_ioctls::VcpuExit;
use page_reader::RamLayout;

/// Guest-physical layout. Pages below [`FROM`] are the guest's own.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x10000;
const STACK: u64 = 0x12000;
/// The guest-physical address from which on the guest adds up its RAM.
pub(crate) const FROM: u64 = 1 << 20;

/// Adds up rcx words from rsi on.
const SUM: [u8; 16] = [
    0x31, 0xc0, // xor eax, eax
    0x48, 0x03, 0x06, // add rax, [rsi]
    0x48, 0x83, 0xc6, 0x08, // add rsi, 8
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf4, // jnz to the add
    0xe6, 0x80, // out 0x80, al
];

pub(crate) struct Guest {
    ram: Arc<GuestRam>,
}

impl Guest {
    pub(crate) fn new(size: u64) -> Self {
        let layout = RamLayout::single(0, size).unwrap();
        Self {
            ram: Arc::new(GuestRam::new(layout).unwrap()),
        }
    }

    pub(crate) fn address(&self) -> usize {
        self.ram.host_address(0).expose_provenance().get()
    }

    /// Runs the guest, and returns its sum.
    pub(crate) fn sum(&self) -> u64 {
        let kvm = open_kvm().unwrap();
        let vm = kvm_backend::create_vm(&kvm).unwrap();
        let _slots = RamSlots::register(&vm, &self.ram, 0).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        self.ram.write(CODE, &SUM).unwrap();
        let start = long_mode::Start {
            entry: CODE,
            stack: STACK,
            page_tables: TABLES,
        };
        long_mode::boot(&kvm, &self.ram, &vcpu, &start).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        let size = self.ram.layout().ram_size();
        (regs.rsi, regs.rcx) = (FROM, (size - FROM) / 8);
        vcpu.set_regs(&regs).unwrap();
        loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x80, _)) => break,
                // While the vCPU waits for a page, the kernel may wake it for other work.
                Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
                other => panic!("{other:?}"),
            }
        }
        vcpu.get_regs().unwrap().rax
    }
}
