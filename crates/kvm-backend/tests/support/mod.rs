//! A small guest: one vCPU at privilege level 3, RAM around a gap, and programs of a few
//! instructions.

// Every test file compiles this module and uses a part of it.
#![allow(dead_code, unreachable_pub, unsafe_code)]

pub mod dirty_pages;
pub mod state;

use std::io;
use std::sync::Arc;

use kvm_backend::{DirtyLog, GuestRam, RamSlots, Reprotect, Vcpu, Vcpus, long_mode};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use page_reader::{PageReader, RamLayout};

pub const PAGE: u64 = 4096;
/// The RAM has a region from 0 on, and one from `HIGH` on.
pub const LOW_SIZE: u64 = 4 << 20;
pub const HIGH: u64 = 4 << 30;
pub const HIGH_SIZE: u64 = 4 << 20;

/// The addresses of the parts of a program.
pub const TABLES: u64 = 0x1000;
pub const CODE: u64 = 0x10000;
pub const STACK: u64 = 0x11000;
pub const INPUT: u64 = 0x12000;
pub const INPUT_SIZE: u64 = 0xe000;

/// The port to which a program writes when it is done.
pub const DONE: u16 = 0x80;

/// A program: position-independent, without calls, started at its entry or continued after its
/// `out`.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    /// Increments the word at each of the rcx addresses in the list at rsi.
    Touch,
    /// Increments words of random pages until the word at rdx is not 0. rdi: size of the low RAM;
    /// r10: number of pages; r11: size of the gap.
    Scatter,
    /// Loads 96 bytes at rsi into vector registers; when continued, stores them at rdi.
    Vectors,
    /// Mixes the words of the page at rdi into rax, and rax into them, in r13 steps at a time.
    Mix,
    /// `out`s al twice, incrementing it in between.
    TwoOuts,
    /// Reads a byte with `in`, and is done with that byte.
    In,
    /// Stores 16 bytes of zeros at rdi, then is done.
    WideStore,
    /// Stores rcx bytes from port dx at rdi, then is done.
    Ins,
    /// Copies rcx bytes from rsi to rdi, then is done.
    Movs,
    /// Pushes the word at rsi, then is done.
    Push,
}

// The symbols are global: the compiler may put this text and its uses into different objects.
core::arch::global_asm!(
    ".pushsection .rodata",
    ".irp program, touch, scatter, vectors, mix, two_outs, in_out, wide_store, ins, movs, push",
    ".globl \\program, \\program\\()_end",
    ".hidden \\program, \\program\\()_end",
    ".endr",
    "touch:",
    "test rcx, rcx",
    "jz 2f",
    "mov rax, [rsi]",
    "add rsi, 8",
    "inc qword ptr [rax]",
    "dec rcx",
    "jmp touch",
    "2: out 0x80, al",
    "jmp touch",
    "touch_end:",
    "scatter:",
    "mov rbx, 0x9e3779b97f4a7c15",
    "2: mov rax, rbx", // xorshift 13, 7, 17
    "shl rax, 13",
    "xor rbx, rax",
    "mov rax, rbx",
    "shr rax, 7",
    "xor rbx, rax",
    "mov rax, rbx",
    "shl rax, 17",
    "xor rbx, rax",
    "mov rax, rbx",
    "push rdx",
    "mul r10", // rdx: any page but the first 32
    "lea rcx, [rdx + 32]",
    "pop rdx",
    "shl rcx, 12",
    "cmp rcx, rdi",
    "jb 3f",
    "add rcx, r11",
    "3: mov rax, rbx",
    "and eax, 0xff8",
    "inc qword ptr [rcx + rax]",
    "cmp qword ptr [rdx], 0",
    "je 2b",
    "out 0x80, al",
    "scatter_end:",
    "vectors:",
    "vmovdqu ymm0, [rsi]",
    "vmovdqu ymm15, [rsi + 32]",
    "vmovdqu xmm7, [rsi + 64]",
    "fld qword ptr [rsi + 80]",
    "out 0x80, al",
    "vmovdqu [rdi], ymm0",
    "vmovdqu [rdi + 32], ymm15",
    "vmovdqu [rdi + 64], xmm7",
    "fst qword ptr [rdi + 80]",
    "out 0x80, al",
    "vectors_end:",
    "mix:",
    "mov rcx, r13",
    "2: mov rdx, 6364136223846793005",
    "imul rax, rdx",
    "inc rax",
    "mov rdx, rax",
    "shr rdx, 55",
    "xor rax, [rdi + rdx * 8]",
    "add [rdi + rdx * 8], rax",
    "movq xmm1, rax",
    "paddq xmm0, xmm1",
    "dec rcx",
    "jnz 2b",
    "movq [rdi], xmm0",
    "out 0x80, al",
    "jmp mix",
    "mix_end:",
    "two_outs:",
    "out 0x80, al",
    "inc al",
    "out 0x80, al",
    "two_outs_end:",
    "in_out:",
    "in al, 0x80",
    "out 0x80, al",
    "in_out_end:",
    "wide_store:",
    "movdqu [rdi], xmm0",
    "out 0x80, al",
    "wide_store_end:",
    "ins:",
    "rep insb",
    "out 0x80, al",
    "ins_end:",
    "movs:",
    "rep movsb",
    "out 0x80, al",
    "movs_end:",
    "push:",
    "push qword ptr [rsi]",
    "out 0x80, al",
    "push_end:",
    ".popsection",
);

