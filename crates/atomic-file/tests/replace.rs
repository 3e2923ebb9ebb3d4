//! Commits of one file.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

use atomic_file::{AtomicWriter, CommitError, CommitStep, Durability};
use rstest::rstest;
use support::{assert_names, command, commit, dir_with_old, names, report};
#[cfg(target_os = "linux")]
use test_machine::needs;
use test_machine::rounds;

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
            let temp = writer.staged_path().to_owned();
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
    assert_eq!(writer.staged_path().parent(), Some(dir.path()));
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
fn the_last_of_two_commits_wins() {
    let (dir, dest) = dir_with_old();
    let first = AtomicWriter::open(&dest).unwrap();
    first.write_all_at(b"first", 0).unwrap();
    let second = AtomicWriter::open(&dest).unwrap();
    assert_ne!(first.staged_path(), second.staged_path());
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
    fs::write(writer.staged_path(), "not ours").unwrap();
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

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_only_the_old_file() {
    needs!(Root);
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
    let name = writer.staged_path().file_name().unwrap().to_str().unwrap();
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
