//! Checks that a diff does not replace an image that it needs.

use image_format::{Footer, ImageId};

use crate::error::SnapshotError;
use crate::target::Target;

/// Checks that the image that `target` replaces is not one that the new one `needs`. A file that
/// cannot be read as an image is not.
pub(crate) fn check_replaced(
    target: &Target,
    needs: impl FnOnce(ImageId) -> bool,
) -> Result<(), SnapshotError> {
    match image_replaced_by(target) {
        Some(parent) if needs(parent) => Err(SnapshotError::ReplacesParent {
            dest: target.dest_path().to_owned(),
            parent,
        }),
        Some(_) | None => Ok(()),
    }
}

/// Returns the id of the image that the commit replaces, if it is a sealed or packed one.
fn image_replaced_by(target: &Target) -> Option<ImageId> {
    let Target::Staged(staged) = target else {
        return None;
    };
    // The path may lead elsewhere by now.
    Footer::read_id(&staged.open_replaced().ok()??).ok()
}
