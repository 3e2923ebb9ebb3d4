//! Starts a vCPU in 64-bit user mode, without firmware or kernel: for demonstrations, tests, and
//! guests that are one program.
//!
//! The program sees all of its RAM at its guest-physical addresses. It runs at privilege level 3
//! with I/O privilege, so it communicates with its VMM by `in` and `out`. There are no interrupts
//! and no descriptor tables: an exception, including an access outside the RAM, ends in
//! [`VcpuExit::Shutdown`](kvm_ioctls::VcpuExit::Shutdown). SSE works, and so do AVX and AVX-512 if
//! the host has them.

use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use page_reader::{OutsideRam, RamLayout};
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::linux::ram::GuestRam;

/// The number of bytes that a page-table entry of the lowest and of the second level maps (Intel
/// SDM vol. 3A, 4.5: 9 bits a level).
const PAGE: u64 = 1 << 12;
const LARGE_PAGE: u64 = 1 << 21;
/// The end of the lower half of 48-bit linear addresses, which four levels of tables reach.
const LINEAR_END: u64 = 1 << 47;

/// Bits of a page-table entry (Intel SDM vol. 3A, table 4-15 and following). Accessed and dirty are
/// set in advance, so that the processor does not write them.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;
const LEAF: u64 = TABLE | DIRTY;

/// CR0: protection, monitor coprocessor, extension type, numeric error, write protection, paging
/// (Intel SDM vol. 3A, 2.5).
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: physical address extension, FXSAVE, SIMD exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// CR4: XSAVE and XCR0.
const CR4_OSXSAVE: u64 = 1 << 18;
/// EFER: long mode enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// XCR0: x87, SSE, AVX, and the three parts of AVX-512.
const XCR0_VECTORS: u64 = 0b1110_0111;
/// RFLAGS: the bit that is always 1, and I/O privilege for level 3.
const RFLAGS: u64 = 1 << 1 | 3 << 12;

/// The start of a program: guest-physical addresses, which are also its linear addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The address of the first instruction.
    pub entry: u64,
    /// The stack pointer: the address after the stack's first (highest) byte. The System V ABI
    /// requires `rsp + 8` to be a multiple of 16 where a function begins.
    pub stack: u64,
    /// The address of the page tables: a multiple of 4096, with [`page_table_bytes`] of RAM that
    /// the program does not use.
    pub page_tables: u64,
}

/// Returns the number of bytes of page tables that a layout needs: 4 KiB for each started GiB of
/// RAM, and a few more pages.
///
/// # Errors
/// Returns [`BootError::AddressTooHigh`].
///
/// # Examples
/// ```
/// use kvm_backend::long_mode;
/// use page_reader::RamLayout;
///
/// // The root, one table of the third level, one of the second: 2 MiB pages.
/// assert_eq!(long_mode::page_table_bytes(&RamLayout::single(0, 256 << 20)?)?, 3 * 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn page_table_bytes(layout: &RamLayout) -> Result<u64, BootError> {
    PageTables::new(layout, 0).map(|tables| tables.bytes())
}

/// Writes page tables into `ram`, and sets the registers of `vcpu` so that it starts at
/// `start.entry` when it is run.
///
/// CPUID is set to everything that KVM supports. All registers not named by [`Start`] are 0, except
/// for the segments and flags. Several vCPUs may start with the same tables, each with its own
/// stack.
///
/// # Errors
/// Returns a [`BootError`]. The bytes written to RAM stay there.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use kvm_backend::{GuestRam, RamSlots, long_mode};
/// use kvm_ioctls::VcpuExit;
/// use page_reader::RamLayout;
///
/// # if !test_machine::Need::Kvm.met("the example of long_mode::boot") { return Ok(()); }
/// let kvm = kvm_backend::open_kvm()?;
/// let vm = Arc::new(kvm_backend::create_vm(&kvm)?);
/// let ram = Arc::new(GuestRam::new(RamLayout::single(0, 1 << 20)?)?);
/// let _slots = RamSlots::register(&vm, &ram, 0)?;
/// let mut vcpu = vm.create_vcpu(0)?;
///
/// ram.write(0x8000, &[0xb0, 42, 0xe6, 0x80])?; // mov al, 42; out 0x80, al
/// let start = long_mode::Start { entry: 0x8000, stack: 0x8000, page_tables: 0x1000 };
/// long_mode::boot(&kvm, &ram, &vcpu, &start)?;
/// assert!(matches!(vcpu.run()?, VcpuExit::IoOut(0x80, [42])));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn boot(kvm: &Kvm, ram: &GuestRam, vcpu: &VcpuFd, start: &Start) -> Result<(), BootError> {
    let layout = ram.layout();
    let _fits = layout.guest_pieces(start.page_tables, page_table_bytes(layout)?)?;
    let tables = PageTables::new(layout, start.page_tables)?;
    for (what, address) in [
        ("the first instruction", start.entry),
        ("the top of the stack", start.stack.wrapping_sub(1)),
    ] {
        if layout.offset_of(address).is_none() {
            return Err(BootError::NotRam { what, address });
        }
        if (start.page_tables..start.page_tables + tables.bytes()).contains(&address) {
            return Err(BootError::InPageTables { what, address });
        }
    }
    ram.write(start.page_tables, tables.pages.as_bytes())?;

    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let vectors = vectors(&cpuid);
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.cs = segment(SegmentType::Code);
    let data = segment(SegmentType::Data);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = segment(SegmentType::BusyTss);
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0;
    sregs.cr3 = start.page_tables;
    sregs.cr4 = CR4 | if vectors.is_some() { CR4_OSXSAVE } else { 0 };
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    if let Some(value) = vectors {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            xcr: 0,
            value,
            ..kvm_xcr::default()
        };
        vcpu.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
    }
    let regs = kvm_regs {
        rip: start.entry,
        rsp: start.stack,
        rflags: RFLAGS,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

/// Returns XCR0 with all vector registers that the processor has; `None` without XSAVE.
fn vectors(cpuid: &CpuId) -> Option<u64> {
    /// CPUID leaf 0xd, subleaf 0: the bits that XCR0 may have (Intel SDM vol. 2A, CPUID).
    const XSAVE_LEAF: u32 = 0xd;
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == XSAVE_LEAF && entry.index == 0)?;
    let supported = u64::from(leaf.eax) & XCR0_VECTORS;
    (supported != 0).then_some(supported)
}

