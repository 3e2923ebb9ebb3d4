//! A guest that translates its addresses.

use fake_hvf::tables::*;
use fake_hvf::*;

use super::*;

pub(crate) const SCTLR_EL1: u16 = 0xc080;
pub(crate) const TTBR0_EL1: u16 = 0xc100;
pub(crate) const TTBR1_EL1: u16 = 0xc101;
pub(crate) const TCR_EL1: u16 = 0xc102;
pub(crate) const FAR_EL1: u16 = 0xc300;
pub(crate) const SPSR_EL1: u16 = 0xc200;
pub(crate) const ID_AA64MMFR1_EL1: u16 = 0xc039;
pub(crate) const STAGE_1_WALK: u64 = 1 << 7;

/// Where the tables are, in memory of their own.
pub(crate) const LOWER: u64 = 0x9000_0000;
pub(crate) const UPPER: u64 = 0x9800_0000;

/// Virtual addresses of [`RAM`] and of [`DATA`].
pub(crate) const CODE_AT: u64 = 0x20_0000;
pub(crate) const DATA_AT: u64 = 0x30_0000;

pub(crate) const STORE: u32 = 0xf900_0020; // str x0, [x1]
pub(crate) const LOAD: u32 = 0xf940_0020; // ldr x0, [x1]
pub(crate) const INVALIDATE: u32 = 0xd508_831f; // tlbi vmalle1is

/// A guest at [`CODE_AT`] and its page tables.
pub(crate) struct Guest {
    pub(crate) vcpu: Vcpu,
    pub(crate) lower: (Tables, Ram),
    pub(crate) upper: (Tables, Ram),
    pub(crate) ram: Ram,
    _machine: Machine,
}

impl Guest {
    /// Creates a guest with pages of `1 << page_bits` bytes and addresses of 39 bits.
    pub(crate) fn new(page_bits: u32) -> Self {
        let machine = Machine::new();
        let ram = Ram::new();
        let [lower, upper] = [LOWER, UPPER].map(|at| {
            let tables = Tables::new(page_bits, 39, at);
            (tables, Ram::at(at, ALL))
        });
        let vcpu = Vcpu::new();
        vcpu.set_system(TCR_EL1, lower.0.control()).unwrap();
        vcpu.set_system(TTBR0_EL1, LOWER).unwrap();
        vcpu.set_system(TTBR1_EL1, UPPER).unwrap();
        vcpu.set(PC, CODE_AT);
        let mut guest = Self {
            vcpu,
            lower,
            upper,
            ram,
            _machine: machine,
        };
        guest.map(CODE_AT, RAM, ACCESSED);
        guest.map(DATA_AT, DATA, ACCESSED);
        guest.enable();
        guest
    }

    pub(crate) fn map(&mut self, address: u64, physical: u64, attributes: u64) {
        let (tables, ram) = match address >> 63 {
            0 => &mut self.lower,
            _ => &mut self.upper,
        };
        tables.map(address, physical, attributes);
        for (at, descriptor) in tables.descriptors() {
            ram.write_word(at, descriptor);
        }
    }

    pub(crate) fn enable(&self) {
        self.vcpu.set_system(SCTLR_EL1, 1).unwrap();
    }

    /// Runs instructions from [`CODE_AT`] on with an address in x1 and 0x4242 in x0.
    pub(crate) fn execute(&self, address: u64, code: &[u32]) -> ExitException {
        self.ram.write(RAM, code);
        sys_icache_invalidate(self.ram.host(), 64);
        self.vcpu.set(PC, CODE_AT);
        self.vcpu.set(X0, 0x4242);
        self.vcpu.set(X1, address);
        self.vcpu.run()
    }

    /// Handles the guest's own exceptions by `hvc #0x77`.
    pub(crate) fn handle_exceptions(&self) {
        self.ram.write(RAM + 0x800 + 0x200, &[hvc(0x77)]);
        self.ram.write(RAM + 0x800 + 0x400, &[hvc(0x77)]);
        self.vcpu.set_system(VBAR_EL1, CODE_AT + 0x800).unwrap();
    }

    /// Returns ESR_EL1 and FAR_EL1 after the guest's own exception.
    pub(crate) fn exception(&self, exit: ExitException) -> (u64, u64) {
        assert_eq!(hypercall(exit), 0x77);
        let system = |register| self.vcpu.system(register).unwrap();
        (system(ESR_EL1), system(FAR_EL1))
    }
}
