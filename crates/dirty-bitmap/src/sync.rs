//! The primitives that every interleaving is decided by: loom's under `--cfg memsnap_loom`, std's otherwise.

#[cfg(memsnap_loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(memsnap_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};

#[cfg(not(memsnap_loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(memsnap_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};
