//! Destinations and staging directories: `no_clobber`, links, refused paths.

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use atomic_file::{AtomicWriter, CommitError, CommitStep, OpenError, Symlinks};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use rstest::rstest;
use support::{assert_names, commit, dir_with_old};
use test_machine::needs;

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

/// A path of more than `PATH_MAX` bytes.
#[test]
fn a_destination_may_have_any_long_path() {
    let dir = tempfile::tempdir().unwrap();
    let name = "n".repeat(200);
    let mut long = dir.path().to_owned();
    let mut inner = fs::File::open(dir.path()).unwrap();
    while long.as_os_str().len() < 2 * libc::PATH_MAX as usize {
        mkdirat(&inner, name.as_str(), Mode::S_IRWXU).unwrap();
        let opened = openat(&inner, name.as_str(), OFlag::O_DIRECTORY, Mode::empty());
        inner = opened.unwrap().into();
        long.push(&name);
    }
    let dest = long.join("dest");
    for (bytes, options) in [
        (b"one", AtomicWriter::options()),
        (b"two", AtomicWriter::options().staging_dir(&long)),
    ] {
        let writer = options.open(&dest).unwrap();
        assert_eq!(writer.dest_path(), dest);
        writer.write_all_at(bytes, 0).unwrap();
        writer.commit().unwrap();
    }
    assert_eq!(atomic_file::sweep(&long).unwrap().removed.len(), 0);
    atomic_file::recover(&long).unwrap();
    let written = openat(&inner, "dest", OFlag::O_RDONLY, Mode::empty()).unwrap();
    let written = std::io::read_to_string(fs::File::from(written)).unwrap();
    assert_eq!(written, "two");
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
        assert_eq!(writer.staged_path().parent(), Some(staging.as_path()));
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
    needs!(Root);
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
    needs!(Root);
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
    needs!(Root);
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

/// The owner of a directory may replace any link in it.
#[test]
fn symlink_in_another_users_directory_is_refused() {
    needs!(Root);
    const OWNER: u32 = 12345;
    let dir = tempfile::tempdir().unwrap();
    let (home, victim) = (dir.path().join("home"), dir.path().join("victim"));
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, home.join("link")).unwrap();
    commit(&AtomicWriter::options(), &home.join("link"), b"ours").expect("a directory of root");
    std::os::unix::fs::chown(&home, Some(OWNER), None).unwrap();
    for of in [0, OWNER, OWNER + 1] {
        std::os::unix::fs::lchown(home.join("link"), Some(of), None).unwrap();
        let error = AtomicWriter::open(home.join("link")).unwrap_err();
        assert!(
            matches!(error, OpenError::UntrustedSymlink { owner, .. } if owner == of),
            "{error:?}"
        );
    }
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
    needs!(Root);
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
