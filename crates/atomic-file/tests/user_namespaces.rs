//! In a user namespace, users that it does not map are not taken for one user.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, lchown, symlink};
use std::path::Path;

use atomic_file::{
    AtomicGroup, AtomicWriter, GroupCommitError, Obstacle, OpenError, Preserve, recover, sweep,
};
use rstest::rstest;
use support::hostile::{
    MEMBERS, OTHER_USER, Place, USER, die_at, open_to_all, other_users_place, set_mode,
    staged_files,
};
use test_machine::{in_user_namespace, needs};

/// Maps no user: every user has the overflow id, also this one.
const NONE: &str = "";

/// Maps this user to root, as `unshare -r` does.
const SELF: &str = "0 12345 1";

/// Also maps the overflow id itself, as containers do.
const CONTAINER: &str = "0 12345 1\n65534 165534 1";

/// Also maps the user and the group `MAPPED`.
const TWO: &str = "0 12345 1\n1 100001 1";
const MAPPED: u32 = 100_001;

const OVERFLOW_ID: u32 = 65534;

#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    let report = match job.as_str() {
        "group that preserves" => {
            support::traced(&dir, || {
                let mut group = AtomicGroup::new();
                for name in MEMBERS {
                    let options = AtomicWriter::options().preserve(Preserve::all());
                    let writer = options.open(dir.join(name)).unwrap();
                    writer.write_all_at(b"new", 0).unwrap();
                    group.add(writer).unwrap();
                }
                support::group_state_of(group.commit())
            });
            return;
        }
        "group" => {
            let group = support::group(&dir, &MEMBERS, "new").unwrap();
            match group.commit() {
                Err(GroupCommitError::NothingReplaced { source, .. }) => source.to_string(),
                result => support::group_state_of(result),
            }
        }
        "replace" => replace(&dest, Preserve::nothing()),
        "preserve" => replace(&dest, Preserve::all().if_permitted(true)),
        "preserve owner" => replace(&dest, Preserve::nothing().owner(true)),
        "sweep" => {
            let swept = sweep(&dir).unwrap();
            format!("{} removed", swept.removed.len())
        }
        other => panic!("no job {other}"),
    };
    println!("\nREPORT {report}");
}

fn replace(dest: &Path, preserve: Preserve) -> String {
    let writer = match AtomicWriter::options().preserve(preserve).open(dest) {
        Ok(writer) => writer,
        Err(OpenError::UntrustedSymlink { owner, .. }) => return format!("link of {owner}"),
        Err(OpenError::CannotReplace {
            obstacle: obstacle @ Obstacle::OthersInStickyDirectory { .. },
            ..
        }) => return obstacle.to_string(),
        Err(OpenError::NotPreserved { source, .. }) => return format!("{source}"),
        Err(other) => return format!("{other:?}"),
    };
    let lost: Vec<_> = writer
        .not_preserved()
        .iter()
        .map(|lost| &lost.attribute)
        .collect();
    let lost = format!("lost {lost:?}");
    writer.write_all_at(b"new", 0).unwrap();
    writer.commit().unwrap();
    lost
}

/// Runs `job` on the directory `dir` of `place`, as the other user in a namespace with this map.
fn inside(map: &str, job: &str, place: &Place) -> String {
    let program = place.path("program");
    let command = support::command(job, &place.path("dir"));
    fs::copy(command.get_program(), &program).unwrap();
    set_mode(&program, 0o755);
    let mut copied = std::process::Command::new(&program);
    copied.args(command.get_args());
    for (key, value) in command
        .get_envs()
        .filter_map(|(key, value)| Some((key, value?)))
    {
        copied.env(key, value);
    }
    let output = in_user_namespace(&copied, OTHER_USER, map);
    let stdout = String::from_utf8_lossy(&output.stdout);
    support::reported(&stdout).unwrap_or_else(|| panic!("{output:?}"))
}

/// Makes `ours` the other user's, so that following a link there would succeed.
fn give_ours_away(place: &Place) {
    for name in ["ours", "ours/dest", "ours/victim"] {
        chown(place.path(name), Some(OTHER_USER), Some(OTHER_USER)).unwrap();
    }
}

#[rstest]
fn links_of_other_users_are_not_followed(#[values(NONE, SELF, CONTAINER)] map: &str) {
    needs!(Root, UserNamespace);
    let place = Place::new(0o1777);
    give_ours_away(&place);
    let link = place.path("dir/dest");
    symlink(place.path("ours/victim"), &link).unwrap();
    lchown(&link, Some(USER), Some(USER)).unwrap();
    assert_eq!(
        inside(map, "replace", &place),
        format!("link of {OVERFLOW_ID}")
    );
    place.assert_ours_untouched();
    if map != NONE {
        lchown(&link, Some(OTHER_USER), Some(OTHER_USER)).unwrap();
        assert_eq!(inside(map, "replace", &place), "lost []");
        assert_eq!(fs::read(place.path("ours/victim")).unwrap(), b"new");
    }
}

