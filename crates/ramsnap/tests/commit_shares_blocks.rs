//! A commit or a merge in place writes only what changed, where the file system can share blocks.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nix::sys::statvfs::statvfs;
use rstest::rstest;
use support::{Ended, PAGE, RAMSNAP, noise};
use test_machine::{FileSystem, LoopMount, needs};

const MIB: u64 = 1 << 20;
const RAM: u64 = 32 * MIB;

fn run(dir: &Path, arguments: &str) -> Ended {
    let mut command = Command::new(RAMSNAP);
    Ended::of(command.args(arguments.split(' ')).current_dir(dir)).good()
}

/// Returns the free bytes once all files are on the disk.
fn free(dir: &Path) -> u64 {
    nix::unistd::syncfs(File::open(dir).unwrap()).unwrap();
    let found = statvfs(dir).unwrap();
    found.blocks_free() * found.fragment_size()
}

/// Page 7 changes, page 300 becomes zeros, and a page after untouched RAM gets bytes.
fn change(ram: &File) {
    ram.write_all_at(&noise(99, PAGE), 7 * PAGE).unwrap();
    ram.write_all_at(&[0; PAGE as usize], 300 * PAGE).unwrap();
    ram.write_all_at(&noise(98, PAGE), RAM - 3 * PAGE).unwrap();
}

#[rstest]
fn only_changed_pages_are_written(
    #[values("sealed", "raw")] layout: &str,
    #[values("commit", "merge --in-place")] verb: &str,
) {
    needs!(Root, Mount(FileSystem::XFS));
    let disk = LoopMount::new(FileSystem::XFS).unwrap();
    let dir = disk.path();
    let ram = File::create_new(dir.join("ram")).unwrap();
    ram.set_len(RAM).unwrap();
    ram.write_all_at(&noise(1, 24 * MIB), 0).unwrap();
    run(dir, &format!("dump ram -o base.mem --layout {layout}"));
    let base = if layout == "raw" {
        "raw:base.mem"
    } else {
        "base.mem"
    };
    change(&ram);
    fs::write(dir.join("vcpus"), "registers").unwrap();
    run(
        dir,
        &format!("diff {base} --ram ram -o d1.mem --metadata vcpus"),
    );
    // Keeps the blocks of the old image.
    let copied = Command::new("cp")
        .args(["--reflink=always", "base.mem", "old.mem"])
        .current_dir(dir)
        .status();
    assert!(copied.unwrap().success());
    let before = free(dir);
    run(dir, &format!("{verb} {base} d1.mem"));
    let taken = before.saturating_sub(free(dir));
    assert!(taken < 2 * MIB, "{taken}");
    run(dir, &format!("diff {base} --ram ram"));
    if layout == "sealed" {
        let info = run(dir, "info base.mem --json").json();
        assert_eq!(
            (&info[0]["kind"], &info[0]["metadata_bytes"]),
            (&"full".into(), &9.into())
        );
        // Checksums that were kept, and new ones; nothing is left where a page became zeros.
        run(dir, "verify base.mem");
        assert!(
            fs::read(dir.join("base.mem")).unwrap()[..RAM as usize]
                == fs::read(dir.join("ram")).unwrap()
        );
    }
    let old = if layout == "raw" {
        "raw:old.mem"
    } else {
        "old.mem"
    };
    let differ = Command::new(RAMSNAP)
        .args(["diff", old, "--ram", "ram"])
        .current_dir(dir)
        .status();
    assert_eq!(differ.unwrap().code(), Some(1));
}

/// The result is the same as that of a merge to another file, which shares nothing.
#[rstest]
fn a_sealed_image_is_what_a_merge_makes(
    #[values("commit", "merge --keep-zeros --in-place")] verb: &str,
) {
    needs!(Root, Mount(FileSystem::XFS));
    let disk = LoopMount::new(FileSystem::XFS).unwrap();
    let dir = disk.path();
    let ram = File::create_new(dir.join("ram")).unwrap();
    ram.set_len(RAM).unwrap();
    ram.write_all_at(&noise(1, 3 * MIB), MIB / 2).unwrap();
    run(dir, "dump ram -o base.mem --layout sealed");
    let mut files = "base.mem".to_owned();
    for number in 1..4 {
        ram.write_all_at(&noise(number + 5, 300 * PAGE), number * 777 * PAGE)
            .unwrap();
        ram.write_all_at(&[0; 64 << 10], (200 + number * 100) * PAGE)
            .unwrap();
        let diff = format!("diff {files} --ram ram -o d{number}.mem --keep-zeros");
        run(dir, &diff);
        files += &format!(" d{number}.mem");
    }
    run(dir, &format!("merge {files} -o merged.mem --keep-zeros"));
    run(dir, &format!("{verb} {files}"));
    assert!(fs::read(dir.join("base.mem")).unwrap() == fs::read(dir.join("merged.mem")).unwrap());
}

#[rstest]
#[case::skipped("", 216)]
#[case::stored(" --keep-zeros", 256)]
fn zeros_of_a_diff_are_not_stored(#[case] flags: &str, #[case] present: u64) {
    needs!(Root, Mount(FileSystem::XFS));
    let disk = LoopMount::new(FileSystem::XFS).unwrap();
    let dir = disk.path();
    let ram = File::create_new(dir.join("ram")).unwrap();
    ram.set_len(RAM).unwrap();
    ram.write_all_at(&noise(1, 256 * PAGE), 0).unwrap();
    run(dir, "dump ram -o base.mem --layout sealed");
    ram.write_all_at(&vec![0; 40 * PAGE as usize], 10 * PAGE)
        .unwrap();
    run(dir, "diff base.mem --ram ram -o d1.mem --keep-zeros");
    let merge = format!("merge --in-place base.mem d1.mem{flags}");
    run(dir, &merge);
    run(dir, "verify base.mem");
    run(dir, "diff base.mem --ram ram");
    let info = run(dir, "info base.mem --json").json();
    assert_eq!(info[0]["present"]["bytes"], present * PAGE);
}
