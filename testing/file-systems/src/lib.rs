//! The file systems that tests and test programs run on.
//!
//! [`FileSystem`] is the one table: how each is made, mounted and judged. A new file system is a
//! new entry in it. On Linux, [`LoopMount`] makes and mounts an entry on a loop device, and the
//! guards of [`TinyTmpfs`], [`HugeFs`], [`Overlay`] and [`ReadOnlyBind`] unmount what they mounted.

mod table;

#[cfg(target_os = "linux")]
mod disk;
#[cfg(target_os = "linux")]
mod loop_device;
#[cfg(target_os = "linux")]
mod loop_mount;
#[cfg(target_os = "linux")]
mod mounts;
pub mod start;
#[cfg(target_os = "linux")]
mod tool;

#[cfg(target_os = "linux")]
pub use disk::Journal;
#[cfg(target_os = "linux")]
pub use loop_device::LoopDevice;
#[cfg(target_os = "linux")]
pub use loop_mount::LoopMount;
#[cfg(target_os = "linux")]
pub use mounts::{HugeFs, Overlay, ReadOnlyBind, TinyTmpfs};
pub use table::{
    CrashStates, Disk, FileSystem, InGuest, LinuxHost, Local, MacOs, SlowCheck, Storage,
    ToolPackage,
};
#[cfg(target_os = "linux")]
pub use tool::tool;
