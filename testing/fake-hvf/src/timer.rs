//! The virtual timer.

use crate::calls::{framework, give};
use crate::emulation::State;
use crate::macos::mach_absolute_time;
use crate::system_registers::{CNTP_CTL_EL0, CNTP_CVAL_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0};
use crate::vcpu;

/// The frequency of the counter in Hz.
pub(crate) const FREQUENCY: u64 = 24_000_000;

/// Bits of CNTV_CTL_EL0.
const ENABLE: u64 = 1;
const MASK: u64 = 1 << 1;
const STATUS: u64 = 1 << 2;

/// The part of the timer that is in no register of the guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VirtualTimer {
    offset: u64,
    /// Whether the timer causes no exit. The framework masks it at each.
    masked: bool,
}

fn with_status(control: u64, met: bool) -> u64 {
    let control = control & (ENABLE | MASK);
    let status = if control & ENABLE != 0 && met {
        STATUS
    } else {
        0
    };
    control | status
}

impl State {
    /// Returns the guest's virtual counter.
    pub(crate) fn counter(&self) -> u64 {
        mach_absolute_time().wrapping_sub(self.timer.offset)
    }

    /// Returns CNTV_CTL_EL0 with its status.
    pub(crate) fn timer_control(&self) -> u64 {
        let met = self.counter() >= self.system.get(CNTV_CVAL_EL0);
        with_status(self.system.get(CNTV_CTL_EL0), met)
    }

    /// Returns CNTP_CTL_EL0 with its status. The physical counter is the host's.
    pub(crate) fn physical_timer_control(&self) -> u64 {
        let met = mach_absolute_time() >= self.system.get(CNTP_CVAL_EL0);
        with_status(self.system.get(CNTP_CTL_EL0), met)
    }

    pub(crate) fn timer_is_due(&self) -> bool {
        // The clock is read only for a timer that is enabled.
        let enabled = self.system.get(CNTV_CTL_EL0) & (ENABLE | MASK) == ENABLE;
        enabled && !self.timer.masked && self.timer_control() & STATUS != 0
    }

    /// Returns whether the timer causes an exit, and masks it then.
    pub(crate) fn timer_fires(&mut self) -> bool {
        let fires = self.timer_is_due();
        self.timer.masked |= fires;
        fires
    }
}

framework! {
    fn hv_vcpu_get_vtimer_mask(id: u64, masked: *mut bool) {
        vcpu::own(id, |vcpu| give(masked, vcpu.emulation.state().timer.masked))
    }

    fn hv_vcpu_set_vtimer_mask(id: u64, masked: bool) {
        vcpu::own(id, |vcpu| {
            vcpu.emulation.state().timer.masked = masked;
            Ok(())
        })
    }

    fn hv_vcpu_get_vtimer_offset(id: u64, offset: *mut u64) {
        vcpu::own(id, |vcpu| give(offset, vcpu.emulation.state().timer.offset))
    }

    fn hv_vcpu_set_vtimer_offset(id: u64, offset: u64) {
        vcpu::own(id, |vcpu| {
            vcpu.emulation.state().timer.offset = offset;
            Ok(())
        })
    }
}
