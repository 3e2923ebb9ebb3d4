//! Commits of one file.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;

use atomic_file::{AtomicWriter, CommitError, CommitStep, Durability, OpenError, Symlinks};
use rstest::rstest;
use support::{assert_names, command, commit, dir_with_old, names, report};
use test_machine::{Need, rounds};

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    let report = match job.as_str() {
        "umask" => {
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o777));
            let strict = commit(&AtomicWriter::options().mode(0o644), &dest, b"new");
            nix::sys::stat::umask(nix::sys::stat::Mode::empty());
            let plain = commit(&AtomicWriter::options(), &dir.join("plain"), b"new");
            format!("{strict:?} {plain:?}")
        }
        "bare" => {
            std::env::set_current_dir(&dir).expect("chdir");
            let writer = AtomicWriter::open("dest").expect("open");
            let temp = writer.temp_path().to_owned();
            let beside = temp.parent() == Some(Path::new("")) && temp.exists();
            writer.write_all_at(b"new", 0).expect("write");
            // Change the current directory.
            std::env::set_current_dir("/").expect("chdir");
            format!("{beside} {:?}", writer.commit())
        }
        "size limit" => {
            let writer = AtomicWriter::open(&dest).expect("open");
            let error = writer
                .write_all_at(&[1; 16384], 0)
                .expect_err("past the limit");
            drop(writer);
            format!("{:?}", error.kind())
        }
        "race" => {
            for _ in 0..50 {
                let text = [std::process::id() as u8; 65536];
                commit(&AtomicWriter::options(), &dest, &text).expect("commit");
            }
            "raced".into()
        }
        other => panic!("no such job: {other}"),
    };
    println!("\nREPORT {report}");
}

#[rstest]
#[case(Durability::Full)]
#[case(Durability::Barrier)]
#[case(Durability::None)]
fn a_commit_replaces_the_file_and_leaves_no_other_file(#[case] durability: Durability) {
    let (dir, dest) = dir_with_old();
    let mut writer = AtomicWriter::options()
        .durability(durability)
        .open(&dest)
        .unwrap();
    assert_eq!(writer.dest_path(), dest);
    assert_eq!(writer.temp_path().parent(), Some(dir.path()));
    writer.write_all(b"n-w").unwrap();
    writer.write_all_at(b"e", 1).unwrap();
    writer.seek(SeekFrom::Start(0)).unwrap();
    let mut staged = String::new();
    writer.file().read_to_string(&mut staged).unwrap();
    assert_eq!(staged, "new");
    assert_eq!(fs::read(&dest).unwrap(), b"old", "before the commit");
    writer.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn an_empty_file_is_committed() {
    let (dir, dest) = dir_with_old();
    AtomicWriter::open(&dest).unwrap().commit().unwrap();
    assert_eq!(fs::metadata(&dest).unwrap().len(), 0);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_new_file_appears_complete() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let writer = AtomicWriter::open(&dest).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    assert!(!dest.exists());
    writer.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
}

#[test]
fn dropping_or_discarding_a_writer_leaves_no_file() {
    let (dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    drop(writer);
    assert_names(dir.path(), &["dest"]);
    AtomicWriter::open(&dest).unwrap().discard().unwrap();
    assert_names(dir.path(), &["dest"]);
    assert_eq!(fs::read(&dest).unwrap(), b"old");
}

#[test]
fn a_panic_leaves_no_file() {
    let (dir, dest) = dir_with_old();
    let panicked = std::panic::catch_unwind(|| {
        let writer = AtomicWriter::open(&dest).unwrap();
        writer.write_all_at(b"new", 0).unwrap();
        std::panic::resume_unwind(Box::new("midway"));
    });
    assert!(panicked.is_err());
    assert_names(dir.path(), &["dest"]);
    assert_eq!(fs::read(&dest).unwrap(), b"old");
}

#[rstest]
#[case::the_default(None, 0o600)]
#[case::open_to_all(Some(0o666), 0o666)]
#[case::not_even_for_its_owner(Some(0o000), 0o000)]
#[case::set_group_id(Some(0o2750), 0o2750)]
#[case::more_bits_than_there_are(Some(0o100_644), 0o644)]
fn the_mode_is_as_requested(#[case] asked: Option<u32>, #[case] expected: u32) {
    let (_dir, dest) = dir_with_old();
    fs::set_permissions(&dest, fs::Permissions::from_mode(0o644)).unwrap();
    let options = AtomicWriter::options();
    let options = match asked {
        Some(mode) => options.mode(mode),
        None => options,
    };
    commit(&options, &dest, b"new").unwrap();
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o7777, expected);
}

#[test]
fn the_umask_does_not_change_the_mode() {
    let dir = tempfile::tempdir().unwrap();
    let said = report(command("umask", dir.path())).unwrap();
    assert_eq!(said, "Ok(()) Ok(())");
    let mode = |name| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("dest"), mode("plain")), (0o644, 0o600));
}

