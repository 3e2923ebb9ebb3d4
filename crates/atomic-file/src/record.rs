//! The group record: file names and binary format.
//!
//! # Names
//! The name of a record is `.atomic-file-ID.group`. ID is 16 random hexadecimal digits, so that no
//! other user can predict and occupy the name. A directory may hold several records. An unpublished
//! record, which is its group's ticket (see `ticket.rs`), is named `.atomic-file-ID.intent`. In
//! version 1 the name was `.atomic-file-group`; it is still read.
//!
//! # Bytes
//! Version 3, little-endian:
//!
//! | bytes | contents |
//! |---|---|
//! | 8 | `ATOMGRP\n` |
//! | 4 | version |
//! | 4 | number of members |
//! | 8 | length of the record in bytes |
//! | per member: 8 | inode number of the staged file |
//! | 8 | its size in bytes |
//! | 1 | what the destination was when the record was written: 0 nothing, 1 a file, 2 unknown |
//! | 8 | that file's inode number |
//! | 8 | its generation: nanoseconds since 1970 at its creation, or a digest of its handle |
//! | 2 + n | length of the staged file's name, and the name |
//! | 2 + n | length of the destination's name, and the name |
//! | 4 | CRC-32 of all preceding bytes |
//!
//! In version 2 the generation is 0 if the file system stores no time of creation. Version 1 lacks
//! the record's length and the three fields about the destination.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

const MAGIC: &[u8; 8] = b"ATOMGRP\n";
const VERSION: u32 = 3;
/// The first version with the record's length and the old destination.
const WITH_DESTINATION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) old: Old,
    pub(crate) staged: OsString,
    pub(crate) dest: OsString,
}

/// The state of a destination just before its group was published.
///
/// If it differs now, a later commit replaced the destination. A recovery must not undo that
/// commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    Nothing,
    /// Inode numbers are reused, so the [generation](crate::directory::Directory::generation) is
    /// stored too.
    File {
        inode: u64,
        generation: u64,
    },
    /// Not recorded, in version 1.
    Unknown,
}

/// An error of decoding a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// The record was not written completely: a power loss interrupted a group without syncs
    /// (`Durability::None`).
    Torn(&'static str),
    Damaged(&'static str),
}

use Unreadable::{Damaged, Torn};

use crate::names::{NameKind, is_record_name, kind_of_name};

/// Length of a record without members, in bytes.
pub(crate) const EMPTY: u64 = 8 + 4 + 4 + 8 + 4;

/// Returns the length in bytes that a member with these names adds to a record.
pub(crate) fn len_of_member(staged: &OsStr, dest: &OsStr) -> u64 {
    const FIXED: usize = 8 + 8 + 1 + 8 + 8 + 2 + 2;
    (FIXED + staged.len() + dest.len()) as u64
}

pub(crate) fn encode(members: &[Member]) -> Vec<u8> {
    let mut body = Vec::new();
    for member in members {
        body.extend(member.inode.to_le_bytes());
        body.extend(member.size.to_le_bytes());
        let (kind, inode, generation) = match member.old {
            Old::Nothing => (0u8, 0, 0),
            Old::File { inode, generation } => (1, inode, generation),
            Old::Unknown => (2, 0, 0),
        };
        body.push(kind);
        body.extend(inode.to_le_bytes());
        body.extend(generation.to_le_bytes());
        for name in [&member.staged, &member.dest] {
            let name = name.as_bytes();
            let len = u16::try_from(name.len()).expect("file names are far shorter");
            body.extend(len.to_le_bytes());
            body.extend(name);
        }
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32_of(members.len()).to_le_bytes());
    let len = bytes.len() + size_of::<u64>() + body.len() + size_of::<u32>();
    bytes.extend((len as u64).to_le_bytes());
    bytes.extend(body);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("fewer members than a process has descriptors")
}

/// Decodes the members of a record.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Member>, Unreadable> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(Torn("all bytes are zero"));
    }
    if MAGIC.starts_with(bytes) {
        return Err(Torn("cut short"));
    }
    let mut rest = bytes
        .strip_prefix(MAGIC)
        .ok_or(Damaged("not an intent record"))?;
    let version = u32::from_le_bytes(take(&mut rest).map_err(Torn)?);
    if !(1..=VERSION).contains(&version) {
        return Err(Damaged("unknown version"));
    }
    let count = u32::from_le_bytes(take(&mut rest).map_err(Torn)?);
    if version >= WITH_DESTINATION {
        let len = u64::from_le_bytes(take(&mut rest).map_err(Torn)?);
        if (bytes.len() as u64) < len {
            return Err(Torn("cut short"));
        }
    }
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(Torn("cut short"))?;
    let checksum = u32::from_le_bytes(*checksum);
    if crc32fast::hash(body) != checksum {
        return Err(match checksum {
            // The last blocks were not written, and read as zeros.
            0 => Torn("ends in zeros"),
            _ => Damaged("checksum mismatch"),
        });
    }
    let members = body.len() - (rest.len() - checksum.to_le_bytes().len());
    members_of(&body[members..], version, count).map_err(Damaged)
}

