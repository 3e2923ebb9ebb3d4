//! Messages for users of the command line.
//!
//! The errors of the libraries are written for programs. If one names a function or type to use,
//! ramsnap prints another message, or adds the command to type.

use std::io;

use atomic_file::RecoverError;
use image_format::FooterError;
use memory_image::{ChainError, LinkError, OpenImageError};
use memory_writer::{CommitError, OpenError, SnapshotError};

use crate::failure::Failure;
use crate::{stderr, stream};

/// Returns the message of an error with all of its causes. Messages of libraries that are written
/// for programs are replaced.
pub fn text(error: &anyhow::Error) -> String {
    let causes = error
        .chain()
        .map(|cause| own_words(cause).unwrap_or_else(|| without_reason(cause)));
    // A compressed image has a reason of its own.
    let compressed = error.chain().find_map(of_compressed);
    let before = error
        .chain()
        .take_while(|cause| of_compressed(*cause).is_none())
        .count();
    // An I/O error that only wraps another error has the same text.
    let mut causes: Vec<_> = causes.take(before).chain(compressed).collect();
    causes.dedup();
    causes.join(": ")
}

/// Returns the text of an error without that of its source, which the texts of the libraries
/// contain: it is printed next, perhaps in other words.
fn without_reason(cause: &(dyn std::error::Error + 'static)) -> String {
    let text = cause.to_string();
    match cause.source() {
        Some(source) => text.replacen(&format!(": {source}"), "", 1),
        None => text,
    }
}

/// Prints to stderr what failed, and what to do about it, as one sentence.
pub fn print_error(error: &anyhow::Error) {
    let text = text(error);
    stderr::line(&match advice(error) {
        Some(advice) => format!("error: {text}; {advice}"),
        None => format!("error: {text}"),
    });
}

/// Returns the message for an image that is compressed.
fn of_compressed(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    let Some(OpenImageError::Footer {
        path,
        source: FooterError::NotSealed,
    }) = cause
        .downcast_ref()
        .or_else(|| match cause.downcast_ref()? {
            ChainError::Open(error) => Some(error),
            _ => None,
        })
    else {
        return None;
    };
    stream::is_compressed(path).then(|| {
        format!(
            "{path:?} is named as a compressed image, which only `ramsnap convert` reads: decompress it first, by \
             `ramsnap convert FILE.zst -o FILE`"
        )
    })
}

/// Returns the message that replaces that of an error that names a part of a library.
fn own_words(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error) = cause.downcast_ref() {
        return of_opening(error).or_else(|| Some(recovering(&without_reason(cause))));
    }
    if cause.is::<RecoverError>() {
        return Some(recovering(&without_reason(cause)));
    }
    if let Some(error) = cause.downcast_ref() {
        return of_snapshot(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return of_chain(error);
    }
    if let Some(why) = cause.downcast_ref() {
        return of_link(why);
    }
    match cause.downcast_ref()? {
        FooterError::Version { version } => Some(format!(
            "its footer is of version {version}, and this ramsnap reads up to version 2: use a later one"
        )),
        _ => None,
    }
}

fn of_opening(error: &OpenError) -> Option<String> {
    match error {
        OpenError::DanglingSymlink { path, target } => Some(format!(
            "{path:?} is a symbolic link to {target:?}, which does not exist (a disk not mounted?)"
        )),
        OpenError::UntrustedSymlink { path, owner } => Some(format!(
            "{path:?} is a symbolic link of user {owner}, which another user may have put there"
        )),
        OpenError::AlreadyExists { path } => {
            let path = path.clone();
            Some(Failure::OutputExists { path }.to_string())
        }
        OpenError::NoClobberUnsupported { path, .. } => Some(format!(
            "the file system of {path:?} cannot put a file in place without replacing what may be there"
        )),
        OpenError::NotPreserved { path, source } => {
            Some(format!("{path:?} would lose its {}", source.attribute))
        }
        _ => None,
    }
}

fn of_snapshot(error: &SnapshotError) -> Option<String> {
    match error {
        SnapshotError::Id { dest, .. } => Some(format!(
            "there are no random numbers for the id of {dest:?}"
        )),
        SnapshotError::AmbiguousDiff { dest, .. } => {
            Some(format!("the raw diff {dest:?} could not be read back"))
        }
        SnapshotError::ReplacesParent { dest, parent } => Some(format!(
            "the output {dest:?} is image {parent}, which the diff builds on: name another output"
        )),
        _ => None,
    }
}

fn of_link(why: &LinkError) -> Option<String> {
    Some(match why {
        LinkError::NoParent => "it names no parent".to_owned(),
        LinkError::Repeated => "it is named twice: name each image once".to_owned(),
        LinkError::Full => {
            "it is a full image: name it first, and its diffs after it, oldest first".to_owned()
        }
        LinkError::Reordered { parent } => format!(
            "it was taken after {parent:?}: name the images of one branch, in the order in which they were taken"
        ),
        LinkError::Missing { parent, newest } => format!(
            "it was taken after the image {parent}, which is not in the chain, and the one before it is {newest}: name \
             the image {parent} too, which `ramsnap list` finds, unless it was replaced since"
        ),
        _ => return None,
    })
}

fn of_chain(error: &ChainError) -> Option<String> {
    match error {
        ChainError::Link {
            path,
            newest,
            why: LinkError::Full | LinkError::Repeated,
        } => Some(format!("{path:?} cannot follow {newest:?}")),
        ChainError::AmbiguousDiff { path, .. } => {
            Some(format!("cannot tell which pages the diff {path:?} holds"))
        }
        ChainError::PageSizeDiffers { path, image, chain } => Some(format!(
            "{path:?} has pages of {image} bytes, smaller than the {chain} of --page-size: give {image} or \
             less, or leave it out"
        )),
        _ => None,
    }
}

/// A message or reason of `atomic-file`, with the command for the function that it names.
pub fn recovering(text: &str) -> String {
    text.replace("call `recover`", "run `ramsnap sweep --recover`")
}

/// Returns the remedy on the command line for an error whose message names one for programs.
pub fn advice(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        if let Some(SnapshotError::AmbiguousDiff { .. }) = cause.downcast_ref() {
            return Some("add --layout packed or --layout sealed");
        }
        if is_locked(cause) {
            return Some(LOCKED);
        }
        #[cfg(target_os = "linux")]
        if let Some(process_memory::ProcessStopError::Unresponsive { .. }) = cause.downcast_ref() {
            return Some("add --patience TIME to wait longer for it");
        }
        if let Some(SnapshotError::Open(error)) = cause.downcast_ref() {
            return match error {
                OpenError::DestinationChanged { .. } => Some(AFTER_ANOTHER_WRITER),
                OpenError::NoClobberUnsupported { .. } => Some("add --force"),
                OpenError::Recover { .. } => Some("see `ramsnap sweep --recover`"),
                OpenError::DanglingSymlink { .. } | OpenError::UntrustedSymlink { .. } => {
                    Some("name the file that the link is to lead to, or remove the link")
                }
                OpenError::MagicLink { .. } => Some(
                    "only `restore` writes to an open file, and `convert FILE -o - --zstd` to stdout",
                ),
                _ => None,
            };
        }
        if let Some(SnapshotError::Commit(CommitError::DestinationChanged { .. })) =
            cause.downcast_ref()
        {
            return Some(AFTER_ANOTHER_WRITER);
        }
        if let Some(OpenImageError::Footer { path, source }) = cause.downcast_ref() {
            return match source {
                FooterError::NotSealed if stream::is_compressed(path) => None,
                FooterError::NotSealed
                | FooterError::Truncated { .. }
                | FooterError::Trailing { .. } => {
                    Some("give a raw image as raw:FILE, and RAM to `diff` by --ram")
                }
                FooterError::Ambiguous { .. } => {
                    Some("give it as raw:FILE, sealed:FILE or packed:FILE")
                }
                _ => None,
            };
        }
        match cause.downcast_ref()? {
            ChainError::AmbiguousDiff { .. } => {
                Some("add --trust-holes to take the holes for clean pages all the same")
            }
            ChainError::Link {
                why: LinkError::NoParent,
                ..
            } => Some("`ramsnap convert --raw-diff --parent` seals a raw diff with its parent"),
            ChainError::Link {
                why: LinkError::OnRaw { .. },
                ..
            } => Some(
                "if the raw image before it is that image, `ramsnap convert raw:FILE -o NEW --layout sealed --id` \
                 with this id seals it",
            ),
            _ => None,
        }
    })
}