enum SegmentType {
    Code,
    Data,
    BusyTss,
}

/// Returns a flat segment for privilege level 3 (Intel SDM vol. 3A, 3.4.5; types: tables 3-1 and
/// 3-2). No descriptor table holds it; its selector is that of a usual table.
fn segment(kind: SegmentType) -> kvm_segment {
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    match kind {
        SegmentType::Code => kvm_segment {
            selector: 0x8 | 3,
            type_: 0b1011,
            l: 1,
            ..flat
        },
        SegmentType::Data => kvm_segment {
            selector: 0x10 | 3,
            type_: 0b0011,
            db: 1,
            ..flat
        },
        // Entering long mode requires one, though nothing here uses it.
        SegmentType::BusyTss => kvm_segment {
            selector: 0x18,
            limit: 0x67,
            type_: 0b1011,
            dpl: 0,
            s: 0,
            g: 0,
            ..flat
        },
    }
}

/// Four levels of page tables that map each byte of RAM to itself, and nothing else.
struct PageTables {
    base: u64,
    /// The tables, beginning with the root. The address of a table is `base` plus its offset here.
    pages: Vec<[u64; 512]>,
}

impl PageTables {
    fn new(layout: &RamLayout, base: u64) -> Result<Self, BootError> {
        if !base.is_multiple_of(PAGE) {
            return Err(BootError::MisalignedPageTables { address: base });
        }
        let mut tables = Self {
            base,
            pages: vec![[0; 512]],
        };
        for region in layout.regions() {
            let end = region.guest_end();
            if end > LINEAR_END {
                return Err(BootError::AddressTooHigh { end });
            }
            let mut address = region.guest_start;
            while address < end {
                let large = address.is_multiple_of(LARGE_PAGE) && end - address >= LARGE_PAGE;
                tables.map(address, large);
                address += if large { LARGE_PAGE } else { PAGE };
            }
        }
        Ok(tables)
    }

    fn bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    fn map(&mut self, address: u64, large: bool) {
        let index = |level: u32| (address >> (12 + 9 * level)) as usize % 512;
        let last = u32::from(large);
        let mut table = 0;
        for level in (last + 1..=3).rev() {
            table = self.table_below(table, index(level));
        }
        self.pages[table][index(last)] = address | LEAF | if large { LARGE } else { 0 };
    }

    fn table_below(&mut self, table: usize, index: usize) -> usize {
        let entry = self.pages[table][index];
        if entry != 0 {
            return ((entry - TABLE - self.base) / PAGE) as usize;
        }
        let new = self.pages.len();
        self.pages.push([0; 512]);
        self.pages[table][index] = self.base + new as u64 * PAGE + TABLE;
        new
    }
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> BootError {
    move |error| BootError::Kvm {
        call,
        source: error.into(),
    }
}

/// An error of starting a vCPU.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BootError {
    /// Four levels of page tables do not reach all of the RAM.
    #[error("RAM ends at {end:#x}: a program sees the lower 2^47 bytes only; place it lower")]
    AddressTooHigh {
        /// The guest-physical address after the RAM.
        end: u64,
    },
    /// The page tables do not start at a page boundary.
    #[error("the page tables at {address:#x} are not aligned: give a multiple of 4096")]
    MisalignedPageTables {
        /// The given address.
        address: u64,
    },
    /// The page tables do not fit at their address.
    #[error("the page tables do not fit into the RAM: give them `page_table_bytes` of RAM: {0}")]
    PageTables(#[from] OutsideRam),
    /// An address of [`Start`] is not RAM.
    #[error("{what} is at {address:#x}, where there is no RAM: give an address in the layout")]
    NotRam {
        /// The name of the field.
        what: &'static str,
        /// The guest-physical address.
        address: u64,
    },
    /// An address of [`Start`] is among the page tables.
    #[error("{what} is at {address:#x}, among the page tables: move one or the other")]
    InPageTables {
        /// The name of the field.
        what: &'static str,
        /// The guest-physical address.
        address: u64,
    },
    /// A call of KVM failed.
    #[error(
        "{call} failed: the vCPU must be new, never run, and the host's processor 64-bit: \
         {source}"
    )]
    Kvm {
        /// The KVM call.
        call: &'static str,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
}