fn members_of(mut rest: &[u8], version: u32, count: u32) -> Result<Vec<Member>, &'static str> {
    let mut members = Vec::new();
    for _ in 0..count {
        let inode = u64::from_le_bytes(take(&mut rest)?);
        let size = u64::from_le_bytes(take(&mut rest)?);
        let old = if version >= WITH_DESTINATION {
            take_old(&mut rest)?
        } else {
            Old::Unknown
        };
        let staged = take_name(&mut rest)?;
        if kind_of_name(&staged) != Some(NameKind::Locked) {
            return Err("a staged file has another file's name");
        }
        let dest = take_name(&mut rest)?;
        if is_record_name(&dest) || kind_of_name(&dest).is_some() {
            return Err("a destination has a staged file's or a record's name");
        }
        members.push(Member {
            inode,
            size,
            old,
            staged,
            dest,
        });
    }
    if !rest.is_empty() {
        return Err("bytes after the last member");
    }
    Ok(members)
}

fn take_old(rest: &mut &[u8]) -> Result<Old, &'static str> {
    let [kind] = take(rest)?;
    let inode = u64::from_le_bytes(take(rest)?);
    let generation = u64::from_le_bytes(take(rest)?);
    match kind {
        0 => Ok(Old::Nothing),
        1 => Ok(Old::File { inode, generation }),
        2 => Ok(Old::Unknown),
        _ => Err("a destination is of an unknown kind"),
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], &'static str> {
    let (head, tail) = rest.split_first_chunk().ok_or("too short")?;
    *rest = tail;
    Ok(*head)
}

