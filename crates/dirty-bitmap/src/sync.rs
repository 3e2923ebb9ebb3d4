//! The synchronization primitives: those of loom under `--cfg ramsnap_loom`, those of std
//! otherwise.

#[cfg(ramsnap_loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(ramsnap_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};

#[cfg(not(ramsnap_loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(ramsnap_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};
