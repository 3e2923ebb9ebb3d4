//! Guests whose work can prove that their RAM and their processor were saved and restored
//! correctly.
//!
//! Each [guest](guest::Guest) keeps a [`ledger`] with checksums in its RAM. It is a virtual machine
//! or a part of this process, and its writes are tracked. The [`oracle`] computes the same ledger
//! without a guest.
//!
//! `demo`, `soak` and `adaptive` run these guests. The crate is separate from them because its
//! loops read every word of the RAM: it is compiled with optimization, and they are not.

#![allow(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "for the workspace's own tasks"
)]

// The functions of the framework that hvf-backend calls.
#[cfg(hvf_fake)]
use fake_hvf as _;

pub mod embedded;
pub mod guest;
#[cfg(any(test, hvf_fake, all(target_os = "macos", target_arch = "aarch64")))]
pub mod hvf;
pub mod kind;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
pub mod ledger;
pub mod oracle;

/// The examples of the README, which use most crates: this one is compiled after them.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
