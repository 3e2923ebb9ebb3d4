//! What a page server has done, in numbers.

use std::time::Duration;

use crate::counters::{BOUNDS, Counters, FillReason};

/// What a page server has done since it was created, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerMetrics {
    /// The number of VMs that are being served.
    pub vms: u64,
    /// The number of VMs whose RAM was filled completely.
    pub filled_vms: u64,
    /// The number of VMs that have exited before.
    pub exited_vms: u64,
    /// The number of VMs that could not be served to the end.
    pub failed_vms: u64,
    /// The number of clients that were not served at all.
    pub refused_clients: u64,
    /// The number of faults that were handled.
    pub faults: u64,
    /// The sum of the times from receiving a fault to filling its page and its neighbors.
    pub fault_time: Duration,
    /// Upper bounds of these times in microseconds, and the number of faults that took no longer.
    pub fault_times: Vec<(u64, u64)>,
    /// Bytes of the images that were filled because an access waited for them or for a neighbor.
    pub bytes_by_faults: u64,
    /// Bytes of the images that were filled because they are in the working set.
    pub bytes_by_working_set: u64,
    /// Other bytes of the images that were filled in the background.
    pub bytes_by_prefetch: u64,
    /// Bytes that are zeros in the images, and were filled.
    pub zero_bytes: u64,
    /// Bytes that VMs have discarded (balloon).
    pub removed_bytes: u64,
    /// Bytes that cannot be read, and were poisoned.
    pub poisoned_bytes: u64,
}

impl ServerMetrics {
    pub(super) fn of(counters: &Counters) -> Self {
        Self {
            faults: counters.faults(),
            fault_time: counters.latency_sum(),
            fault_times: BOUNDS.into_iter().zip(counters.latencies()).collect(),
            bytes_by_faults: counters.bytes(FillReason::Fault),
            bytes_by_working_set: counters.bytes(FillReason::WorkingSet),
            bytes_by_prefetch: counters.bytes(FillReason::Prefetch),
            zero_bytes: counters.bytes(FillReason::Zeros),
            removed_bytes: counters.bytes(FillReason::Removed),
            poisoned_bytes: counters.bytes(FillReason::Poisoned),
            ..Self::default()
        }
    }
}
