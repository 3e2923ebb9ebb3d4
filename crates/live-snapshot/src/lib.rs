//! Snapshots of a running guest, whose pause does not grow with the guest's RAM.

#[cfg_attr(ramsnap_loom, allow(dead_code, reason = "the models use a part"))]
mod capture;
#[cfg(not(ramsnap_loom))]
mod error;
#[cfg(not(ramsnap_loom))]
mod frozen_ram;
#[cfg(all(feature = "hvf", not(ramsnap_loom)))]
mod hvf;
#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
mod linux;
mod options;
#[cfg(not(ramsnap_loom))]
mod order;
#[cfg(not(ramsnap_loom))]
mod pacer;
mod page_states;
#[cfg_attr(ramsnap_loom, allow(dead_code, reason = "the models use a part"))]
mod pool;
#[cfg(not(ramsnap_loom))]
mod precopy;
#[cfg(not(ramsnap_loom))]
mod report;
#[cfg(not(ramsnap_loom))]
mod settings;
#[cfg(not(ramsnap_loom))]
mod slot;
#[cfg(not(ramsnap_loom))]
mod snapshot;
mod sync;
#[cfg(not(ramsnap_loom))]
mod tracker;

pub use options::{Method, WhenPoolFull};

#[cfg(not(ramsnap_loom))]
pub use error::LiveError;
#[cfg(all(feature = "hvf", not(ramsnap_loom)))]
pub use hvf::LiveStage2;
#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
pub use linux::{
    UffdCheckpointError, UffdProtectError, UffdProtection, UffdTracker, UffdTrackerError,
    UffdTrackerOptions,
};
#[cfg(not(ramsnap_loom))]
pub use memory_writer::CancelToken;
#[cfg(not(ramsnap_loom))]
pub use report::{Convergence, PreCopyPass, Report, StopReason};
#[cfg(not(ramsnap_loom))]
pub use settings::LiveSnapshotOptions;
#[cfg(not(ramsnap_loom))]
pub use slot::{CaptureSlot, CopyOnWrite};
#[cfg(not(ramsnap_loom))]
pub use snapshot::{Frozen, LiveSnapshot, Written};
#[cfg(not(ramsnap_loom))]
pub use tracker::{CheckpointFailed, LiveTracker};
