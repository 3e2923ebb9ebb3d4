//! The time that a write fault of stage 2 takes on a Mac.

use std::time::Duration;

use dirty_bitmap::Costs;

/// The page size of stage 2 below which a fault takes longer, in bytes.
const LARGE_PAGE: u64 = 16 << 10;

/// Returns the costs of tracking with stage 2 in pages of `page_size` bytes: a write fault takes
/// 3.7 microseconds in pages of 16 KiB, and 4.7 microseconds in pages of 4 KiB. The rate of the
/// disk is that of [`Costs::DEFAULT`].
///
/// The times were measured by others on an M5, from the guest's store to the store after it. They
/// were not measured by this project. The step `costs` of the example `selftest` measures them on
/// the Mac that it runs on, and [`Costs::measure`] does in a program.
///
/// # Examples
/// ```
/// use dirty_bitmap::Policy;
/// use hvf_backend::fault_costs;
///
/// let policy = Policy::Cost(fault_costs(16 << 10)); // for `Stage2::track`
/// # let Policy::Cost(costs) = policy else { unreachable!() };
/// # assert_eq!(costs.fault.as_nanos(), 3_700);
/// ```
#[must_use]
pub fn fault_costs(page_size: u64) -> Costs {
    let nanos = if page_size < LARGE_PAGE { 4_700 } else { 3_700 };
    Costs {
        fault: Duration::from_nanos(nanos),
        ..Costs::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_takes_longer_in_small_pages() {
        let (small, large) = (fault_costs(4 << 10), fault_costs(16 << 10));
        assert_eq!(small.fault, Duration::from_nanos(4_700));
        assert_eq!(large.fault, Duration::from_nanos(3_700));
        assert_eq!(small.write_mib, Costs::DEFAULT.write_mib);
    }
}
