//! Checks that a diff does not replace an image that it needs.

use atomic_file::AtomicWriter;
use image_format::{Footer, ImageId};

use crate::error::SnapshotError;

/// Checks that the image that `staged` replaces is not one that the new one `needs`. A file that
/// cannot be read as an image is not.
pub(crate) fn check_replaced(
    staged: &AtomicWriter,
    needs: impl FnOnce(ImageId) -> bool,
) -> Result<(), SnapshotError> {
    match image_replaced_by(staged) {
        Some(parent) if needs(parent) => Err(SnapshotError::ReplacesParent {
            dest: staged.dest_path().to_owned(),
            parent,
        }),
        Some(_) | None => Ok(()),
    }
}

/// Returns the id of the image that the commit replaces, if it is a sealed or packed one. The path
/// may lead elsewhere by now.
fn image_replaced_by(staged: &AtomicWriter) -> Option<ImageId> {
    Footer::read_id(&staged.open_replaced().ok()??).ok()
}
