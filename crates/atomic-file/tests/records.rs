//! Group records: damaged, torn, planted and foreign ones.

mod support;

use std::fs;
use std::path::Path;

use atomic_file::{AtomicWriter, RecoverError, recover, sweep};
use rstest::rstest;
use support::groups::{FILES, killed_after, old_files, stuck};
use support::{assert_names, commit, group, names, record, same_text};
use test_machine::{Need, needs};

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    match job.as_str() {
        "commit" => support::traced(&dir, || match group(&dir, &FILES, "new") {
            Err(error) => format!("not opened: {error}"),
            Ok(group) => support::group_state_of(group.commit()),
        }),
        other => panic!("no such job: {other}"),
    }
}

#[rstest]
#[case::a_bit_flipped(|bytes: &mut Vec<u8>| bytes[30] ^= 1)]
#[case::junk(|bytes: &mut Vec<u8>| bytes.clone_from(&b"junk".to_vec()))]
#[case::of_a_later_version(|bytes: &mut Vec<u8>| bytes[8] = 4)]
fn a_damaged_record_is_reported_and_blocks_no_writer(#[case] damage: fn(&mut Vec<u8>)) {
    needs!(Strace);
    let dir = killed_after(1);
    let path = record(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    damage(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let before = names(dir.path());

    let error = stuck(recover(dir.path()));
    assert!(
        matches!(&error, RecoverError::Damaged { path: named, .. } if *named == path),
        "{error:?}"
    );
    assert!(sweep(dir.path()).unwrap().removed.is_empty());
    assert_eq!(
        names(dir.path()),
        before,
        "a damaged record may name any staged file"
    );
    for name in ["third", "memory", "vcpu"] {
        commit(&AtomicWriter::options(), &dir.path().join(name), b"newer").unwrap();
    }
    group(dir.path(), &FILES, "newest")
        .unwrap()
        .commit()
        .unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "newest");

    // As the error text says: once the record is removed, the rest can be swept.
    fs::remove_file(&path).unwrap();
    sweep(dir.path()).unwrap();
    assert_names(dir.path(), &["memory", "third", "vcpu"]);
}

#[rstest]
#[case::torn(|bytes: &mut Vec<u8>| bytes.truncate(40))]
#[case::without_its_last_blocks(|bytes: &mut Vec<u8>| bytes[40..].fill(0))]
#[case::zeros(|bytes: &mut Vec<u8>| bytes.fill(0))]
#[case::empty(|bytes: &mut Vec<u8>| bytes.clear())]
fn a_torn_record_is_removed(
    #[case] tear: fn(&mut Vec<u8>),
    #[values(false, true)] by_recover: bool,
) {
    needs!(Strace);
    let dir = killed_after(0);
    let path = record(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    tear(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    if by_recover {
        let report = recover(dir.path()).unwrap();
        assert_eq!(report.discarded, [path]);
        assert_eq!(report.swept.removed.len(), 2);
    } else {
        group(dir.path(), &FILES, "old").unwrap().commit().unwrap();
    }
    assert_eq!(same_text(dir.path(), &FILES), "old");
    assert_names(dir.path(), &FILES);
}

#[rstest]
#[case::a_directory(|path: &Path| fs::create_dir(path).unwrap())]
#[case::a_symlink(|path: &Path| std::os::unix::fs::symlink("memory", path).unwrap())]
#[case::a_fifo(|path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap())]
fn an_entry_that_is_not_a_file_is_not_a_record(
    #[case] plant: fn(&Path),
    #[values(".atomic-file-group", PLANTED)] name: &str,
) {
    let dir = old_files();
    let path = dir.path().join(name);
    plant(&path);
    assert_eq!(recover(dir.path()).unwrap().foreign, [path]);
    commit(&AtomicWriter::options(), &dir.path().join("memory"), b"new").unwrap();
    group(dir.path(), &FILES, "newer")
        .unwrap()
        .commit()
        .unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "newer");
}

#[test]
fn another_users_record_in_a_shared_directory_is_ignored() {
    use std::os::unix::fs::PermissionsExt as _;
    const TEST: &str = "another_users_record_in_a_shared_directory_is_ignored";
    if !(Need::Root.met(TEST) && Need::Strace.met(TEST)) {
        return;
    }
    let dir = killed_after(0);
    let record = record(dir.path());
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    std::os::unix::fs::chown(&record, Some(12345), None).unwrap();
    let report = recover(dir.path()).unwrap();
    assert_eq!(report.foreign, std::slice::from_ref(&record));
    assert_eq!(same_text(dir.path(), &FILES), "old");
    commit(
        &AtomicWriter::options(),
        &dir.path().join("memory"),
        b"newer",
    )
    .unwrap();
    group(dir.path(), &FILES, "newest")
        .unwrap()
        .commit()
        .unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "newest");
}

#[test]
fn an_own_record_in_a_shared_directory_is_trusted() {
    use std::os::unix::fs::PermissionsExt as _;
    needs!(Strace);
    let dir = killed_after(0);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    recover(dir.path()).unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "new");
}

const PLANTED: &str = ".atomic-file-0123456789abcdef.group";
