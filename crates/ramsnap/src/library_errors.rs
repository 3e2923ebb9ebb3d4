//! The exit status of a failure, by its causes.

use std::io;

use image_format::FooterError;
use memory_image::{
    ChainError, CompareError, LinkError, MergeError, NotFullError, OpenImageError, ReadImageError,
    RestoreError, VerifyError,
};
use memory_writer::{OpenError, RamError, SnapshotError};
use nix::errno::Errno;

use crate::exit_status::ExitStatus;
use crate::failure::{Failure, FormatFailure, ImagesFailure};
use crate::{input, interrupt};

/// Returns the exit status for `error`: that of the first cause that has one.
pub fn exit_status(error: &anyhow::Error) -> ExitStatus {
    error
        .chain()
        .find_map(code_of)
        .unwrap_or(ExitStatus::Failed)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<ExitStatus> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.exit_status());
    }
    if cause.is::<FormatFailure>() {
        return Some(ExitStatus::Usage);
    }
    if let Some(failure) = cause.downcast_ref::<ImagesFailure>() {
        return Some(failure.exit_status());
    }
    if is_cancellation(cause) {
        return Some(interrupt::exit_status());
    }
    // The full image is not on the command line.
    if cause.is::<NotFullError>() {
        return Some(ExitStatus::Usage);
    }
    if let Some(ReadImageError::NotInDiffs { .. }) = cause.downcast_ref() {
        return Some(ExitStatus::Usage);
    }
    if let Some(MergeError::NotFull(_)) = cause.downcast_ref() {
        return Some(ExitStatus::Usage);
    }
    if let Some(error) = cause.downcast_ref() {
        return of_opening(error);
    }
    if let Some(SnapshotError::Ram(error)) = cause.downcast_ref() {
        return Some(of_sizes(error));
    }
    if let Some(SnapshotError::ReplacesParent { .. }) = cause.downcast_ref() {
        return Some(ExitStatus::Usage);
    }
    if let Some(
        OpenError::MagicLink { .. }
        | OpenError::NotAFile { .. }
        | OpenError::NoFileName { .. }
        | OpenError::ReservedName { .. },
    ) = cause.downcast_ref()
    {
        return Some(ExitStatus::Usage);
    }
    if is_wrong_kind(cause) {
        return Some(ExitStatus::Usage);
    }
    #[cfg(target_os = "linux")]
    if cause.is::<process_memory::FindRegionError>() {
        return Some(ExitStatus::Usage);
    }
    if let Some(CompareError::Geometry(_)) = cause.downcast_ref() {
        return Some(ExitStatus::Usage);
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            // Not of the system: the file is a directory or a device.
            vmm_files::OpenError::Io { source, .. }
                if source.kind() == io::ErrorKind::InvalidInput
                    && source.raw_os_error().is_none() =>
            {
                Some(ExitStatus::Usage)
            }
            vmm_files::OpenError::Io { .. } => None,
            _ => Some(ExitStatus::CheckFailed),
        };
    }
    if cause.is::<vmm_files::PlanError>() {
        return Some(ExitStatus::Usage);
    }
    match cause.downcast_ref()? {
        ChainError::Open(error) => of_opening(error),
        // Of --page-size: the file is a whole number of the smallest pages.
        ChainError::NotWholePages { size, .. } if size.is_multiple_of(input::RAW_PAGE) => {
            Some(ExitStatus::Usage)
        }
        ChainError::PageSizeDiffers { .. } => Some(ExitStatus::Usage),
        // Of the command line: the full image is missing, or the order is another.
        ChainError::NotFull(_) => Some(ExitStatus::Usage),
        ChainError::Link { why, .. } => Some(match why {
            LinkError::Repeated | LinkError::Full | LinkError::Reordered { .. } => {
                ExitStatus::Usage
            }
            _ => ExitStatus::CheckFailed,
        }),
        // Properties of an image.
        ChainError::NotWholePages { .. }
        | ChainError::SizeDiffers { .. }
        | ChainError::RegionsDiffer { .. }
        | ChainError::AmbiguousDiff { .. } => Some(ExitStatus::CheckFailed),
        _ => None,
    }
}

/// Returns whether a signal has cancelled the operation.
fn is_cancellation(cause: &(dyn std::error::Error + 'static)) -> bool {
    #[cfg(target_os = "linux")]
    if let Some(process_memory::ProcessStopError::Cancelled { .. }) = cause.downcast_ref() {
        return true;
    }
    matches!(cause.downcast_ref(), Some(SnapshotError::Cancelled { .. }))
        || matches!(cause.downcast_ref(), Some(CompareError::Cancelled { .. }))
        || matches!(cause.downcast_ref(), Some(RestoreError::Cancelled { .. }))
        || matches!(cause.downcast_ref(), Some(VerifyError::Cancelled))
}

/// Returns whether a file is named where a directory must be, or the reverse.
fn is_wrong_kind(cause: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(errno) = cause.downcast_ref() {
        return matches!(errno, Errno::ENOTDIR | Errno::EISDIR);
    }
    let kind = cause.downcast_ref().map(io::Error::kind);
    matches!(
        kind,
        Some(io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory)
    )
}

/// Returns the exit status for sizes of RAM and pages that no image can have.
fn of_sizes(error: &RamError) -> ExitStatus {
    match error {
        RamError::NoRam | RamError::TooLarge { .. } => ExitStatus::Failed,
        // The page size is an option, or does not fit the RAM without it.
        _ => ExitStatus::Usage,
    }
}

/// Returns the exit status for an image that cannot be opened.
fn of_opening(error: &OpenImageError) -> Option<ExitStatus> {
    match error {
        OpenImageError::NotAFile { .. } | OpenImageError::NotSeekable { .. } => {
            Some(ExitStatus::Usage)
        }
        OpenImageError::Empty { .. } | OpenImageError::NotRaw { .. } => {
            Some(ExitStatus::CheckFailed)
        }
        OpenImageError::Footer { source, .. } => match source {
            FooterError::Io { .. } | FooterError::Append => Some(ExitStatus::Failed),
            _ => Some(ExitStatus::CheckFailed),
        },
        _ => None,
    }
}
