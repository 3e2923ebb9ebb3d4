//! Shared interrupts, and the vCPUs to which they are signalled.
//!
//! The model is that of a distributor with one security state and affinity routing. All interrupts
//! are of group 1. The guest takes the interrupt and can't acknowledge it: its instructions do not
//! reach the CPU interface.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::{Gic, Registers, SHARED, with};
use crate::calls::{Code, Outcome, framework};
use crate::vcpu;

/// Offsets of the distributor's registers (Arm IHI 0069, 12.9).
const CONTROL: u32 = 0x000;
const ENABLED: u32 = 0x100;
const PENDING: u32 = 0x200;
const ACTIVE: u32 = 0x300;
const PRIORITY: u32 = 0x400;
const KIND: u32 = 0xc00;
const ROUTE: u32 = 0x6000;

/// GICD_CTLR.EnableGrp1
const ENABLE_GROUP_1: u64 = 1 << 1;

/// The affinity fields of MPIDR_EL1.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// The offset of GICM_SETSPI_NSR in the frame for messages.
const SET_SPI: u64 = 0x40;

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
pub(super) fn write(registers: &mut Registers, offset: u32, value: u64) {
    match bits(offset) {
        Some((set, true)) => *registers.entry(set).or_default() &= !value,
        Some((set, false)) => *registers.entry(set).or_default() |= value,
        None => drop(registers.insert(offset, value)),
    }
}

pub(super) fn read(registers: &Registers, offset: u32) -> u64 {
    let offset = bits(offset).map_or(offset, |(set, _)| set);
    registers.get(&offset).copied().unwrap_or_default()
}

/// Returns whether a shared interrupt is signalled to a CPU.
fn is_signalled(
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

/// Signals to each vCPU what is pending for it.
pub(super) fn update() {
    let _ = with(|gic| {
        for vcpu in vcpu::in_order() {
            let interface = vcpu.cpu_interface();
            let affinity = vcpu.affinity.load(Ordering::SeqCst);
            let signalled = (SHARED.0..SHARED.0 + SHARED.1)
                .any(|intid| is_signalled(&gic.distributor, intid, affinity, &interface));
            vcpu.interrupt.store(signalled, Ordering::SeqCst);
        }
        Ok(())
    });
}

fn is_message(gic: &Gic, intid: u32) -> bool {
    gic.messages
        .is_some_and(|(_, first, count)| (first..first + count).contains(&intid))
}

fn set_pending(gic: &mut Gic, intid: u32, pending: bool) {
    let clear = if pending { 0 } else { 0x80 };
    write(
        &mut gic.distributor,
        PENDING + clear + intid / 32 * 4,
        1 << (intid % 32),
    );
}

/// Sets the level of a line. An interrupt that is triggered by edges stays pending.
fn set_level(intid: u32, level: bool) -> Outcome {
    with(|gic| {
        let is_shared = (SHARED.0..SHARED.0 + SHARED.1).contains(&intid);
        if !is_shared || is_message(gic, intid) {
            return Err(Code::BAD_ARGUMENT);
        }
        let kind = read(&gic.distributor, KIND + intid / 16 * 4) >> (intid % 16 * 2);
        if level || kind & 0b10 == 0 {
            set_pending(gic, intid, level);
        }
        Ok(())
    })?;
    update();
    Ok(())
}

framework! {
    fn hv_gic_set_spi(intid: u32, level: bool) {
        set_level(intid, level)
    }

    fn hv_gic_send_msi(address: u64, intid: u32) {
        with(|gic| {
            let (frame, ..) = gic.messages.ok_or(Code::UNSUPPORTED)?;
            if address != frame + SET_SPI || !is_message(gic, intid) {
                return Err(Code::BAD_ARGUMENT);
            }
            set_pending(gic, intid, true);
            Ok(())
        })?;
        update();
        Ok(())
    }
}