#[test]
fn a_relative_path_survives_chdir_after_open() {
    let (dir, dest) = dir_with_old();
    assert_eq!(report(command("bare", dir.path())).unwrap(), "true Ok(())");
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest"]);
}

#[rstest]
// APFS refuses names that are not UTF-8.
#[cfg_attr(not(target_vendor = "apple"), case::not_utf8(b"snapshot-\xff\xfe.mem".to_vec()))]
#[case::newline_and_quote(b"a\n\"b'".to_vec())]
#[case::as_long_as_a_name_can_be(vec![b'x'; 255])]
#[cfg_attr(not(target_vendor = "apple"), case::as_long_and_not_utf8(vec![0xff; 255]))]
fn any_file_name_works(#[case] name: Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join(OsStr::from_bytes(&name));
    commit(&AtomicWriter::options(), &dest, b"one").unwrap();
    commit(
        &AtomicWriter::options().no_clobber(true),
        &dir.path().join("other"),
        b"x",
    )
    .unwrap();
    commit(&AtomicWriter::options(), &dest, b"two").unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"two");
    assert_eq!(names(dir.path()).len(), 2);
}

#[test]
fn a_symlink_at_a_staged_name_is_kept() {
    let (dir, dest) = dir_with_old();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let plant = staged_path(&dest);
    symlink(&victim, &plant).unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read_link(&plant).unwrap(), victim, "the link is kept");
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert!(fs::symlink_metadata(&dest).unwrap().is_file());
}

#[test]
fn a_staged_file_in_use_is_never_truncated() {
    let (_dir, dest) = dir_with_old();
    let plant = staged_path(&dest);
    fs::write(&plant, "precious").unwrap();
    let owner = fs::File::open(&plant).unwrap();
    owner.lock().unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_eq!(fs::read(&plant).unwrap(), b"precious");
}

#[test]
fn a_fifo_at_a_staged_name_blocks_no_writer() {
    let (_dir, dest) = dir_with_old();
    let plant = staged_path(&dest);
    nix::unistd::mkfifo(&plant, nix::sys::stat::Mode::S_IRWXU).unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert!(fs::symlink_metadata(&plant).unwrap().file_type().is_fifo());
}

/// A name of a file staged for `dest`.
fn staged_path(dest: &Path) -> PathBuf {
    let writer = AtomicWriter::open(dest).unwrap();
    writer.temp_path().to_owned()
}

