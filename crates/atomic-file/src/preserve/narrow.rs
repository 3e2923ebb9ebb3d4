//! Permission bits that grant no user more than the old file did.

use crate::acl::{ALL, Acl, Grants};
use crate::stat::Stat;

/// Returns the old file's permission bits without those that would let a user do more with the new
/// file than with the old one. `kept` states whether the new file receives the old one's `acl`.
///
/// A user who loses the class of the owner, a member of the group, or an entry of the list falls
/// into another class. So each class receives at most what every class had whose users may now
/// belong to it.
pub(super) fn narrowed(old: &Stat, new: &Stat, acl: &Acl, kept: bool) -> u32 {
    const SET_USER_ID: u32 = 0o4000;
    const SET_GROUP_ID: u32 = 0o2000;
    const STICKY: u32 = 0o1000;
    let bits = |shift: u32| old.mode >> shift & ALL;
    // With a list, the group bits are the upper bound of all its entries.
    let (owner, old_group, old_others) = (bits(6), bits(3), bits(0));
    let Grants {
        members,
        users,
        groups,
    } = match acl {
        Acl::Unknown if kept => Acl::Absent.grants(old_group),
        acl => acl.grants(old_group),
    };
    let (mut group, mut others) = (old_group, old_others);
    let mut special = old.mode & (SET_USER_ID | SET_GROUP_ID | STICKY);
    if !old.uid.is(new.uid) {
        special &= !SET_USER_ID;
        group &= owner;
        others &= owner;
    }
    if !old.gid.is(new.gid) {
        special &= !SET_GROUP_ID;
        // Members of the new group were other users, or had the entry of another group.
        group &= old_others & groups;
        others &= members;
    }
    if !kept {
        group &= members & users;
    }
    // Linux ignores the list of a file without group bits: its users then count as others.
    if !kept || (group == 0 && old_group != 0) {
        others &= users & groups;
    }
    special | owner << 6 | group << 3 | others
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::directory::Directory;
    use crate::ids::{GroupId, UserId};
    use rstest::rstest;

    fn list(members: u16, user: u16, group: u16) -> Acl {
        Acl::Posix(crate::acl::tests::list(members, user, group))
    }

    #[rstest]
    #[case::same_owner_and_group(0o6775, false, false, Acl::Absent, 0o6775)]
    #[case::another_owner(0o6775, true, false, Acl::Absent, 0o2775)]
    #[case::the_owner_had_less(0o0466, true, false, Acl::Absent, 0o0444)]
    #[case::another_group(0o6774, false, true, Acl::Absent, 0o4744)]
    #[case::the_group_had_nothing(0o0604, false, true, Acl::Absent, 0o0600)]
    #[case::the_group_had_less(0o0646, false, true, Acl::Absent, 0o0644)]
    #[case::the_group_could_write(0o0624, false, true, Acl::Absent, 0o0600)]
    #[case::unknown_list(0o2775, false, false, Acl::Unknown, 0o2700)]
    #[case::list_omitted(0o2674, false, false, list(6, 6, 4), 0o2664)]
    #[case::list_denied_a_user(0o0674, false, false, list(6, 0, 7), 0o0600)]
    #[case::list_denied_a_group(0o0674, false, false, list(6, 6, 0), 0o0660)]
    #[case::list_denied_the_members(0o0674, false, true, list(0, 7, 7), 0o0600)]
    #[case::list_denied_another_group(0o0674, false, true, list(7, 7, 0), 0o0600)]
    fn a_preserved_mode_never_grants_more(
        #[case] mode: u32,
        #[case] other_owner: bool,
        #[case] other_group: bool,
        #[case] omitted: Acl,
        #[case] expected: u32,
    ) {
        let (old, new) = files(mode, other_owner, other_group);
        let kept = omitted == Acl::Absent;
        assert_eq!(narrowed(&old, &new, &omitted, kept), expected);
    }

    /// The group bits limit every entry of the list.
    #[rstest]
    #[case::same_owner_and_group(0o0674, false, false, list(0, 0, 0), 0o0674)]
    #[case::another_owner(0o0274, true, false, list(7, 7, 7), 0o0220)]
    #[case::another_group(0o0674, false, true, list(4, 7, 7), 0o0644)]
    #[case::the_members_had_nothing(0o0674, false, true, list(0, 7, 7), 0o0640)]
    #[case::a_group_had_nothing(0o0674, false, true, list(7, 7, 0), 0o0600)]
    #[case::unknown(0o0674, false, true, Acl::Unknown, 0o0644)]
    fn a_preserved_list_never_grants_more(
        #[case] mode: u32,
        #[case] other_owner: bool,
        #[case] other_group: bool,
        #[case] kept: Acl,
        #[case] expected: u32,
    ) {
        let (old, new) = files(mode, other_owner, other_group);
        assert_eq!(narrowed(&old, &new, &kept, true), expected);
    }

    fn files(mode: u32, other_owner: bool, other_group: bool) -> (Stat, Stat) {
        let here = Directory::open(Path::new("/")).unwrap().stat;
        let new = Stat {
            uid: UserId::new(here.uid.raw() + u32::from(other_owner)),
            gid: GroupId::new(here.gid.raw() + u32::from(other_group)),
            ..here
        };
        (Stat { mode, ..here }, new)
    }
}
