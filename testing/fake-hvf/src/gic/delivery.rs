//! Shared interrupts, and the vCPUs to which they are signalled.
//!
//! The guest takes the interrupt and can't acknowledge it: its instructions do not reach the CPU
//! interface.

use std::sync::atomic::Ordering;

use crate::calls::{Code, Outcome, framework};
use crate::gic_registers::{KIND, SHARED, is_message, is_signalled, read, set_pending};
use crate::machine::with_gic;
use crate::vcpus;

/// The offset of GICM_SETSPI_NSR in the frame for messages.
const SET_SPI: u64 = 0x40;

/// Signals to each vCPU what is pending for it.
pub(super) fn update() {
    let _ = with_gic(|gic| {
        for vcpu in vcpus::in_order() {
            let interface = vcpu.cpu_interface();
            let affinity = vcpu.affinity.load(Ordering::SeqCst);
            let signalled = (SHARED.0..SHARED.0 + SHARED.1)
                .any(|intid| is_signalled(&gic.distributor, intid, affinity, &interface));
            vcpu.interrupt.store(signalled, Ordering::SeqCst);
        }
        Ok(())
    });
}

/// Sets the level of a line. An interrupt that is triggered by edges stays pending.
fn set_level(intid: u32, level: bool) -> Outcome {
    with_gic(|gic| {
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
        with_gic(|gic| {
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
