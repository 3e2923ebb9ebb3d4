//! The interrupt controller's registers, and which interrupts they signal.
//!
//! The model is that of a distributor with one security state and affinity routing. All interrupts
//! are of group 1.

use std::collections::BTreeMap;

/// Shared interrupts: the first one, and their number.
pub(crate) const SHARED: (u32, u32) = (32, 988);

/// The CPU interface's registers that can be written, and the read-only priority.
const ICC: [u16; 9] = [
    0xc230, // PMR_EL1
    0xc643, // BPR0_EL1
    0xc644, // AP0R0_EL1
    0xc648, // AP1R0_EL1
    0xc663, // BPR1_EL1
    0xc664, // CTLR_EL1
    0xc665, // SRE_EL1
    0xc666, // IGRPEN0_EL1
    0xc667, // IGRPEN1_EL1
];
pub(crate) const ICC_RPR_EL1: u16 = 0xc65b;
const ICC_SRE_EL1: u16 = 0xc665;
const ICC_CTLR_EL1: u16 = 0xc664;

/// Registers by their offsets, and their values.
pub(crate) type Registers = BTreeMap<u32, u64>;

/// The controller of the machine.
#[derive(Debug, Default)]
pub(crate) struct Gic {
    pub distributor: Registers,
    pub redistributors_start: u64,
    /// The frame for messages, their first number, and their count.
    pub messages: Option<(u64, u32, u32)>,
}

/// Returns the CPU interface's registers of a new vCPU.
pub(crate) fn new_cpu_interface() -> BTreeMap<u16, u64> {
    let mut registers: BTreeMap<u16, u64> = ICC.into_iter().map(|name| (name, 0)).collect();
    registers.insert(ICC_SRE_EL1, 0b111);
    registers.insert(ICC_CTLR_EL1, 0x400);
    registers
}

/// Offsets of the distributor's registers (Arm IHI 0069, 12.9).
const CONTROL: u32 = 0x000;
const ENABLED: u32 = 0x100;
const PENDING: u32 = 0x200;
const ACTIVE: u32 = 0x300;
const PRIORITY: u32 = 0x400;
pub(crate) const KIND: u32 = 0xc00;
const ROUTE: u32 = 0x6000;

/// GICD_CTLR.EnableGrp1
const ENABLE_GROUP_1: u64 = 1 << 1;

/// The affinity fields of MPIDR_EL1.
const AFFINITY: u64 = 0xff_00ff_ffff;

const ICC_PMR_EL1: u16 = 0xc230;
const ICC_IGRPEN1_EL1: u16 = 0xc667;

/// Returns the offset of the register that has the bits, and whether ones clear them.
fn bits(offset: u32) -> Option<(u32, bool)> {
    // In the distributor, and in the second frame of a redistributor.
    let number = offset & !0x1_0000;
    let has_bits = (ENABLED..PRIORITY).contains(&number);
    has_bits.then_some((offset & !0x80, number & 0x80 != 0))
}

/// Writes a register. Ones set or clear bits in some, as the architecture defines.
pub(crate) fn write(registers: &mut Registers, offset: u32, value: u64) {
    match bits(offset) {
        Some((set, true)) => *registers.entry(set).or_default() &= !value,
        Some((set, false)) => *registers.entry(set).or_default() |= value,
        None => drop(registers.insert(offset, value)),
    }
}

pub(crate) fn read(registers: &Registers, offset: u32) -> u64 {
    let offset = bits(offset).map_or(offset, |(set, _)| set);
    registers.get(&offset).copied().unwrap_or_default()
}

/// Returns whether a shared interrupt is signalled to a CPU.
pub(crate) fn is_signalled(
    distributor: &Registers,
    intid: u32,
    affinity: u64,
    interface: &BTreeMap<u16, u64>,
) -> bool {
    let bit = |group: u32| read(distributor, group + intid / 32 * 4) >> (intid % 32) & 1 != 0;
    let priority = read(distributor, PRIORITY + intid / 4 * 4) >> (intid % 4 * 8) & 0xff;
    read(distributor, CONTROL) & ENABLE_GROUP_1 != 0
        && bit(ENABLED)
        && bit(PENDING)
        && !bit(ACTIVE)
        && read(distributor, ROUTE + intid * 8) & AFFINITY == affinity & AFFINITY
        && interface[&ICC_IGRPEN1_EL1] & 1 != 0
        && priority < interface[&ICC_PMR_EL1]
}

pub(crate) fn is_message(gic: &Gic, intid: u32) -> bool {
    gic.messages
        .is_some_and(|(_, first, count)| (first..first + count).contains(&intid))
}

pub(crate) fn set_pending(gic: &mut Gic, intid: u32, pending: bool) {
    let clear = if pending { 0 } else { 0x80 };
    write(
        &mut gic.distributor,
        PENDING + clear + intid / 32 * 4,
        1 << (intid % 32),
    );
}
