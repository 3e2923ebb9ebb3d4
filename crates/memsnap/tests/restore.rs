//! Restoring into RAM that exists.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::sys::memfd::{MFdFlags, memfd_create};
use support::{PAGE, RAM, Work};
use test_machine::{Need, TinyTmpfs};

/// RAM in a memfd of this process, and its path.
fn memfd(len: u64) -> (File, String) {
    let fd: OwnedFd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    (file, path)
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_guests_memfd_is_captured_and_another_one_restored_in_place() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    guest.write_all_at(&work.read("first"), 0).unwrap();
    work.good(&format!("full {path} -o full2.mem"));
    guest.write_all_at(&work.read("ram"), 0).unwrap();
    work.good(&format!("diff full2.mem {path} -o d.mem"));

    let (new, path) = memfd(RAM);
    work.good(&format!("restore full2.mem d.mem --verify -o {path}"));
    assert!(bytes(&new) == work.read("ram"));
    // What is zero takes no memory.
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
        1,
        &["must be equal"],
    );
    let mut ten = [0; 10];
    guest.read_exact_at(&mut ten, 0).unwrap();
    assert_eq!(ten, [7; 10]);
}

#[test]
fn a_restore_that_fails_in_the_middle_leaves_the_ram_empty() {
    if !Need::Root.met("a_restore_that_fails_in_the_middle_leaves_the_ram_empty") {
        return;
    }
    let work = Work::with_chain();
    // Room for half of what is present.
    let disk = TinyTmpfs::new(128 << 10).unwrap();
    let path = disk.path().join("ram");
    let guest = File::create_new(&path).unwrap();
    guest.set_len(RAM).unwrap();
    guest.write_all_at(&[7; 10], 0).unwrap();
    let restore = format!("restore full.mem --force -o {}", path.display());
    work.fails(&restore, 3, &["No space left", "was emptied"]);
    assert_eq!(guest.metadata().unwrap().blocks(), 0);
    assert_eq!(guest.metadata().unwrap().len(), RAM);
}
