//! The memory use of the test process.

use std::fs;

/// Returns the peak memory use of this process since it started or since the last
/// [`reset_peak_memory`], in bytes.
///
/// The kernel counts pages approximately: a later peak may be below an earlier one.
#[must_use]
pub fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// Sets the peak of [`peak_memory`] to the current memory use.
pub fn reset_peak_memory() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}
