//! Errors of the formats that files are named with.

use std::path::PathBuf;

use thiserror::Error;

/// An error of a format on the command line: wrong usage.
#[derive(Debug, Error)]
pub enum FormatFailure {
    #[error(
        "{path:?} does not exist, and {prefix:?} is not a format that is read, which are {formats}: name one of \
         these, or if this is the name of a file, its directory too (./{prefix}:FILE)"
    )]
    UnknownFormat {
        path: PathBuf,
        prefix: String,
        formats: String,
    },
    #[error(
        "{path:?} names a LiME file, which is only written, by `ramsnap convert --to lime`, and never read: name a file \
         of a format that is read, which are {formats}"
    )]
    LimeIsWritten { path: PathBuf, formats: String },
    #[error(
        "{path:?} names a memory file of Firecracker, which is raw: name it as raw:FILE, and add --guest firecracker to \
         `ramsnap convert` for its addresses; the formats that are read are {formats}"
    )]
    FirecrackerIsRaw { path: PathBuf, formats: String },
    #[error(
        "--ram-block is for the files of QEMU and libvirt, and {path:?} is not named as one: name it as qemu:FILE or \
         libvirt:FILE, or leave out --ram-block"
    )]
    NoRamBlocks { path: PathBuf },
}