/// Takes a file name that stays within the directory.
fn take_name(rest: &mut &[u8]) -> Result<OsString, &'static str> {
    let len = usize::from(u16::from_le_bytes(take(rest)?));
    let (name, tail) = rest.split_at_checked(len).ok_or("too short")?;
    *rest = tail;
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') || name.contains(&0) {
        return Err("a name leads out of the directory");
    }
    Ok(OsStr::from_bytes(name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{PREFIX, protocol_name};
    use proptest::prelude::*;
    use rstest::rstest;

    fn member(dest: &[u8]) -> Member {
        let dest = OsStr::from_bytes(dest).to_owned();
        Member {
            inode: 11,
            size: 4096,
            old: Old::Unknown,
            staged: protocol_name(&dest, 3, NameKind::Locked),
            dest,
        }
    }

    fn names() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(1u8.., 1..=255).prop_filter("a file name", |name| {
            !name.contains(&b'/') && !matches!(name.as_slice(), b"." | b"..")
        })
    }

    fn old() -> impl Strategy<Value = Old> {
        let file = |(inode, generation)| Old::File { inode, generation };
        prop_oneof![
            Just(Old::Nothing),
            Just(Old::Unknown),
            any::<(u64, u64)>().prop_map(file),
        ]
    }

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(
            names in proptest::collection::vec((names(), old()), 0..5),
        ) {
            let members = names.iter().map(|(name, old)| Member { old: *old, ..member(name) });
            let members: Vec<_> = members.collect();
            let lens = members.iter().map(|member| len_of_member(&member.staged, &member.dest));
            let bytes = encode(&members);
            prop_assert_eq!(bytes.len() as u64, EMPTY + lens.sum::<u64>());
            prop_assert_eq!(decode(&bytes), Ok(members));
        }

        #[test]
        fn changed_or_truncated_records_are_rejected(
            name in names(),
            at: proptest::sample::Index,
            bit in 0..8,
        ) {
            let whole = encode(&[member(&name), member(b"vcpu")]);
            let at = at.index(whole.len());
            prop_assert!(matches!(decode(&whole[..at]), Err(Torn(_))), "cut at {}", at);
            let mut zeros = whole.clone();
            zeros[at..].fill(0);
            prop_assert!(matches!(decode(&zeros), Err(Torn(_) | Damaged(_))), "zeros from {}", at);
            let mut flipped = whole;
            flipped[at] ^= 1u8 << bit;
            prop_assert!(decode(&flipped).is_err());
        }

        #[test]
        fn the_decoder_never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
            let mut signed = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &bytes].concat();
            signed.extend(crc32fast::hash(&signed).to_le_bytes());
            let _ = decode(&signed);
        }
    }

    #[rstest]
    #[case::up(b"..")]
    #[case::absolute(b"/etc/passwd")]
    #[case::below(b"a/b")]
    #[case::empty(b"")]
    fn no_name_leads_out_of_the_directory(#[case] dest: &[u8]) {
        let bytes = encode(&[member(dest)]);
        assert_eq!(
            decode(&bytes),
            Err(Damaged("a name leads out of the directory"))
        );
    }

    #[test]
    fn a_member_must_have_the_name_of_a_staged_file() {
        let invalid = Member {
            staged: "passwd".into(),
            ..member(b"shadow")
        };
        assert_eq!(
            decode(&encode(&[invalid])),
            Err(Damaged("a staged file has another file's name"))
        );
    }

    #[test]
    fn torn_and_damaged_records_are_distinguished() {
        let whole = encode(&[member(b"memory")]);
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            matches!(decode(&bytes).unwrap_err(), Torn(_))
        };
        assert!(with(Vec::clear));
        assert!(with(|bytes| bytes.fill(0)));
        assert!(with(|bytes| bytes.truncate(30)));
        assert!(with(|bytes| bytes[24..].fill(0)));
        assert!(!with(|bytes| bytes[24] ^= 1));
        assert!(!with(|bytes| bytes[0] = b'B'));
        assert!(!with(|bytes| bytes.extend(b"more")));
    }

    #[rstest]
    #[case::a_record(".atomic-file-0123456789abcdef.group")]
    #[case::a_staged_file(".atomic-file-01234567-0.stage")]
    fn a_destination_must_not_have_a_reserved_name(#[case] dest: &str) {
        let bytes = encode(&[member(dest.as_bytes())]);
        let expected = Damaged("a destination has a staged file's or a record's name");
        assert_eq!(decode(&bytes), Err(expected));
    }

    #[test]
    fn version_1_stays_readable() {
        let hex = include_str!("../tests/golden/record-v1.hex");
        let bytes: Vec<u8> = hex
            .split_whitespace()
            .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
            .collect();
        // Version 1 numbered the staged files of a destination.
        let third = |dest: &[u8]| Member {
            staged: format!("{PREFIX}{:08x}-3.stage", crc32fast::hash(dest)).into(),
            ..member(dest)
        };
        assert_eq!(
            decode(&bytes),
            Ok(vec![third(b"memory"), third(b"vcpu\xff")])
        );
    }
}
