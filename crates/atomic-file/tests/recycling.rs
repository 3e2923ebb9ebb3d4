//! Recycling of replaced files.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;

use atomic_file::{AtomicGroup, AtomicWriter, Durability, sweep};
use rstest::rstest;
use support::recycling::{
    SIZE, inode, one_at_a_time, recycled_files, recycling, save, with_recycled_file,
};
use support::{assert_names, names, same_text};
use test_machine::{FileSystem, LoopMount, needs, recycling_dir};

#[test]
fn two_files_alternate() {
    let _turn = one_at_a_time();
    let (dir, dest, recycled_file) = with_recycled_file();
    let inodes = [inode(&recycled_file), inode(&dest)];
    for turn in 0..6 {
        let writer = recycling().open(&dest).unwrap();
        assert!(writer.recycled());
        assert!(
            recycled_files(dir.path()).is_empty(),
            "it is the staged file now"
        );
        assert_eq!(inode(writer.staged_path()), inodes[turn % 2]);
        assert_eq!(fs::read(&dest).unwrap(), [turn as u8 + 2; SIZE], "the old");
        writer.write_all_at(&[turn as u8 + 3; SIZE], 0).unwrap();
        writer.commit().unwrap();
        assert_eq!(fs::read(&dest).unwrap(), [turn as u8 + 3; SIZE]);
        assert_eq!(inode(&dest), inodes[turn % 2]);
        assert_eq!(
            recycled_files(dir.path()),
            std::slice::from_ref(&recycled_file)
        );
        assert_eq!(names(dir.path()).len(), 2);
    }
}

#[rstest]
fn a_recycled_file_takes_no_name_of_another_writer(#[values(true, false)] in_use: bool) {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    let first = AtomicWriter::open(&dest).unwrap().staged_path().to_owned();
    save(&recycling(), &dest, 1);
    save(&recycling(), &dest, 2);
    let other = File::create(&first).unwrap();
    other.write_all_at(b"another's", 0).unwrap();
    if in_use {
        other.lock().unwrap();
    } else {
        drop(other);
    }
    let writer = recycling().open(&dest).unwrap();
    assert!(writer.recycled());
    assert_ne!(writer.staged_path(), first);
    let kept = fs::read(&first).is_ok_and(|bytes| bytes == b"another's");
    assert_eq!(kept, in_use, "an orphan is removed");
}

