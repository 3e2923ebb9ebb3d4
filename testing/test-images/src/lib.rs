//! Images for tests, and the RAM that they represent.
//!
//! This crate writes images and opens none: the crates that read them use it in their tests.

#![allow(
    clippy::missing_panics_doc,
    reason = "a preparation that fails is a failed test"
)]

#[cfg(target_os = "linux")]
mod claimed_ram;
mod handmade;
mod images;
mod random_chain;
#[cfg(target_os = "linux")]
mod secrets;

#[cfg(target_os = "linux")]
pub use claimed_ram::{image_of_zeros, with_little_memory};
pub use handmade::{write_packed, write_version_1};
pub use images::{Images, whole};
pub use random_chain::{Form, Layer, RandomGuest, layer};
#[cfg(target_os = "linux")]
pub use secrets::{Secrets, found_secrets, save_secrets};
