//! Links to open files (`/proc/PID/fd/N`): their text may be the path of another file.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::path::Path;

use atomic_file::{AtomicWriter, OpenError};
use rstest::rstest;
use support::{assert_names, commit, dir_with_old};

#[rstest]
#[case::of_this_process("/proc/self/fd/{fd}", false)]
#[case::of_a_process("/proc/{pid}/fd/{fd}", false)]
#[case::of_the_system("/dev/fd/{fd}", false)]
#[case::below_a_magic_directory("/proc/self/root/proc/{pid}/fd/{fd}", false)]
#[case::behind_a_link("/dev/fd/{fd}", true)]
fn a_link_to_an_open_file_is_refused(#[case] path: &str, #[case] by_link: bool) {
    let dir = tempfile::tempdir().unwrap();
    let open = File::create(dir.path().join("ram")).unwrap();
    fs::remove_file(dir.path().join("ram")).unwrap();
    // The text of the link, although the open file is another one.
    fs::write(dir.path().join("ram (deleted)"), "precious").unwrap();
    let path = path
        .replace("{fd}", &open.as_raw_fd().to_string())
        .replace("{pid}", &std::process::id().to_string());
    let mut path = Path::new(&path).to_owned();
    let mut names = vec!["ram (deleted)"];
    if by_link {
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        path = link;
        names.insert(0, "link");
    }
    let error = AtomicWriter::open(&path).unwrap_err();
    let OpenError::MagicLink { path: named, link } = error else {
        panic!("{error:?}");
    };
    assert_eq!(named, path);
    assert!(link.ends_with(open.as_raw_fd().to_string()), "{link:?}");
    assert_eq!(open.metadata().unwrap().len(), 0);
    assert_eq!(
        fs::read(dir.path().join("ram (deleted)")).unwrap(),
        b"precious"
    );
    assert_names(dir.path(), &names);
}

#[rstest]
#[case::directly(false)]
#[case::behind_a_link(true)]
fn a_path_through_a_magic_directory_is_followed(#[case] by_link: bool) {
    let (dir, dest) = dir_with_old();
    let through = Path::new("/proc/self/root").join(dest.strip_prefix("/").unwrap());
    let link = dir.path().join("link");
    symlink(&through, &link).unwrap();
    let path = if by_link { &link } else { &through };
    commit(&AtomicWriter::options(), path, b"new").unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest", "link"]);
}

/// Linux 5.6 and later distinguish such a link from a magic link.
#[test]
fn a_plain_link_of_procfs_is_followed() {
    let error = AtomicWriter::open("/proc/mounts").unwrap_err();
    assert!(!matches!(error, OpenError::MagicLink { .. }), "{error:?}");
}
