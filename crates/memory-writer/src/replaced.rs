//! Checks that a diff does not replace an image that it needs.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use image_format::{Footer, ImageId};
use nix::fcntl::OFlag;

use crate::error::SnapshotError;

/// Checks that the image at `dest`, which the new one replaces, is not one that the new one
/// `needs`. A file that cannot be read as an image is not.
pub(crate) fn check_replaced(
    dest: &Path,
    needs: impl FnOnce(ImageId) -> bool,
) -> Result<(), SnapshotError> {
    match image_at(dest) {
        Some(parent) if needs(parent) => Err(SnapshotError::ReplacesParent {
            dest: dest.to_owned(),
            parent,
        }),
        Some(_) | None => Ok(()),
    }
}

/// Returns the id of the image at `dest`, if a sealed or packed one is there.
fn image_at(dest: &Path) -> Option<ImageId> {
    // A FIFO or a device is not opened.
    let metadata = dest.metadata().ok()?;
    if !metadata.is_file() {
        return None;
    }
    // Does not wait for a process that has a lease on the file.
    let mut open = File::options();
    open.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    Footer::read_id(&open.open(dest).ok()?).ok()
}
