//! The synchronization primitives: those of loom under `--cfg memsnap_loom`, those of std
//! otherwise.

#[cfg(memsnap_loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(memsnap_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};

#[cfg(not(memsnap_loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(memsnap_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};
