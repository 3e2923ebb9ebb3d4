//! The intent record of a group commit: its names and its bytes.
//!
//! # Names
//! A record is called `.atomic-file-ID.group`, ID being 16 random hexadecimal digits: a name that
//! another user can predict is a name that another user can occupy. A directory may hold several
//! records. A record that is not published yet, its group's ticket (see `turn.rs`), is called
//! `.atomic-file-ID.intent`. Version 1 had the one name `.atomic-file-group`, which is still read.
//!
//! # Bytes
//! Little-endian, version 3:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `ATOMGRP\n` |
//! | 4 | version |
//! | 4 | number of members |
//! | 8 | length of the record in bytes |
//! | per member: 8 | inode number of the staged file |
//! | 8 | its size in bytes |
//! | 1 | what the destination was when the record was written: 0 nothing, 1 a file, 2 unknown |
//! | 8 | that file's inode number |
//! | 8 | its generation: when that file was created, in nanoseconds since 1970; or a digest of its handle |
//! | 2 + n | length of the staged file's name, and the name |
//! | 2 + n | length of the destination's name, and the name |
//! | 4 | CRC-32 of everything before |
//!
//! Version 2 has the generation 0 where the file system keeps no time of creation. Version 1 has
//! neither the record's length nor the three fields about the destination.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use crate::staged_file::{NameKind, PREFIX, kind_of_name};

/// The name of records of version 1.
const VERSION_1_NAME: &str = ".atomic-file-group";
const SUFFIX: &str = ".group";

const MAGIC: &[u8; 8] = b"ATOMGRP\n";
const VERSION: u32 = 3;
/// Since which there is the record's length, and what the destination was.
const WITH_DESTINATION: u32 = 2;

/// Whether `name` is a published record's.
pub(crate) fn is_record_name(name: &OsStr) -> bool {
    let id = || name.to_str()?.strip_prefix(PREFIX)?.strip_suffix(SUFFIX);
    name == VERSION_1_NAME || id().is_some_and(crate::staged_file::is_id)
}

/// The name of the record whose ticket has this ID.
pub(crate) fn record_name(id: u64) -> OsString {
    format!("{PREFIX}{id:016x}{SUFFIX}").into()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) old: Old,
    pub(crate) staged: OsString,
    pub(crate) dest: OsString,
}

/// What a destination was just before its group was published.
///
/// A destination that is something else now was replaced by a later commit, which a recovery must
/// not undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    Nothing,
    /// An inode number may be used again, so it comes with its [generation](crate::directory::Directory::generation).
    File {
        inode: u64,
        generation: u64,
    },
    /// In records of version 1.
    Unknown,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// It was never written whole: a power loss cut short a group that did not wait for its record
    /// (`Durability::None`).
    Torn(&'static str),
    Damaged(&'static str),
}

use Unreadable::{Damaged, Torn};

/// In bytes, of a record without members.
pub(crate) const EMPTY: u64 = 8 + 4 + 4 + 8 + 4;

/// In bytes, what a member with these names adds to a record.
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
            let len = u16::try_from(name.len()).expect("a name that a file has is far shorter");
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

/// The members, or what is wrong with the bytes.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Member>, Unreadable> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(Torn("no bytes but zeros"));
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
            // The last blocks were never written, and read as zeros.
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

/// A name that stays within the directory.
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
    use crate::staged_file::protocol_name;
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
        fn no_record_is_accepted_with_one_byte_changed_or_the_end_cut_off(
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
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
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
    fn a_file_that_is_no_stage_is_not_taken_for_one() {
        let stranger = Member {
            staged: "passwd".into(),
            ..member(b"shadow")
        };
        assert_eq!(
            decode(&encode(&[stranger])),
            Err(Damaged("a staged file has another file's name"))
        );
    }

    #[test]
    fn torn_bytes_are_told_from_damaged_ones() {
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
    fn no_destination_is_a_file_of_the_protocol(#[case] dest: &str) {
        let bytes = encode(&[member(dest.as_bytes())]);
        let expected = Damaged("a destination has a staged file's or a record's name");
        assert_eq!(decode(&bytes), Err(expected));
    }

    #[rstest]
    #[case(".atomic-file-group", true)]
    #[case(".atomic-file-0123456789abcdef.group", true)]
    #[case(".atomic-file-0123456789abcde.group", false)]
    #[case(".atomic-file-0123456789ABCDEF.group", false)]
    #[case(".atomic-file-0123456789abcdef.intent", false)]
    #[case("atomic-file-0123456789abcdef.group", false)]
    fn a_record_is_known_by_its_name(#[case] name: &str, #[case] is_record: bool) {
        assert_eq!(is_record_name(OsStr::new(name)), is_record);
    }

    #[test]
    fn version_1_stays_readable() {
        let hex = include_str!("../tests/golden/record-v1.hex");
        let bytes: Vec<u8> = hex
            .split_whitespace()
            .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
            .collect();
        // That version counted the staged files of a destination.
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