/// Returns whether `cause` is that a process holds a lock on the file to be replaced.
fn is_locked(cause: &(dyn std::error::Error + 'static)) -> bool {
    let Some(SnapshotError::Open(_) | SnapshotError::Commit(_)) = cause.downcast_ref() else {
        return false;
    };
    std::iter::successors(cause.source(), |cause| cause.source())
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::WouldBlock)
}

const LOCKED: &str = "a process holds an flock on this file, which keeps writers from replacing it: wait for its end, or \
     end it (`lslocks` lists it); `flock FILE ramsnap ...` locks the file against ramsnap itself: lock another file";

const AFTER_ANOTHER_WRITER: &str = "nothing was replaced; look at the file with `ramsnap info`, and run this again if it still applies";

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn each_reason_is_printed_once() {
        let opening = OpenError::Io {
            operation: "inspect",
            path: PathBuf::from("/x"),
            source: io::ErrorKind::PermissionDenied.into(),
        };
        let error = SnapshotError::Open(opening);
        let reason = "permission denied";
        let alone = error.to_string();
        assert!(
            alone.contains("inspect") && alone.contains(reason),
            "{alone}"
        );
        let text = text(&anyhow::Error::new(error).context("cannot save"));
        assert_eq!(text.matches(reason).count(), 1, "{text}");
        assert_eq!(text.matches("cannot inspect").count(), 1, "{text}");
        let parts = [
            "cannot save: ",
            ": cannot inspect \"/x\": permission denied",
        ];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn a_reason_in_other_words_replaces_that_of_the_library() {
        let error = ChainError::Link {
            path: PathBuf::from("d"),
            newest: PathBuf::from("f"),
            why: LinkError::NoParent,
        };
        assert!(error.to_string().contains(&LinkError::NoParent.to_string()));
        let text = text(&error.into());
        assert!(text.ends_with(": it names no parent"), "{text}");
        assert!(!text.contains(&LinkError::NoParent.to_string()), "{text}");
    }
}
