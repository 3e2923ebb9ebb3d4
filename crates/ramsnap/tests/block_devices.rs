//! RAM in block devices.

#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use support::{PAGE, RAM, Work};
use test_machine::{FileSystem, LoopMount, needs};

/// A loop device, which is removed on drop.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Self {
        let mut losetup = Command::new("losetup");
        let output = losetup
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Links the device as `device` in the working directory.
fn link(work: &Work, device: &Loop) {
    symlink(&device.0, work.path("device")).unwrap();
}

#[test]
fn ram_is_saved_from_a_block_device() {
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::with_chain();
    let device = Loop::over(&work.path("ram"));
    let path = &device.0;
    work.good(&format!("dump {path} -o dumped.mem"));
    work.good("diff dumped.mem --ram ram");
    work.good(&format!("diff full.mem d1.mem --ram {path} -o d3.mem"));
    work.good("restore full.mem d1.mem d3.mem -o out");
    work.assert_same("out", "ram");
    // As a raw image, which is a full one.
    work.good(&format!("convert raw:{path} -o sealed.mem --layout sealed"));
    work.good("diff sealed.mem --ram ram");
    work.good(&format!("merge raw:{path} -o merged.raw"));
    work.assert_same("merged.raw", "ram");
    let info = work.good(&format!("info raw:{path} --json")).json();
    assert_eq!(
        (&info[0]["ram_bytes"], &info[0]["layout"]),
        (&RAM.into(), &"raw".into())
    );
    work.good(&format!("map raw:{path}"));
    let bytes = format!("cat raw:{path} --at {:#x} --len 4096 --bytes", 10 * PAGE);
    let printed = work.command(&bytes).output().unwrap().stdout;
    assert!(printed == work.read("ram")[10 * PAGE as usize..11 * PAGE as usize]);
}

/// Nothing of the old bytes is left, also where the RAM is zeros.
#[test]
fn ram_is_restored_to_a_block_device() {
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::with_chain();
    fs::write(work.path("disk"), vec![0xa5; RAM as usize]).unwrap();
    let device = Loop::over(&work.path("disk"));
    link(&work, &device);
    let restore = "restore full.mem d1.mem d2.mem -o device";
    work.run(restore).fails(2, &["not empty", "--force"]);
    work.good(&format!("{restore} --force"));
    work.good(&format!("diff full.mem d1.mem d2.mem --ram {}", device.0));
    drop(device);
    work.assert_same("disk", "ram");
}

#[test]
fn a_device_that_does_not_fit_or_is_in_use_is_left_alone() {
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::with_chain();
    work.create("disk", 2 * RAM);
    let device = Loop::over(&work.path("disk"));
    link(&work, &device);
    work.run("restore full.mem -o device")
        .fails(2, &["must be equal"]);
    drop(device);
    assert!(work.read("disk") == vec![0; 2 * RAM as usize]);
    // The disk of a mounted file system.
    let mount = LoopMount::new(FileSystem::EXT4).unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let path = mount.path().display().to_string();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(&path));
    let disk = line.unwrap().split(' ').next().unwrap();
    work.run(&format!("restore full.mem -o {disk} --force"))
        .fails(3, &[disk, "busy"]);
}

#[test]
fn a_restore_to_a_device_that_is_interrupted_leaves_zeros() {
    use nix::sys::signal::Signal;
    use support::held::Held;
    needs!(Root, Strace, Mount(FileSystem::EXT4));
    let work = Work::with_chain();
    work.create("disk", RAM);
    let device = Loop::over(&work.path("disk"));
    link(&work, &device);
    let command = work.command("restore full.mem -o device");
    let mut held = Held::before(&command, &("pwrite64".to_owned(), 3)).expect("held");
    held.signal(Signal::SIGINT);
    let (status, message) = held.release();
    assert_eq!(status.code(), Some(130), "{message}");
    assert!(message.contains("emptied"), "{message}");
    drop(device);
    assert!(work.read("disk") == vec![0; RAM as usize]);
}
