//! The subcommands, a module each.

pub mod completions;
pub mod convert;
pub mod demo;
pub mod diff;
pub mod dump;
pub mod info;
pub mod man;
pub mod map;
pub mod merge;
pub mod restore;
#[cfg(target_os = "linux")]
pub mod serve;
pub mod sweep;
pub mod verify;
