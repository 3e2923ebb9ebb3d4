//! The names of this crate's files in a directory.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;

pub(crate) const PREFIX: &str = ".atomic-file-";
const LOCKED: &str = ".stage";
/// For file systems without locks: whether the writer is running cannot be determined.
const UNLOCKED: &str = ".unlocked-stage";
/// One per destination, so without an ID: see `recycle.rs`.
const RECYCLED: &str = ".spare";
/// The unpublished record of a group: see `ticket.rs`.
const TICKET: &str = ".intent";
/// The name of records of version 1.
const VERSION_1_NAME: &str = ".atomic-file-group";
/// The suffix of a published record.
const RECORD: &str = ".group";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameKind {
    Locked,
    Unlocked,
    Recycled,
    Ticket,
}

/// Returns a random ID, which other processes cannot predict.
///
/// There is no fallback to a clock or a counter: another user could predict such an ID and occupy
/// its name. `std`'s `RandomState` is not used, because it panics if the system call fails.
///
/// # Errors
/// Fails if the system returns no random numbers.
pub(crate) fn new_id() -> io::Result<u64> {
    let mut id = [0; size_of::<u64>()];
    getrandom::fill(&mut id).map_err(|error| {
        io::Error::other(format!(
            "the system returned no random number for the name of a new file ({error}): permit \
             getrandom(2), or make /dev/urandom readable"
        ))
    })?;
    Ok(u64::from_ne_bytes(id))
}

/// Returns whether `text` is an ID of [`new_id`] in hexadecimal digits.
fn is_id(text: &str) -> bool {
    text.len() == 16 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    let is_digit = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    !text.is_empty() && text.bytes().all(is_digit)
}

/// Returns the kind of a name that this module creates; `None` for other names.
pub(crate) fn kind_of_name(name: &OsStr) -> Option<NameKind> {
    let rest = name.to_str()?.strip_prefix(PREFIX)?;
    if let Some(id) = rest.strip_suffix(TICKET) {
        return is_id(id).then_some(NameKind::Ticket);
    }
    if let Some(hash) = rest.strip_suffix(RECYCLED) {
        return (hash.len() == 8 && is_hex(hash)).then_some(NameKind::Recycled);
    }
    let (rest, kind) = if let Some(rest) = rest.strip_suffix(UNLOCKED) {
        (rest, NameKind::Unlocked)
    } else {
        (rest.strip_suffix(LOCKED)?, NameKind::Locked)
    };
    let (hash, id) = rest.split_once('-')?;
    // Earlier versions used a counter with a variable number of digits.
    (hash.len() == 8 && is_hex(hash) && id.len() <= 16 && is_hex(id)).then_some(kind)
}

pub(crate) fn protocol_name(dest: &OsStr, id: u64, kind: NameKind) -> OsString {
    let hash = crc32fast::hash(dest.as_bytes());
    match kind {
        NameKind::Locked => format!("{PREFIX}{hash:08x}-{id:016x}{LOCKED}"),
        NameKind::Unlocked => format!("{PREFIX}{hash:08x}-{id:016x}{UNLOCKED}"),
        NameKind::Recycled => format!("{PREFIX}{hash:08x}{RECYCLED}"),
        NameKind::Ticket => format!("{PREFIX}{id:016x}{TICKET}"),
    }
    .into()
}

/// Returns whether `name` is that of a file staged for `dest`, or for another destination with the
/// same hash.
pub(crate) fn is_staged_for(dest: &OsStr, name: &OsStr) -> bool {
    let hash = format!("{PREFIX}{:08x}-", crc32fast::hash(dest.as_bytes()));
    kind_of_name(name) == Some(NameKind::Locked) && name.as_bytes().starts_with(hash.as_bytes())
}

pub(crate) fn recycled_name(dest: &OsStr) -> OsString {
    protocol_name(dest, 0, NameKind::Recycled)
}

/// Returns whether `name` is the name of a published record.
pub(crate) fn is_record_name(name: &OsStr) -> bool {
    let id = || name.to_str()?.strip_prefix(PREFIX)?.strip_suffix(RECORD);
    name == VERSION_1_NAME || id().is_some_and(is_id)
}

/// Returns the name of the record with this ID.
pub(crate) fn record_name(id: u64) -> OsString {
    format!("{PREFIX}{id:016x}{RECORD}").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    proptest! {
        #[test]
        fn protocol_names_are_short_and_recognized(
            dest in proptest::collection::vec(1u8.., 1..=255),
            id: u64,
            kind in prop_oneof![
                Just(NameKind::Locked), Just(NameKind::Unlocked), Just(NameKind::Recycled),
                Just(NameKind::Ticket),
            ],
        ) {
            let name = protocol_name(OsStr::from_bytes(&dest), id, kind);
            prop_assert_eq!(kind_of_name(&name), Some(kind));
            prop_assert!(name.len() <= 64);
        }
    }

    #[rstest]
    #[case("")]
    #[case("memory.bin")]
    #[case(".atomic-file-group")]
    #[case(".atomic-file-.stage")]
    #[case(".atomic-file-0123456-0.stage")]
    #[case(".atomic-file-01234567-.stage")]
    #[case(".atomic-file-01234567-0.stage~")]
    #[case(".atomic-file-0123456G-0.stage")]
    #[case(".atomic-file-01234567-00000000000000000.stage")]
    #[case("x.atomic-file-01234567-0.stage")]
    #[case(".atomic-file-0123456.spare")]
    #[case(".atomic-file-0123456G.spare")]
    #[case(".atomic-file-01234567-0.spare")]
    #[case(".atomic-file-01234567.intent")]
    #[case(".atomic-file-0123456789abcdef.group")]
    fn other_names_are_not_recognized(#[case] name: &str) {
        assert_eq!(kind_of_name(OsStr::new(name)), None);
    }

    #[rstest]
    #[case(".atomic-file-group", true)]
    #[case(".atomic-file-0123456789abcdef.group", true)]
    #[case(".atomic-file-0123456789abcde.group", false)]
    #[case(".atomic-file-0123456789ABCDEF.group", false)]
    #[case(".atomic-file-0123456789abcdef.intent", false)]
    #[case("atomic-file-0123456789abcdef.group", false)]
    fn record_names_are_recognized(#[case] name: &str, #[case] is_record: bool) {
        assert_eq!(is_record_name(OsStr::new(name)), is_record);
    }
}
