//! The subcommands, a module each.

pub mod cat;
pub mod commit;
pub mod compact;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod demo;
pub mod diff;
pub mod dump;
pub mod info;
pub mod list;
pub mod man;
pub mod map;
pub mod merge;
pub mod metadata;
pub mod rebase;
pub mod restore;
#[cfg(target_os = "linux")]
pub mod serve;
pub mod sweep;
pub mod verify;
