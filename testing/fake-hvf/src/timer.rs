//! The virtual timer.

use crate::host;

/// Bits of CNTV_CTL_EL0.
const ENABLE: u64 = 1;
const MASK: u64 = 1 << 1;
const STATUS: u64 = 1 << 2;

/// The part of the timer that is in no register of the guest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VirtualTimer {
    pub offset: u64,
    /// Whether the timer causes no exit. The framework masks it at each.
    pub masked: bool,
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

/// Returns CNTP_CTL_EL0 with its status. The physical counter is the host's.
pub(crate) fn physical_control(control: u64, compared: u64) -> u64 {
    with_status(control, host::ticks() >= compared)
}

impl VirtualTimer {
    /// Returns the guest's virtual counter.
    pub(crate) fn counter(self) -> u64 {
        host::ticks().wrapping_sub(self.offset)
    }

    /// Returns CNTV_CTL_EL0 with its status.
    pub(crate) fn control(self, control: u64, compared: u64) -> u64 {
        with_status(control, self.counter() >= compared)
    }

    /// Returns whether the timer causes an exit.
    pub(crate) fn is_due(self, control: u64, compared: u64) -> bool {
        // The clock is read only for a timer that is enabled.
        let enabled = control & (ENABLE | MASK) == ENABLE;
        enabled && !self.masked && self.control(control, compared) & STATUS != 0
    }
}