impl Program {
    pub fn bytes(self) -> &'static [u8] {
        macro_rules! between {
            ($begin:ident, $end:ident) => {{
                unsafe extern "C" {
                    static $begin: u8;
                    static $end: u8;
                }
                let (begin, end) = (&raw const $begin, &raw const $end);
                // SAFETY: both labels are in the read-only bytes assembled above, the first before
                // the second.
                unsafe { std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin)) }
            }};
        }
        match self {
            Self::Touch => between!(touch, touch_end),
            Self::Scatter => between!(scatter, scatter_end),
            Self::Vectors => between!(vectors, vectors_end),
            Self::Mix => between!(mix, mix_end),
            Self::TwoOuts => between!(two_outs, two_outs_end),
            Self::In => between!(in_out, in_out_end),
            Self::WideStore => between!(wide_store, wide_store_end),
            Self::Ins => between!(ins, ins_end),
            Self::Movs => between!(movs, movs_end),
            Self::Push => between!(push, push_end),
        }
    }
}

/// A virtual machine. Fields drop in order: the vCPU before its memory.
pub struct Guest {
    pub vcpu: Vcpu,
    pub vcpus: Vcpus,
    pub slots: Arc<RamSlots>,
    pub ram: Arc<GuestRam>,
    pub vm: VmFd,
    pub kvm: Kvm,
}

impl Guest {
    /// Creates RAM and a vCPU in its reset state.
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    /// Does the same, and calls `prepare` before the vCPU is created.
    pub fn with(prepare: impl FnOnce(&VmFd)) -> Self {
        Self::with_ram([(0, LOW_SIZE), (HIGH, HIGH_SIZE)], prepare)
    }

    pub fn with_ram(
        regions: impl IntoIterator<Item = (u64, u64)>,
        prepare: impl FnOnce(&VmFd),
    ) -> Self {
        Self::with_slots(regions, prepare, |vm, ram| {
            RamSlots::register(vm, ram, 0).unwrap()
        })
    }

    /// Creates RAM in memory slots that the test sets itself.
    pub fn with_slots(
        regions: impl IntoIterator<Item = (u64, u64)>,
        prepare: impl FnOnce(&VmFd),
        slots: impl FnOnce(&VmFd, &Arc<GuestRam>) -> RamSlots,
    ) -> Self {
        let layout = RamLayout::new(regions).unwrap();
        Self::of_ram(GuestRam::new(layout).unwrap(), prepare, slots)
    }

    /// Creates a guest of RAM that the test has created.
    pub fn of_ram(
        ram: GuestRam,
        prepare: impl FnOnce(&VmFd),
        slots: impl FnOnce(&VmFd, &Arc<GuestRam>) -> RamSlots,
    ) -> Self {
        let kvm = kvm_backend::open_kvm().unwrap();
        let vm = kvm_backend::create_vm(&kvm).unwrap();
        prepare(&vm);
        let ram = Arc::new(ram);
        let slots = Arc::new(slots(&vm, &ram));
        let vcpus = Vcpus::new(&vm).unwrap();
        let vcpu = vcpus.create(&vm, 0).unwrap();
        Self {
            vcpu,
            vcpus,
            slots,
            ram,
            vm,
            kvm,
        }
    }

    /// Creates RAM and a vCPU at the start of `program`.
    pub fn booted(program: Program) -> Self {
        let guest = Self::new();
        guest.boot(program);
        guest
    }

