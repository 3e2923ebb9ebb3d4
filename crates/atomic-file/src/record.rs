//! The intent record of a group commit, as bytes.
//!
//! Little-endian, version 1:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `ATOMGRP\n` |
//! | 4 | version |
//! | 4 | number of members |
//! | per member: 8 | inode number of the stage |
//! | 8 | its size in bytes |
//! | 2 + n | length of the stage's name, and the name |
//! | 2 + n | length of the destination's name, and the name |
//! | 4 | CRC-32 of everything before |

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use crate::stage::{StageName, parse_name};

/// One per directory. That the record has a fixed name makes looking for it one call, and lets only one group at
/// a time be between its commit point and its end: two groups over the same files never mix.
pub(crate) const RECORD_NAME: &str = ".atomic-file-group";

const MAGIC: &[u8; 8] = b"ATOMGRP\n";
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) stage: OsString,
    pub(crate) dest: OsString,
}

pub(crate) fn encode(members: &[Member]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32_of(members.len()).to_le_bytes());
    for member in members {
        bytes.extend(member.inode.to_le_bytes());
        bytes.extend(member.size.to_le_bytes());
        for name in [&member.stage, &member.dest] {
            let name = name.as_bytes();
            let len = u16::try_from(name.len()).expect("a name that a file has is far shorter");
            bytes.extend(len.to_le_bytes());
            bytes.extend(name);
        }
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("fewer members than a process has descriptors")
}

/// The members, or what is wrong with the bytes.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Member>, &'static str> {
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or("too short")?;
    let mut rest = body;
    if take(&mut rest)? != *MAGIC {
        return Err("not an intent record");
    }
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err("checksum mismatch");
    }
    if u32::from_le_bytes(take(&mut rest)?) != VERSION {
        return Err("unknown version");
    }
    let count = u32::from_le_bytes(take(&mut rest)?);
    let mut members = Vec::new();
    for _ in 0..count {
        let inode = u64::from_le_bytes(take(&mut rest)?);
        let size = u64::from_le_bytes(take(&mut rest)?);
        let stage = take_name(&mut rest)?;
        if parse_name(&stage) != Some(StageName::Locked) {
            return Err("a stage has no stage's name");
        }
        let dest = take_name(&mut rest)?;
        members.push(Member {
            inode,
            size,
            stage,
            dest,
        });
    }
    if !rest.is_empty() {
        return Err("bytes after the last member");
    }
    Ok(members)
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
    use crate::stage::stage_name;
    use proptest::prelude::*;
    use rstest::rstest;

    fn member(dest: &[u8]) -> Member {
        let dest = OsStr::from_bytes(dest).to_owned();
        Member {
            inode: 11,
            size: 4096,
            stage: stage_name(&dest, 3, StageName::Locked),
            dest,
        }
    }

    fn names() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(1u8.., 1..=255).prop_filter("a file name", |name| {
            !name.contains(&b'/') && !matches!(name.as_slice(), b"." | b"..")
        })
    }

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(names in proptest::collection::vec(names(), 0..5)) {
            let members: Vec<_> = names.iter().map(|name| member(name)).collect();
            prop_assert_eq!(decode(&encode(&members)), Ok(members));
        }

        #[test]
        fn no_record_is_accepted_with_one_byte_changed_or_the_end_cut_off(
            name in names(),
            at: proptest::sample::Index,
            bit in 0..8,
        ) {
            let whole = encode(&[member(&name), member(b"vcpu")]);
            let at = at.index(whole.len());
            prop_assert!(decode(&whole[..at]).is_err());
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
        assert_eq!(decode(&bytes), Err("a name leads out of the directory"));
    }

    #[test]
    fn a_file_that_is_no_stage_is_not_taken_for_one() {
        let stranger = Member {
            stage: "passwd".into(),
            ..member(b"shadow")
        };
        assert_eq!(
            decode(&encode(&[stranger])),
            Err("a stage has no stage's name")
        );
    }

    #[test]
    fn version_1_stays_readable() {
        let hex = include_str!("../tests/data/record-v1.hex");
        let bytes: Vec<u8> = hex
            .split_whitespace()
            .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
            .collect();
        assert_eq!(
            decode(&bytes),
            Ok(vec![member(b"memory"), member(b"vcpu\xff")])
        );
    }
}
