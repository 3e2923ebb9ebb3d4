//! Access control lists of POSIX: what they grant beside the permission bits.

#![cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    allow(dead_code, reason = "other systems have other lists")
)]

/// The access control list of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Acl {
    /// None, or one that grants the same as the permission bits.
    Absent,
    Posix(PosixAcl),
    /// A list that this crate cannot read.
    Unknown,
}

/// Permissions of a class of users: read 4, write 2, execute 1.
pub(crate) type Permissions = u32;

pub(crate) const ALL: Permissions = 0o7;

/// Upper bounds of what users other than the owner may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grants {
    /// The members of the file's group.
    pub(crate) members: Permissions,
    /// Each user and each group with an entry of its own: the permissions that all of them have.
    pub(crate) users: Permissions,
    pub(crate) groups: Permissions,
}

impl Acl {
    /// Returns what the list grants on a file whose mode has these group bits.
    pub(crate) fn grants(&self, group_bits: Permissions) -> Grants {
        match self {
            Self::Absent => Grants {
                members: group_bits,
                users: ALL,
                groups: ALL,
            },
            Self::Posix(list) => list.grants(),
            Self::Unknown => Grants {
                members: 0,
                users: 0,
                groups: 0,
            },
        }
    }
}

/// The entries of a list, as Linux's `posix_acl_xattr.h` encodes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PosixAcl(Vec<Entry>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u16,
    id: u32,
}

const VERSION: u32 = 2;
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const MEMBERS: u16 = 0x04;
const GROUP: u16 = 0x08;
/// The upper bound of the entries `USER`, `MEMBERS` and `GROUP`.
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;

impl PosixAcl {
    /// Decodes the value of `system.posix_acl_access`; `None` if its format is unknown.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, entries) = bytes.split_first_chunk()?;
        let (entries, rest) = entries.as_chunks::<8>();
        if u32::from_le_bytes(*version) != VERSION || !rest.is_empty() {
            return None;
        }
        let entry = |&[tag, tag2, bits, bits2, id @ ..]: &[u8; 8]| Entry {
            tag: u16::from_le_bytes([tag, tag2]),
            permissions: u16::from_le_bytes([bits, bits2]),
            id: u32::from_le_bytes(id),
        };
        let entries: Vec<_> = entries.iter().map(entry).collect();
        let is_known = |entry: &Entry| {
            matches!(entry.tag, OWNER | USER | MEMBERS | GROUP | MASK | OTHERS)
                && u32::from(entry.permissions) <= ALL
        };
        entries.iter().all(is_known).then_some(Self(entries))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend(entry.tag.to_le_bytes());
            bytes.extend(entry.permissions.to_le_bytes());
            bytes.extend(entry.id.to_le_bytes());
        }
        bytes
    }

    fn grants(&self) -> Grants {
        let mask = self.common(MASK);
        Grants {
            members: self.common(MEMBERS) & mask,
            users: self.common(USER) & mask,
            groups: self.common(GROUP) & mask,
        }
    }

    /// Returns the permissions that all entries with this tag have; all if there is none.
    fn common(&self, tag: u16) -> Permissions {
        let entries = self.0.iter().filter(|entry| entry.tag == tag);
        entries.fold(ALL, |common, entry| common & u32::from(entry.permissions))
    }

    /// Returns the list with the permission bits of `mode`, as `chmod(2)` sets them.
    pub(crate) fn with_mode(&self, mode: u32) -> Self {
        let has_mask = self.0.iter().any(|entry| entry.tag == MASK);
        let bits = |shift: u32| (mode >> shift & ALL) as u16;
        let changed = |entry: &Entry| Entry {
            permissions: match entry.tag {
                OWNER => bits(6),
                MASK => bits(3),
                MEMBERS if !has_mask => bits(3),
                OTHERS => bits(0),
                _ => entry.permissions,
            },
            ..*entry
        };
        Self(self.0.iter().map(changed).collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a list of the mode 0674 with a user 12 of these permissions and a group 34 of those.
    pub(crate) fn list(members: u16, user: u16, group: u16) -> PosixAcl {
        const NO_ID: u32 = u32::MAX;
        let entry = |(tag, permissions, id)| Entry {
            tag,
            permissions,
            id,
        };
        let entries = [
            (OWNER, 6, NO_ID),
            (USER, user, 12),
            (MEMBERS, members, NO_ID),
            (GROUP, group, 34),
            (MASK, 7, NO_ID),
            (OTHERS, 4, NO_ID),
        ];
        PosixAcl(entries.into_iter().map(entry).collect())
    }

    #[test]
    fn without_a_mask_the_group_bits_are_those_of_the_members() {
        let entries = list(7, 7, 7).0.into_iter();
        let unmasked = PosixAcl(entries.filter(|entry| entry.tag != MASK).collect());
        let of = |list: &PosixAcl, tag| list.common(tag);
        let changed = unmasked.with_mode(0o751);
        assert_eq!(
            [OWNER, MEMBERS, OTHERS].map(|tag| of(&changed, tag)),
            [7, 5, 1]
        );
        assert_eq!([USER, GROUP].map(|tag| of(&changed, tag)), [7, 7]);
        let changed = list(6, 6, 6).with_mode(0o751);
        assert_eq!([MASK, MEMBERS].map(|tag| of(&changed, tag)), [5, 6]);
    }

    #[test]
    fn a_list_reads_back_as_it_was_written() {
        let list = list(4, 0, 6);
        let bytes = list.encode();
        assert_eq!(PosixAcl::decode(&bytes), Some(list));
        assert_eq!(PosixAcl::decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(PosixAcl::decode(b""), None);
        let mut newer = bytes.clone();
        newer[0] += 1;
        assert_eq!(PosixAcl::decode(&newer), None);
        let mut unknown_tag = bytes;
        unknown_tag[4] = 0x40;
        assert_eq!(PosixAcl::decode(&unknown_tag), None);
    }

    #[test]
    fn the_mask_limits_every_entry_but_the_owners() {
        let granted = |mode| Acl::Posix(list(4, 6, 5).with_mode(mode)).grants(7);
        let grants = |members, users, groups| Grants {
            members,
            users,
            groups,
        };
        assert_eq!(granted(0o674), grants(4, 6, 5));
        assert_eq!(granted(0o624), grants(0, 2, 0));
        assert_eq!(granted(0o604), grants(0, 0, 0));
    }

    #[test]
    fn a_mode_changes_the_mask_and_not_the_entries() {
        let changed = list(4, 6, 5).with_mode(0o421);
        let permissions: Vec<_> = changed.0.iter().map(|entry| entry.permissions).collect();
        assert_eq!(permissions, [4, 6, 4, 5, 2, 1]);
    }
}
