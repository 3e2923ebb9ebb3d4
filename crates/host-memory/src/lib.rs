//! Memory of this process that vCPUs, devices or other processes write concurrently, and buffers
//! for copies of it.
//!
//! A Rust reference to such memory is undefined behavior, because `&[u8]` promises that the bytes
//! do not change. [`HostMemory`] is an address and a length instead. The kernel reads it directly
//! ([`HostMemory::write_at`], or any other system call), and [`HostMemory::copy_to`] copies it by
//! atomic loads of machine words. [`store_bytes`] and [`store_zeros`] write it by atomic stores.
//!
//! ```
//! use host_memory::{HostMemory, SecretBuffer};
//!
//! let ram = vec![7; 8192];
//! let page = HostMemory::from(&ram[..]).slice(4096..8192);
//!
//! let file = tempfile::tempfile()?;
//! assert_eq!(page.write_at(&file, 4096)?, 4096);
//!
//! let mut buffer = SecretBuffer::new();
//! let copy = buffer.sized(page.len());
//! page.copy_to(copy);
//! assert!(copy == [7; 4096]);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Buffers
//!
//! Guest memory holds keys and passwords. Both buffers are zeroed before their memory returns to
//! the allocator:
//!
//! - [`SecretBuffer`] grows to the requested length. It suits copies and comparisons.
//! - [`AlignedBuffer`] has a fixed length and an address that suits direct I/O.
//!
//! # Threads
//!
//! A signal handler that accesses guest memory must not interrupt a thread that others wait for.
//! [`BlockedSignals`] starts threads that handle no signals.
//!
//! # How it works
//!
//! Two accesses race if neither happens before the other and one of them is a store. Such a race is
//! undefined unless both are atomic. vCPUs and devices use machine stores, which are atomic for
//! each aligned word. This crate loads and stores each aligned word once, by a relaxed atomic
//! access.
//!
//! # Limitations
//!
//! - The copy of memory that is being written consists of words from several points in time.
//! - A load from memory whose page cannot be provided raises `SIGBUS`: past the end of a truncated
//!   file, on a full tmpfs, without a free huge page.
//!
//! The crate supports Linux and macOS. It has no cargo features.

mod aligned;
#[cfg(test)]
mod auto_traits;
mod memory;
mod range;
mod secret;
mod signals;
mod store;

pub use aligned::AlignedBuffer;
pub use memory::HostMemory;
pub use range::{PastEnd, available_len, check_range};
pub use secret::SecretBuffer;
pub use signals::BlockedSignals;
pub use store::{store_bytes, store_zeros};

/// Compiles the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