/// The group of root in the namespace is a group outside it, which may have any members.
#[test]
fn a_group_that_may_write_counts_as_other_users() {
    needs!(Root, UserNamespace);
    let place = Place::new(0o775);
    give_ours_away(&place);
    chown(place.path("dir"), None, Some(OTHER_USER)).unwrap();
    let link = place.path("dir/dest");
    symlink(place.path("ours/victim"), &link).unwrap();
    lchown(&link, Some(USER), Some(USER)).unwrap();
    assert_eq!(
        inside(SELF, "replace", &place),
        format!("link of {OVERFLOW_ID}")
    );
    place.assert_ours_untouched();
}

#[rstest]
fn a_planted_file_is_no_source_of_attributes(#[values(NONE, SELF, CONTAINER)] map: &str) {
    needs!(Root, UserNamespace);
    let place = Place::new(0o777);
    let dest = place.path("dir/dest");
    fs::write(&dest, "planted").unwrap();
    open_to_all(&dest).unwrap();
    chown(&dest, Some(USER), Some(USER)).unwrap();
    assert_eq!(
        inside(map, "preserve", &place),
        "lost [Owner, Group, Mode, Acl, Xattrs]"
    );
    assert_attributes(&dest, OTHER_USER, 0o600);
}

#[track_caller]
fn assert_attributes(dest: &Path, user: u32, mode: u32) {
    let stat = fs::metadata(dest).unwrap();
    let found = (stat.uid(), stat.gid(), stat.mode() & 0o7777);
    assert_eq!(found, (user, user, mode), "{found:?}");
    assert_eq!(fs::read(dest).unwrap(), b"new");
}

/// The new file would belong to the user and the group that the namespace maps to the overflow id.
#[rstest]
fn a_file_is_not_given_to_the_user_of_the_overflow_id(#[values(NONE, SELF, CONTAINER)] map: &str) {
    needs!(Root, UserNamespace);
    let place = Place::new(0o755);
    chown(place.path("dir"), Some(OTHER_USER), Some(OTHER_USER)).unwrap();
    let dest = place.path("dir/dest");
    fs::write(&dest, "old").unwrap();
    set_mode(&dest, 0o664);
    chown(&dest, Some(USER), Some(USER)).unwrap();
    let refused = inside(map, "preserve owner", &place);
    assert!(refused.contains("owner"), "{refused}");
    assert_eq!(inside(map, "preserve", &place), "lost [Group, Owner]");
    assert_attributes(&dest, OTHER_USER, 0o644);
}

/// The capability of a namespace over files does not apply to owners and groups outside it.
#[rstest]
#[case::of_a_user_outside(SELF, USER, USER, true)]
#[case::of_a_user_outside_a_container(CONTAINER, USER, USER, true)]
#[case::no_user_is_mapped(NONE, USER, USER, true)]
#[case::of_this_user(SELF, OTHER_USER, OTHER_USER, false)]
#[case::of_a_mapped_user(TWO, MAPPED, MAPPED, false)]
#[case::of_a_group_outside(TWO, MAPPED, USER, true)]
fn a_sticky_directory_is_found_at_open(
    #[case] map: &str,
    #[case] user: u32,
    #[case] group: u32,
    #[case] is_refused: bool,
) {
    needs!(Root, UserNamespace);
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    fs::write(&dest, "old").unwrap();
    chown(&dest, Some(user), Some(group)).unwrap();
    let result = inside(map, "replace", &place);
    assert_eq!(result.contains("sticky"), is_refused, "{result}");
    let names_the_namespace = result.contains("does not map");
    assert_eq!(names_the_namespace, is_refused && user == USER, "{result}");
    let expected = if is_refused { "old" } else { "new" };
    assert_eq!(fs::read_to_string(&dest).unwrap(), expected);
}

/// A record of an unmapped user could be any user's.
#[rstest]
#[case::this_user_is_unmapped(NONE, false)]
#[case::this_user_is_root(SELF, true)]
#[case::a_container(CONTAINER, true)]
fn a_group_is_committed_if_its_user_is_mapped(#[case] map: &str, #[case] is_committed: bool) {
    needs!(Root, UserNamespace);
    let place = Place::new(0o1777);
    let result = inside(map, "group", &place);
    assert_eq!(result == "ok", is_committed, "{result}");
    if is_committed {
        assert_eq!(support::same_text(&place.path("dir"), &MEMBERS), "new");
    } else {
        assert!(result.contains("namespace"), "{result}");
        support::assert_names(&place.path("dir"), &[]);
    }
}

/// Root outside the namespace is one of the users that it does not map.
#[rstest]
fn a_sweep_keeps_the_files_of_roots_group(#[values(NONE, SELF, CONTAINER)] map: &str) {
    needs!(Root, Strace, UserNamespace);
    let place = other_users_place(&MEMBERS);
    let dir = place.path("dir");
    let first_member = support::RENAMES_BEFORE_MEMBERS + 1;
    die_at("group that preserves", &dir, "renameat", first_member);
    let staged = staged_files(&place);
    assert_eq!(
        staged.len(),
        MEMBERS.len() + 1,
        "and the record: {staged:?}"
    );
    assert_eq!(inside(map, "sweep", &place), "0 removed");
    assert_eq!(staged_files(&place), staged);
    assert_eq!(recover(&dir).unwrap().completed.len(), MEMBERS.len());
    assert_eq!(support::same_text(&dir, &MEMBERS), "new");
}