#[test]
fn the_last_of_two_commits_wins() {
    let (dir, dest) = dir_with_old();
    let first = AtomicWriter::open(&dest).unwrap();
    first.write_all_at(b"first", 0).unwrap();
    let second = AtomicWriter::open(&dest).unwrap();
    assert_ne!(first.temp_path(), second.temp_path());
    second.write_all_at(b"second", 0).unwrap();
    second.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"second");
    first.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"first");
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn racing_threads_and_processes_never_show_a_torn_file() {
    let (dir, dest) = dir_with_old();
    fs::write(&dest, vec![0; 65536]).unwrap();
    let start = Barrier::new(3);
    let mut process = command("race", dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::scope(|scope| {
        for id in 1..=2u8 {
            let (start, dest) = (&start, &dest);
            scope.spawn(move || {
                start.wait();
                for _ in 0..50 {
                    commit(&AtomicWriter::options(), dest, &[id; 65536]).unwrap();
                }
            });
        }
        start.wait();
        for _ in 0..rounds(100, 500) {
            let seen = fs::read(&dest).unwrap();
            assert!(seen == [seen[0]; 65536], "two writers' bytes in one file");
        }
    });
    assert!(process.wait().unwrap().success());
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_commit_follows_its_renamed_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    fs::create_dir(&before).unwrap();
    let writer = AtomicWriter::open(before.join("dest")).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    fs::rename(&before, &after).unwrap();
    // Another directory replaces it, with a file at the staged name and at the destination's.
    fs::create_dir(&before).unwrap();
    fs::write(writer.temp_path(), "not ours").unwrap();
    fs::write(before.join("dest"), "not ours").unwrap();
    writer.commit().unwrap();
    assert_eq!(fs::read(after.join("dest")).unwrap(), b"new");
    assert_names(&after, &["dest"]);
    assert_eq!(fs::read(before.join("dest")).unwrap(), b"not ours");
    assert_eq!(names(&before).len(), 2);
}

#[test]
fn a_removed_directory_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    fs::create_dir(&gone).unwrap();
    let writer = AtomicWriter::open(gone.join("dest")).unwrap();
    fs::remove_dir_all(&gone).unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Check,
                leftover: None,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_replaced_staged_file_is_not_committed() {
    let (dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    let temp = writer.temp_path().to_owned();
    fs::remove_file(&temp).unwrap();
    fs::write(&temp, "forged").unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Check,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    assert_eq!(
        fs::read(&temp).unwrap(),
        b"forged",
        "it is not ours to remove"
    );
    assert_eq!(names(dir.path()).len(), 2);
}

#[test]
fn a_replaced_file_object_is_not_committed() {
    let (dir, dest) = dir_with_old();
    let mut writer = AtomicWriter::open(&dest).unwrap();
    *writer.file_mut() = tempfile::tempfile().unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Check,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn no_clobber_open_refuses_an_existing_destination() {
    let (dir, dest) = dir_with_old();
    let error = AtomicWriter::options()
        .no_clobber(true)
        .open(&dest)
        .unwrap_err();
    assert!(
        matches!(error, OpenError::AlreadyExists { .. }),
        "{error:?}"
    );
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn no_clobber_commit_refuses_a_new_destination() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let writer = AtomicWriter::options()
        .no_clobber(true)
        .open(&dest)
        .unwrap();
    fs::write(&dest, "theirs").unwrap();
    let CommitError::NotReplaced {
        step: CommitStep::Rename,
        source,
        leftover: None,
        ..
    } = writer.commit().unwrap_err()
    else {
        panic!("another error");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&dest).unwrap(), b"theirs");
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn of_many_no_clobber_writers_exactly_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let options = AtomicWriter::options().no_clobber(true);
    let writers: Vec<_> = (0..8).map(|_| options.open(&dest).unwrap()).collect();
    let won: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = writers
            .into_iter()
            .map(|writer| scope.spawn(|| writer.commit().is_ok()))
            .collect();
        threads
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum()
    });
    assert_eq!(won, 1);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_staging_directory_of_the_same_file_system_works() {
    let dir = tempfile::tempdir().unwrap();
    let (staging, target) = (dir.path().join("staging"), dir.path().join("target"));
    fs::create_dir(&staging).unwrap();
    fs::create_dir(&target).unwrap();
    let dest = target.join("dest");
    for (text, no_clobber) in [(b"one", true), (b"two", false)] {
        let options = AtomicWriter::options()
            .staging_dir(&staging)
            .no_clobber(no_clobber);
        let writer = options.open(&dest).unwrap();
        assert_eq!(writer.temp_path().parent(), Some(staging.as_path()));
        writer.write_all_at(text, 0).unwrap();
        writer.commit().unwrap();
        assert_eq!(fs::read(&dest).unwrap(), text);
    }
    assert_names(&target, &["dest"]);
    assert_names(&staging, &[]);
}

#[cfg(target_os = "linux")]
#[test]
fn staging_on_another_file_system_is_refused_at_open() {
    const TEST: &str = "staging_on_another_file_system_is_refused_at_open";
    if !Need::Root.met(TEST) {
        return;
    }
    let elsewhere = test_machine::TinyTmpfs::new(1 << 20).unwrap();
    let (dir, dest) = dir_with_old();
    let error = AtomicWriter::options()
        .staging_dir(elsewhere.path())
        .open(&dest)
        .unwrap_err();
    let OpenError::CrossFileSystem {
        dest_dir,
        staging_dir,
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(
        (dest_dir.as_path(), staging_dir.as_path()),
        (dir.path(), elsewhere.path())
    );
    assert_names(elsewhere.path(), &[]);
    assert_names(dir.path(), &["dest"]);
}

/// The devices are equal, so only a rename detects the boundary.
#[cfg(target_os = "linux")]
#[test]
fn staging_behind_a_bind_mount_is_refused_at_open() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    const TEST: &str = "staging_behind_a_bind_mount_is_refused_at_open";
    if !Need::Root.met(TEST) {
        return;
    }
    let (dir, dest) = dir_with_old();
    let (staging, view) = (dir.path().join("staging"), dir.path().join("view"));
    fs::create_dir(&staging).unwrap();
    fs::create_dir(&view).unwrap();
    mount(
        Some(&staging),
        &view,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let result = AtomicWriter::options().staging_dir(&view).open(&dest);
    umount2(&view, MntFlags::MNT_DETACH).unwrap();
    let error = result.unwrap_err();
    assert!(
        matches!(error, OpenError::CrossFileSystem { .. }),
        "{error:?}"
    );
    assert_names(&staging, &[]);
    assert_names(dir.path(), &["dest", "staging", "view"]);
}

#[rstest]
#[case::relative("real/file")]
#[case::through_the_parent("real/../real/file")]
#[case::another_link("hop")]
fn a_symlink_is_followed_and_kept(#[case] target: &str) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("real")).unwrap();
    let file = dir.path().join("real/file");
    fs::write(&file, "old").unwrap();
    symlink(&file, dir.path().join("hop")).unwrap();
    let dest = dir.path().join("dest");
    symlink(target, &dest).unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_eq!(fs::read_link(&dest).unwrap(), Path::new(target));
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert_names(&dir.path().join("real"), &["file"]);
    assert_names(dir.path(), &["dest", "hop", "real"]);
}

#[rstest]
#[case::dangling("nowhere")]
#[case::leading_to_a_file("file")]
fn a_symlinked_destination_is_replaced_on_request(#[case] target: &str) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "old").unwrap();
    let dest = dir.path().join("dest");
    symlink(target, &dest).unwrap();
    commit(
        &AtomicWriter::options().symlinks(Symlinks::Replace),
        &dest,
        b"new",
    )
    .unwrap();
    assert!(fs::symlink_metadata(&dest).unwrap().is_file());
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"old");
    assert_names(dir.path(), &["dest", "file"]);
}

#[rstest]
#[case::no_file("nowhere")]
#[case::no_directory("unmounted/disk")]
fn a_dangling_symlink_is_a_typed_error(#[case] leads_to: &str) {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("dest");
    symlink(leads_to, &link).unwrap();
    let error = AtomicWriter::open(&link).unwrap_err();
    assert!(error.to_string().contains("does not exist"), "{error}");
    let OpenError::DanglingSymlink { path, target } = error else {
        panic!("{error:?}");
    };
    assert_eq!((path, target), (link, leads_to.into()));
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_loop_of_symlinks_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    symlink("b", dir.path().join("a")).unwrap();
    symlink("a", dir.path().join("b")).unwrap();
    let OpenError::Io { source, .. } = AtomicWriter::open(dir.path().join("a")).unwrap_err() else {
        panic!("another error");
    };
    assert_eq!(source.raw_os_error(), Some(nix::errno::Errno::ELOOP as i32));
}

#[test]
fn another_users_symlink_in_a_shared_directory_is_refused() {
    if !Need::Root.met("another_users_symlink_in_a_shared_directory_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let (victim, link) = (dir.path().join("victim"), dir.path().join("link"));
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, &link).unwrap();
    commit(&AtomicWriter::options(), &link, b"ours").expect("an own link is followed");
    std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
    let error = AtomicWriter::open(&link).unwrap_err();
    assert!(
        matches!(error, OpenError::UntrustedSymlink { owner: 12345, .. }),
        "{error:?}"
    );
    assert_eq!(fs::read(&victim).unwrap(), b"ours");
}

#[rstest]
#[case::a_directory("dir", true)]
#[case::a_fifo("fifo", false)]
#[case::a_link_to_a_directory("link", true)]
fn only_a_regular_file_is_replaced(#[case] name: &str, #[case] directory: bool) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    symlink("dir/", dir.path().join("link")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = AtomicWriter::open(dir.path().join(name)).unwrap_err();
    assert!(
        matches!(error, OpenError::NotAFile { is_dir, .. } if is_dir == directory),
        "{error:?}"
    );
    assert_names(dir.path(), &["dir", "fifo", "link"]);
}

#[test]
fn a_destination_that_became_a_directory_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let writer = AtomicWriter::open(&dest).unwrap();
    fs::create_dir(&dest).unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Rename,
                leftover: None,
                ..
            }
        ),
        "{error:?}"
    );
    assert_names(dir.path(), &["dest"]);
}