/// New files have the group of their directory if that has the set-group-ID bit, and their writer's
/// otherwise.
#[rstest]
#[case::the_writers(0o755)]
#[case::the_directorys(0o2755)]
fn a_file_with_the_group_of_a_new_file_is_recycled(#[case] mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    needs!(Root);
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    std::os::unix::fs::chown(dir.path(), None, Some(12345)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
    let dest = dir.path().join("dest");
    save(&recycling(), &dest, 1);
    save(&recycling(), &dest, 2);
    assert_eq!(fs::metadata(&dest).unwrap().gid() == 12345, mode == 0o2755);
    assert!(save(&recycling(), &dest, 3));
}

#[test]
fn io_uring_can_write_a_recycled_file() {
    let _turn = one_at_a_time();
    let (_dir, dest, _) = with_recycled_file();
    let writer = recycling().open(&dest).unwrap();
    assert!(writer.recycled());
    let flags = nix::fcntl::fcntl(writer.file(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
    assert_eq!(
        flags & libc::O_NONBLOCK,
        0,
        "or each write fails with EAGAIN"
    );
    assert_eq!(flags & libc::O_ACCMODE, libc::O_RDWR);
    let flags = nix::fcntl::fcntl(writer.file(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
    assert_ne!(flags & libc::FD_CLOEXEC, 0);
    // No lease may remain: reopening the file, as for direct I/O, would block.
    let again = format!("/proc/self/fd/{}", writer.file().as_raw_fd());
    let again = File::options().write(true).open(again).unwrap();
    again.write_all_at(&[3; SIZE], 0).unwrap();
    writer.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), [3; SIZE]);
}

#[test]
fn without_exchange_a_commit_renames() {
    let _turn = one_at_a_time();
    needs!(Mount(FileSystem::EXFAT));
    let mount = LoopMount::new(FileSystem::EXFAT).unwrap();
    // The file system has no modes either: it gives every file the same one.
    let any = mount.path().join("any");
    fs::write(&any, "").unwrap();
    let mode = fs::metadata(&any).unwrap().mode();
    fs::remove_file(&any).unwrap();
    let dest = mount.path().join("dest");
    for turn in 1..4 {
        assert!(!save(
            &recycling().mode(mode).durability(Durability::Full),
            &dest,
            turn
        ));
        assert_names(mount.path(), &["dest"]);
    }
}

#[test]
fn a_recycled_file_obeys_the_size_limit() {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    let small = AtomicWriter::options().recycle(SIZE as u64 / 2);
    save(&small, &dest, 1);
    save(&small, &dest, 2);
    assert_names(dir.path(), &["dest"]);
    save(&recycling(), &dest, 3);
    assert_eq!(recycled_files(dir.path()).len(), 1);
    assert!(!save(&small, &dest, 4), "larger than the limit");
    assert_names(dir.path(), &["dest"]);

    // A hole has no allocated bytes.
    let writer = small.open(&dest).unwrap();
    writer.file().set_len(1 << 30).unwrap();
    writer.commit().unwrap();
    save(&small, &dest, 5);
    assert_eq!(
        fs::metadata(&recycled_files(dir.path())[0]).unwrap().len(),
        1 << 30
    );
    assert!(save(&small, &dest, 6));
}

#[test]
fn a_writer_without_recycling_removes_the_recycled_file() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let writer = AtomicWriter::open(&dest).unwrap();
    assert!(!writer.recycled());
    assert!(recycled_files(dir.path()).is_empty());
    writer.commit().unwrap();
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn another_destinations_recycled_file_is_kept() {
    let _turn = one_at_a_time();
    let (dir, dest, recycled_file) = with_recycled_file();
    let other = dir.path().join("other");
    assert!(!save(&recycling(), &other, 7));
    assert!(!save(&recycling(), &other, 8));
    assert!(!save(&AtomicWriter::options(), &other, 9));
    assert_eq!(fs::read(&recycled_file).unwrap(), [1; SIZE]);
    assert!(save(&recycling(), &dest, 3));
}

#[rstest]
#[case::barrier(Durability::Barrier)]
#[case::none(Durability::None)]
fn the_old_file_is_kept_only_with_full_durability(#[case] durability: Durability) {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let weak = recycling().durability(durability);
    assert!(save(&weak, &dest, 3), "what a full commit kept may be used");
    assert_names(dir.path(), &["dest"]);
    assert!(!save(&weak, &dest, 4));
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_staging_directory_disables_recycling() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let staging = tempfile::tempdir_in(dir.path()).unwrap();
    let elsewhere = recycling().staging_dir(staging.path());
    assert!(!save(&elsewhere, &dest, 3));
    assert!(!save(&elsewhere, &dest, 4));
    assert!(names(staging.path()).is_empty());
    assert!(recycled_files(dir.path()).is_empty());
}

#[rstest]
#[case::wider(0o600, 0o644)]
#[case::narrower(0o644, 0o600)]
#[case::not_even_for_its_owner(0o000, 0o440)]
fn the_mode_is_reset_and_the_recycled_file_is_private(#[case] first: u32, #[case] second: u32) {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    for mode in [first, first, second] {
        let writer = recycling().mode(mode).open(&dest).unwrap();
        writer.write_all_at(&[mode as u8; SIZE], 0).unwrap();
        writer.commit().unwrap();
    }
    assert_eq!(mode(&dest), second);
    for recycled_file in recycled_files(dir.path()) {
        assert_eq!(mode(&recycled_file), 0o600);
    }
    let writer = recycling().mode(0o604).open(&dest).unwrap();
    assert_eq!(
        mode(writer.staged_path()),
        0o600,
        "the commit sets the mode"
    );
    assert!(writer.recycled() || !nix::unistd::geteuid().is_root());
}

#[test]
fn a_link_at_the_recycled_name_is_not_followed() {
    let _turn = one_at_a_time();
    let (dir, dest, recycled_file) = with_recycled_file();
    let victim = dir.path().join("victim");
    fs::rename(&recycled_file, &victim).unwrap();
    symlink("victim", &recycled_file).unwrap();
    assert!(!save(&recycling(), &dest, 3));
    assert!(!save(&recycling(), &dest, 4));
    assert_eq!(fs::read(&victim).unwrap(), [1; SIZE]);
    assert_eq!(names(dir.path()).len(), 3, "no file is kept beside it");
}

#[test]
fn a_file_that_differs_from_a_new_one_is_not_reused() {
    let _turn = one_at_a_time();
    needs!(Root);
    let of_user = |path: &Path| std::os::unix::fs::chown(path, Some(12345), None).unwrap();
    let of_group = |path: &Path| std::os::unix::fs::chown(path, None, Some(12345)).unwrap();
    let attribute = |path: &Path| {
        let done = std::process::Command::new("setfattr")
            .args(["-n", "user.note", "-v", "mine"])
            .arg(path)
            .status();
        // Not installed on every machine, unlike python3.
        if done.is_err() {
            let script = "import os, sys; os.setxattr(sys.argv[1], 'user.note', b'mine')";
            let done = std::process::Command::new("python3")
                .args(["-c", script])
                .arg(path)
                .status();
            assert!(done.unwrap().success());
        }
    };
    for alter in [&of_user as &dyn Fn(&Path), &of_group, &attribute] {
        let (dir, dest, recycled_file) = with_recycled_file();
        alter(&recycled_file);
        assert!(!save(&recycling(), &dest, 3));
        alter(&dest);
        assert!(save(&recycling(), &dest, 4));
        assert_names(dir.path(), &["dest"]);
    }
}

#[test]
fn an_acl_of_the_old_file_is_not_inherited() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    // Version 2; owner, user 12345, group, mask, others: all may read.
    let script = "import os, struct, sys\n\
        entries = [(1, 6, -1), (2, 4, 12345), (4, 0, -1), (16, 4, -1), (32, 0, -1)]\n\
        acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHi', *entry) for entry in entries)\n\
        os.setxattr(sys.argv[1], 'system.posix_acl_access', acl)";
    let done = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(&dest)
        .status();
    assert!(done.unwrap().success());
    save(&recycling(), &dest, 3);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn no_clobber_reuses_a_file_and_keeps_none() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let options = recycling().no_clobber(true);
    assert!(options.open(&dest).is_err());
    assert_eq!(
        recycled_files(dir.path()).len(),
        1,
        "a failed open keeps the file"
    );
    fs::remove_file(&dest).unwrap();
    assert!(save(&options, &dest, 3));
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_group_reuses_files_and_keeps_none() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let memory = recycling().open(&dest).unwrap();
    assert!(memory.recycled());
    let state = recycling().open(dir.path().join("state")).unwrap();
    let mut group = AtomicGroup::new();
    for member in [memory, state] {
        member.file().set_len(3).unwrap();
        member.write_all_at(b"new", 0).unwrap();
        group.add(member).unwrap();
    }
    group.commit().unwrap();
    assert_eq!(same_text(dir.path(), &["dest", "state"]), "new");
    assert_names(dir.path(), &["dest", "state"]);
}

#[test]
fn a_dropped_or_discarded_file_is_removed() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    drop(recycling().open(&dest).unwrap());
    assert_names(dir.path(), &["dest"]);
    let (dir, dest, _) = with_recycled_file();
    recycling().open(&dest).unwrap().discard().unwrap();
    assert_names(dir.path(), &["dest"]);
    assert_eq!(fs::read(&dest).unwrap(), [2; SIZE]);
}

