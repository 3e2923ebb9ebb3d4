//! Tracking of writes by userfaultfd (Linux).

mod handler;
mod pagemap;
mod protection;
mod tracker;
mod tracker_error;

pub use protection::UffdProtection;
pub use tracker::{UffdTracker, UffdTrackerOptions};
pub use tracker_error::{UffdCheckpointError, UffdProtectError, UffdTrackerError};