    /// Creates a guest that has run `Touch`: the pages of the program itself are mapped, so reading
    /// them no longer reports them.
    pub fn touching() -> Self {
        Self::new().touching_now()
    }

    /// Does the same in memory slots of these numbers that the test has registered, as a VMM does.
    pub fn touching_adopted(slots: &[u32; 2]) -> Self {
        let regions = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];
        Self::with_slots(regions, |_| (), |vm, ram| adopted(vm, ram, slots)).touching_now()
    }

    fn touching_now(mut self) -> Self {
        self.boot(Program::Touch);
        self.touch(&[STACK]);
        self
    }

    pub fn boot(&self, program: Program) {
        self.ram.write(CODE, program.bytes()).unwrap();
        let start = long_mode::Start {
            entry: CODE,
            stack: STACK,
            page_tables: TABLES,
        };
        long_mode::boot(&self.kvm, &self.ram, &self.vcpu, &start).unwrap();
    }

    /// Starts a log, and empties it and the bitmap.
    pub fn log(&self, reprotect: Reprotect) -> DirtyLog {
        let log = DirtyLog::options()
            .reprotect(reprotect)
            .start(&self.slots)
            .unwrap();
        log.harvest_live().unwrap();
        self.ram.set_baseline().unwrap();
        log
    }

    pub fn set_regs(&self, change: impl FnOnce(&mut kvm_bindings::kvm_regs)) {
        let mut regs = self.vcpu.get_regs().unwrap();
        change(&mut regs);
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Makes the page tables map `size` bytes from 0 on. The part that is not RAM is a device.
    pub fn map_devices_up_to(&self, size: u64) {
        let larger = GuestRam::new(RamLayout::single(0, size).unwrap()).unwrap();
        let start = long_mode::Start {
            entry: CODE,
            stack: STACK,
            page_tables: TABLES,
        };
        long_mode::boot(&self.kvm, &larger, &self.vcpu, &start).unwrap();
        let mut tables = vec![0; (CODE - TABLES) as usize];
        larger.read(TABLES, &mut tables).unwrap();
        self.ram.write(TABLES, &tables).unwrap();
    }

    /// Runs until the program is done, and returns its byte.
    pub fn run(&mut self) -> u8 {
        run(&mut self.vcpu)
    }

    /// Makes the program `Touch` write to each of these addresses.
    pub fn touch(&mut self, addresses: &[u64]) {
        let list: Vec<u8> = addresses.iter().flat_map(|a| a.to_le_bytes()).collect();
        assert!(list.len() as u64 <= INPUT_SIZE);
        self.ram.write(INPUT, &list).unwrap(); // a host write, which marks its pages
        self.set_regs(|regs| {
            regs.rip = CODE;
            regs.rsi = INPUT;
            regs.rcx = addresses.len() as u64;
        });
        self.run();
    }

    /// Returns the contents of the RAM.
    pub fn image(&self) -> Vec<u8> {
        let mut image = vec![0; self.ram.layout().ram_size() as usize];
        self.ram.read_at(0, &mut image).unwrap();
        image
    }
}

/// Registers the RAM as a VMM does, in slots of these numbers, and adopts the slots.
#[allow(unsafe_code)]
pub fn adopted(vm: &VmFd, ram: &Arc<GuestRam>, slots: &[u32]) -> RamSlots {
    for (slot, region) in slots.iter().zip(ram.layout().regions()) {
        let memory = kvm_userspace_memory_region {
            slot: *slot,
            guest_phys_addr: region.guest_start,
            memory_size: region.size,
            userspace_addr: ram.host_address(region.region).addr().get() as u64,
            flags: 0,
        };
        // SAFETY: the mapping of the region, which the RAM keeps as long as the tests run the
        // virtual machine.
        unsafe { vm.set_user_memory_region(memory) }.unwrap();
    }
    // SAFETY: the slots were set above, and no test removes one while the value exists.
    unsafe { RamSlots::adopt(vm, ram, slots) }.unwrap()
}

pub fn run(vcpu: &mut Vcpu) -> u8 {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(DONE, [byte])) => return *byte,
            // The kernel may have other work for the thread, and a tracer may stop it.
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Returns the offset in the memory file of a guest-physical address.
pub fn offset(guest_address: u64) -> u64 {
    match guest_address {
        high if high >= HIGH => high - HIGH + LOW_SIZE,
        low => low,
    }
}