#[test]
fn a_sweep_reports_recycled_files_separately() {
    let _turn = one_at_a_time();
    let (dir, dest, recycled_file) = with_recycled_file();
    let staged = recycling().open(dir.path().join("other")).unwrap();
    let report = sweep(dir.path()).unwrap();
    assert_eq!(report.recycled, [recycled_file]);
    assert!(report.removed.is_empty() && report.skipped.is_empty());
    assert_eq!(report.in_use, [staged.staged_path()]);
    drop(staged);
    assert_names(dir.path(), &["dest"]);
    assert!(!save(&recycling(), &dest, 3));
}

/// Under its old name, a recovery would take it for a staged file of that group.
#[test]
fn a_file_named_by_a_group_record_is_not_kept() {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let path = dir.path().join(".atomic-file-0123456789abcdef.group");
    let writer = recycling().open(&dest).unwrap();
    assert!(writer.recycled());
    let record = File::create(&path).unwrap();
    // The group is in progress.
    record.lock().unwrap();
    writer.commit().unwrap();
    assert!(recycled_files(dir.path()).is_empty());
    fs::remove_file(&path).unwrap();
    assert_names(dir.path(), &["dest"]);
}

/// A group with a ticket may record the recycled file as its old destination.
#[rstest]
#[case::in_progress(true)]
#[case::orphaned(false)]
fn a_file_is_reused_unless_a_group_holds_a_ticket(#[case] in_progress: bool) {
    let _turn = one_at_a_time();
    let (dir, dest, _) = with_recycled_file();
    let path = dir.path().join(".atomic-file-0123456789abcdef.intent");
    let ticket = File::create(&path).unwrap();
    if in_progress {
        ticket.lock().unwrap();
    }
    assert_eq!(save(&recycling(), &dest, 3), !in_progress);
    assert_eq!(path.exists(), in_progress);
}
