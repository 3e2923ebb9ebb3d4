//! Restoring into existing RAM.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use support::ram_file::{bytes, create, memfd};
use support::{Ended, PAGE, RAM, Work};
use test_machine::{HugeFs, TinyTmpfs, needs};

#[test]
fn a_guests_memfd_is_captured_and_another_one_restored_in_place() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    guest.write_all_at(&work.read("first"), 0).unwrap();
    work.good(&format!("dump {path} -o full2.mem"));
    guest.write_all_at(&work.read("ram"), 0).unwrap();
    work.good(&format!("diff full2.mem --ram {path} -o d.mem"));

    let (new, path) = memfd(RAM);
    work.good(&format!("restore full2.mem d.mem -o {path}"));
    assert!(bytes(&new) == work.read("ram"));
    // Zero pages take no memory.
    assert!(new.metadata().unwrap().blocks() * 512 < RAM / 2);
}

#[test]
fn ram_in_use_is_overwritten_only_by_force_and_wholly() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    guest
        .write_all_at(&[7; 3 * PAGE as usize], 900 * PAGE)
        .unwrap();
    let before = bytes(&guest);
    work.fails(
        &format!("restore full.mem -o {path}"),
        2,
        &["not empty", "--force"],
    );
    assert!(bytes(&guest) == before);
    work.good(&format!("restore full.mem -o {path} --force"));
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn ram_of_another_size_stays_as_it_is() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM + PAGE);
    guest.write_all_at(&[7; 10], 0).unwrap();
    work.fails(
        &format!("restore full.mem -o {path} --force"),
        2,
        &["must be equal"],
    );
    let mut ten = [0; 10];
    guest.read_exact_at(&mut ten, 0).unwrap();
    assert_eq!(ten, [7; 10]);
}

/// Writes fail from the third on. The first only tests whether the RAM is writable.
#[test]
fn a_restore_that_fails_in_the_middle_leaves_the_ram_empty() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let mut strace = Command::new("strace");
    strace
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"])
        .args(["-e", "inject=pwrite64:error=EIO:when=3+", support::RAMSNAP])
        .args(["restore", "full.mem", "--force", "-o", "guest"])
        .current_dir(work.path(""));
    Ended::of(&mut strace).fails(3, &["Input/output error", "was emptied"]);
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
    assert_eq!(guest.metadata().unwrap().len(), RAM);
}

#[test]
fn ram_stays_as_it_is_where_there_is_no_room() {
    needs!(Root);
    let work = Work::with_chain();
    // Room for a part of the present pages.
    let disk = TinyTmpfs::new(128 << 10).unwrap();
    let path = disk.path().join("ram");
    let guest = create(&path);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = (bytes(&guest), guest.metadata().unwrap().blocks());
    let restore = format!("restore full.mem --force -o {}", path.display());
    work.fails(&restore, 3, &["make room", "131072", "nothing was written"]);
    assert!((bytes(&guest), guest.metadata().unwrap().blocks()) == before);
}

