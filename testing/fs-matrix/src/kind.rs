//! The kinds of mount that the matrix can make: entries of the table of file systems.

use file_systems::{FileSystem, LinuxHost};

/// A file system, as the library meets it.
pub(crate) type Kind = &'static FileSystem;

/// Where a kind can be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// By this machine's kernel.
    Here,
    /// By Debian's kernel in QEMU.
    Guest,
    /// Not on this system.
    Nowhere,
}

/// Returns where this system mounts `kind`.
pub(crate) fn place(kind: Kind) -> Place {
    if cfg!(target_os = "macos") {
        return kind.macos.map_or(Place::Nowhere, |_| Place::Here);
    }
    match kind.linux {
        Some(LinuxHost::Local) => Place::Here,
        Some(LinuxHost::Guest) => Place::Guest,
        None => Place::Nowhere,
    }
}

/// Returns the kinds that this system can mount.
pub(crate) fn here() -> impl Iterator<Item = Kind> {
    FileSystem::in_matrix().filter(|kind| place(kind) != Place::Nowhere)
}
