//! The physical timer of a vCPU, as data.

use serde::{Deserialize, Serialize};

/// The bits of CNTP_CTL_EL0 that the guest writes: ENABLE and IMASK.
const WRITABLE: u64 = 0b11;

/// The state of a physical timer, which only a vCPU with the framework's interrupt controller has.
///
/// The timer compares with the host's counter, which continues from another value after a restart
/// of the host. The state therefore has the time until the timer fires. In a restored guest, no
/// time of the timer has passed, although CNTPCT_EL0 has another value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PhysicalTimer {
    /// CNTP_CTL_EL0 without its status.
    pub control: u64,
    /// The number of ticks from the capture until the timer fires (CNTP_CVAL_EL0 minus the host's
    /// counter). Negative if it has fired.
    pub fires_in: i64,
}

#[cfg_attr(
    not(all(
        any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake),
        feature = "macos-15"
    )),
    cfg_attr(not(all(test, not(ramsnap_loom))), expect(dead_code))
)]
impl PhysicalTimer {
    /// Creates the state from the registers and the host's counter.
    pub(crate) fn at(control: u64, compare: u64, host_counter: u64) -> Self {
        // The largest compare value, with which a timer never fires, stays far in the future.
        let fires_in = i128::from(compare) - i128::from(host_counter);
        Self {
            control: control & WRITABLE,
            fires_in: fires_in.clamp(i64::MIN.into(), i64::MAX.into()) as i64,
        }
    }

    /// Returns CNTP_CVAL_EL0 at this value of the host's counter.
    pub(crate) fn compare(&self, host_counter: u64) -> u64 {
        host_counter.saturating_add_signed(self.fires_in)
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn time_until_the_timer_fires_is_kept() {
        let timer = PhysicalTimer::at(0b101, 1_000, 400);
        let expected = PhysicalTimer {
            control: 0b01,
            fires_in: 600,
        };
        assert_eq!(timer, expected);
        assert_eq!(timer.compare(7), 607);
        let fired = PhysicalTimer::at(0b1, 400, 1_000);
        assert_eq!(fired.fires_in, -600);
        // Before the host's counter began. It fires at once too.
        assert_eq!(fired.compare(7), 0);
    }

    #[test]
    fn timer_that_never_fires_stays_in_the_future() {
        for compare in [u64::MAX, 1 << 63] {
            let timer = PhysicalTimer::at(0b1, compare, 1 << 40);
            assert!(timer.compare(1 << 50) > 1 << 62);
            assert!(timer.compare(1) > 1 << 62);
        }
        let never = PhysicalTimer::at(0b1, u64::MAX, 0);
        assert_eq!(never.compare(u64::MAX - 1), u64::MAX);
    }
}