/// The pages of the old RAM count as room.
#[test]
fn ram_that_fills_its_file_system_is_overwritten() {
    needs!(Root);
    let work = Work::with_chain();
    let disk = TinyTmpfs::new(512 << 10).unwrap();
    let path = disk.path().join("ram");
    let guest = create(&path);
    let full = (0..).find_map(|page| guest.write_all_at(&[7; 4096], page * PAGE).err());
    assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    work.good(&format!("restore full.mem --force -o {}", path.display()));
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn ram_that_is_sealed_against_writing_stays_as_it_is() {
    let work = Work::with_chain();
    let fd = memfd_create("ram", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let guest = File::from(fd);
    guest.set_len(RAM).unwrap();
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = bytes(&guest);
    fcntl(&guest, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), guest.as_raw_fd());
    let restore = format!("restore full.mem --force -o {path}");
    work.fails(&restore, 3, &["cannot write", "unchanged"]);
    assert!(bytes(&guest) == before);
}

/// RLIMIT_FSIZE, which the shell takes in blocks of 512 bytes.
#[test]
fn ram_larger_than_a_file_may_be_stays_as_it_is() {
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = bytes(&guest);
    let script = format!(
        "ulimit -f 8192; exec {} restore full.mem --force -o guest",
        support::RAMSNAP
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(work.path(""));
    Ended::of(&mut shell).fails(3, &["cannot write", "File too large", "unchanged"]);
    assert!(bytes(&guest) == before);
}

#[test]
fn ram_stays_as_it_is_where_an_image_is_damaged() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    work.rot("full.mem", 5000);
    // First empty RAM, then RAM in use.
    for force in ["", " --force"] {
        let restore = format!("restore full.mem -o {path}{force}");
        work.fails(&restore, 1, &["damaged"]);
        assert_eq!(guest.metadata().unwrap().blocks() > 0, !force.is_empty());
        guest.write_all_at(&[7; 10], 0).unwrap();
    }
    let mut ten = [0; 10];
    guest.read_exact_at(&mut ten, 0).unwrap();
    assert_eq!(ten, [7; 10]);
}

/// hugetlbfs has no write(2).
#[test]
fn ram_of_huge_pages_is_restored() {
    needs!(HugePages);
    let work = Work::with_chain();
    let huge = HugeFs::new(None).unwrap();
    let path = huge.path().join("ram");
    let guest = create(&path);
    let restore = |images: &str| format!("restore {images} -o {}", path.display());
    work.good(&restore("full.mem"));
    assert!(bytes(&guest) == work.read("first"));
    work.fails(&restore("full.mem d1.mem d2.mem"), 2, &["--force"]);
    work.good(&restore("full.mem d1.mem d2.mem --force"));
    assert!(bytes(&guest) == work.read("ram"));
}

#[test]
fn a_new_file_of_huge_pages_is_refused_before_images_are_read() {
    needs!(HugePages);
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    let huge = HugeFs::new(None).unwrap();
    let out = huge.path().join("out");
    for verb in ["restore full.mem", "dump ram", "merge full.mem d1.mem"] {
        let command = format!("{verb} -o {}", out.display());
        work.fails(
            &command,
            3,
            &["hugetlbfs", "write(2)", "on another file system"],
        );
    }
    assert_eq!(support::list(huge.path()), [""; 0]);
}

#[test]
fn ram_of_huge_pages_stays_as_it_is_where_there_are_too_few() {
    needs!(HugePages);
    let work = Work::with_chain();
    // Two of the four pages.
    let huge = HugeFs::new(Some(4 << 20)).unwrap();
    let path = huge.path().join("ram");
    let guest = create(&path);
    let zeros = bytes(&guest);
    for force in ["", " --force"] {
        let restore = format!("restore full.mem -o {}{force}", path.display());
        work.fails(&restore, 3, &["huge pages", "unchanged"]);
    }
    assert!(bytes(&guest) == zeros);
    assert_eq!(guest.metadata().unwrap().blocks(), 0);
}

#[test]
fn ram_is_not_restored_to_files_of_another_user() {
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
    needs!(Root);
    let work = Work::with_chain();
    let shared = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(shared.path(), 0o1777);
    let path = shared.path().join("guest");
    let guest = create(&path);
    let restore = format!("restore full.mem -o {}", path.display());
    // A file of another user, then a file that other users may read.
    mode(&path, 0o600);
    chown(&path, Some(65534), None).unwrap();
    work.fails(&restore, 2, &["65534", "--force"]);
    chown(&path, Some(0), None).unwrap();
    mode(&path, 0o644);
    work.fails(&restore, 2, &["chmod 600", "--force"]);
    assert_eq!(guest.metadata().unwrap().blocks(), 0);
    // A link of another user to a file of root.
    std::fs::remove_file(&path).unwrap();
    let roots = work.create("roots", RAM);
    symlink(work.path("roots"), &path).unwrap();
    lchown(&path, Some(65534), None).unwrap();
    for (dir, force) in [(0o1777, ""), (0o1777, " --force"), (0o777, " --force")] {
        mode(shared.path(), dir);
        let code = work.run(&format!("{restore}{force}")).code;
        assert!(matches!(code, Some(2 | 3)), "{code:?}");
        assert_eq!(roots.metadata().unwrap().blocks(), 0);
    }
    // Directories that a group may write to are refused as well.
    chown(shared.path(), None, Some(812_345)).unwrap();
    for dir in [0o2775, 0o3775] {
        mode(shared.path(), dir);
        for restore in [&restore, &format!("{restore} --force")] {
            work.fails(restore, 2, &["link", "another user"]);
        }
        let save = format!(
            "dump {} -o {} --force",
            work.path("full.mem").display(),
            path.display()
        );
        assert_ne!(work.run(&save).code, Some(0));
        assert_eq!(roots.metadata().unwrap().blocks(), 0);
    }
    // The owner of a directory may replace any link in it.
    mode(shared.path(), 0o755);
    chown(shared.path(), Some(65534), None).unwrap();
    for owner in [0, 65534] {
        lchown(&path, Some(owner), None).unwrap();
        for restore in [&restore, &format!("{restore} --force")] {
            work.fails(restore, 2, &["link", "another user"]);
        }
        assert_eq!(roots.metadata().unwrap().blocks(), 0);
    }
    chown(shared.path(), Some(0), None).unwrap();
    // Links of this user are followed.
    mode(shared.path(), 0o1777);
    lchown(&path, Some(0), None).unwrap();
    work.good(&restore);
    work.assert_same("roots", "first");
}

/// In a user namespace, all users that it does not map have one id.
#[test]
fn links_of_users_outside_the_namespace_are_not_followed() {
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
    const USER: u32 = 12345;
    needs!(Root, UserNamespace);
    let work = Work::with_chain();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let shared = tempfile::tempdir().unwrap();
    mode(shared.path(), 0o1777);
    let program = shared.path().join("ramsnap");
    for (from, to) in [
        (support::RAMSNAP.as_ref(), &program),
        (&*work.path("full.mem"), &shared.path().join("full.mem")),
    ] {
        std::fs::copy(from, to).unwrap();
        mode(to, 0o755);
    }
    let home = tempfile::tempdir().unwrap();
    chown(home.path(), Some(USER), Some(USER)).unwrap();
    let victim = home.path().join("victim");
    let ram = create(&victim);
    mode(&victim, 0o600);
    chown(&victim, Some(USER), Some(USER)).unwrap();
    let link = shared.path().join("guest");
    symlink(&victim, &link).unwrap();
    let run = |map: &str, verb: &str| {
        let mut command = Command::new(&program);
        command.args([verb, "full.mem", "-o", "guest", "--force"]);
        command.current_dir(shared.path());
        let output = test_machine::in_user_namespace(&command, USER, map);
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for map in ["", "0 12345 1", "0 12345 1\n65534 165534 1"] {
        lchown(&link, Some(USER + 1), Some(USER + 1)).unwrap();
        let (code, error) = run(map, "restore");
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains("another user"), "{error}");
        let (code, error) = run(map, "merge");
        assert_eq!(code, Some(3), "{error}");
        assert!(error.contains("65534"), "{error}");
        assert_eq!(ram.metadata().unwrap().blocks(), 0);
    }
    lchown(&link, Some(USER), Some(USER)).unwrap();
    assert_eq!(run("0 12345 1", "restore"), (Some(0), String::new()));
    assert!(bytes(&ram) == work.read("first"));
}