#[rstest]
#[case("")]
#[case("/")]
#[case("..")]
#[case("dest/")]
#[case("dest/.")]
#[case("some/..")]
fn a_path_without_a_file_name_is_an_error(#[case] path: &str) {
    let error = AtomicWriter::open(path).unwrap_err();
    assert!(matches!(error, OpenError::NoFileName { .. }), "{error:?}");
}

/// A file with such a name would be swept, or read as a record that blocks later writers.
#[rstest]
#[case::a_staged_name(".atomic-file-0123abcd-0.stage", Symlinks::Replace)]
#[case::a_staged_name_without_lock(".atomic-file-0123abcd-0.unlocked-stage", Symlinks::Replace)]
#[case::a_record_of_version_1(".atomic-file-group", Symlinks::Replace)]
#[case::a_record(".atomic-file-0123456789abcdef.group", Symlinks::Replace)]
#[case::a_ticket(".atomic-file-0123456789abcdef.intent", Symlinks::Replace)]
#[case::a_link_to_a_record("link", Symlinks::Follow)]
fn a_reserved_name_is_refused(#[case] name: &str, #[case] symlinks: Symlinks) {
    let dir = tempfile::tempdir().unwrap();
    if name == "link" {
        fs::write(dir.path().join(".atomic-file-group"), b"").unwrap();
        symlink(".atomic-file-group", dir.path().join(name)).unwrap();
    }
    let error = AtomicWriter::options()
        .symlinks(symlinks)
        .open(dir.path().join(name))
        .unwrap_err();
    assert!(matches!(error, OpenError::ReservedName { .. }), "{error:?}");
}

#[test]
fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let OpenError::OpenDirectory { path, source } =
        AtomicWriter::open(missing.join("dest")).unwrap_err()
    else {
        panic!("another error");
    };
    assert_eq!(
        (path, source.kind()),
        (missing, std::io::ErrorKind::NotFound)
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_read_only_directory_is_an_error() {
    if !Need::Root.met("a_read_only_directory_is_an_error") {
        return;
    }
    let (dir, dest) = dir_with_old();
    let view = test_machine::ReadOnlyBind::of(dir.path()).unwrap();
    let error = AtomicWriter::open(view.path().join("dest")).unwrap_err();
    let OpenError::NotWritable {
        dir: named, source, ..
    } = error
    else {
        panic!("another error: {error:?}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(named, view.path());
    assert_eq!(fs::read(dest).unwrap(), b"old");
    assert_names(dir.path(), &["dest"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_only_the_old_file() {
    if !Need::Root.met("a_full_disk_leaves_only_the_old_file") {
        return;
    }
    let disk = test_machine::TinyTmpfs::new(64 << 10).unwrap();
    let dest = disk.path().join("dest");
    fs::write(&dest, "old").unwrap();
    let writer = AtomicWriter::open(&dest).unwrap();
    let error = writer.write_all_at(&[1; 256 << 10], 0).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    drop(writer);
    assert_names(disk.path(), &["dest"]);
    assert_eq!(fs::read(&dest).unwrap(), b"old");
}

#[test]
fn a_file_size_limit_leaves_only_the_old_file() {
    let (dir, dest) = dir_with_old();
    let child = command("size limit", dir.path());
    let mut limited = Command::new("sh");
    // In blocks of 512 bytes; ignored signals stay ignored across exec.
    limited.args(["-c", r#"trap "" XFSZ; ulimit -f 16; exec "$0" "$@""#]);
    limited.arg(child.get_program()).args(child.get_args());
    limited.envs(
        child
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?))),
    );
    assert_eq!(report(limited).unwrap(), "FileTooLarge");
    assert_names(dir.path(), &["dest"]);
    assert_eq!(fs::read(&dest).unwrap(), b"old");
}

#[cfg(target_os = "linux")]
#[test]
fn the_descriptors_are_not_inherited() {
    let (_dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    let listed = Command::new("ls")
        .args(["-l", "/dev/fd/"])
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("0 ->"), "{listed}");
    let name = writer.temp_path().file_name().unwrap().to_str().unwrap();
    assert!(!listed.contains(name), "{listed}");
}

#[test]
fn a_writer_can_be_used_from_several_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<AtomicWriter>();
    let (_dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    std::thread::scope(|scope| {
        for id in 0..4u8 {
            let writer = &writer;
            scope.spawn(move || {
                writer
                    .write_all_at(&[id; 4096], u64::from(id) * 4096)
                    .unwrap()
            });
        }
    });
    writer.commit().unwrap();
    let bytes = fs::read(&dest).unwrap();
    assert!((0..4u8).all(|id| bytes[usize::from(id) * 4096..][..4096] == [id; 4096]));
}

#[test]
fn slices_are_written_as_one() {
    let (_dir, dest) = dir_with_old();
    let mut writer = AtomicWriter::open(&dest).unwrap();
    let slices = [b"two ".as_slice(), b"slices"].map(std::io::IoSlice::new);
    assert_eq!(writer.write_vectored(&slices).unwrap(), 10);
    writer.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"two slices");
}

#[test]
fn a_spawned_program_does_not_inherit_the_file() {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let (_dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    let flags = fcntl(writer.file(), FcntlArg::F_GETFD).unwrap();
    assert_eq!(FdFlag::from_bits_retain(flags), FdFlag::FD_CLOEXEC);
}
