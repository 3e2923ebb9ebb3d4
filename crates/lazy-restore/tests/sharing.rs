//! Lazily filled memory: refused shared memory, forked children and previous content.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use lazy_restore::{LazyRam, LazyRamOptions, UserfaultfdError};
use memory_image::HostRam;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, madvise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rstest::rstest;
use support::lazy_images::{MIB, PAGE, bytes, images, on_demand, userfaultfd_error};
use support::open_chain;
use support::regions::{Regions, advise, flags};
use test_images::whole;
use test_machine::needs;

const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

fn memfd() -> OwnedFd {
    let file = memfd_create(c"ram", MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&file, 4 * MIB as i64).unwrap();
    file
}

fn on(path: &str) -> OwnedFd {
    let file = tempfile::tempfile_in(path).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.into()
}

#[rstest]
#[case::shared_memfd(memfd(), MapFlags::MAP_SHARED)]
#[case::private_memfd(memfd(), MapFlags::MAP_PRIVATE)]
#[case::shared_tmpfs(on("/dev/shm"), MapFlags::MAP_SHARED)]
#[case::private_disk_file(on(env!("CARGO_TARGET_TMPDIR")), MapFlags::MAP_PRIVATE)]
fn memory_of_a_file_is_refused(#[case] file: OwnedFd, #[case] kind: MapFlags) {
    needs!(Userfaultfd);
    let file = File::from(file);
    file.write_all_at(b"back end", 5 * PAGE).unwrap();
    let regions = Regions::of_file(&file, 4 * MIB, kind);
    let error = regions
        .adopt(on_demand(), open_chain(&images()))
        .unwrap_err();
    assert!(
        matches!(userfaultfd_error(error), UserfaultfdError::Shared { len, .. } if len == 4 * MIB)
    );
    // The memory is unchanged for all users.
    assert_eq!(&regions.page(5 * PAGE).unwrap()[..8], b"back end");
    assert_eq!(regions.page(0).unwrap(), ZEROS);
    let flags = flags(regions.address(0).addr());
    assert!(!flags.iter().any(|flag| flag == "um" || flag == "dc"));
}

#[test]
fn shared_anonymous_memory_is_refused() {
    needs!(Userfaultfd);
    // In the second region, and in a part of it.
    let regions = Regions::with(&[2 * MIB], MapFlags::MAP_PRIVATE);
    let shared = Regions::with(&[2 * MIB], MapFlags::MAP_SHARED);
    let both = [regions.0[0], shared.0[0]];
    // SAFETY: both stay mapped.
    let error = unsafe { on_demand().adopt(open_chain(&images()), both) }.unwrap_err();
    let start = shared.address(0).addr() as u64;
    assert!(
        matches!(userfaultfd_error(error), UserfaultfdError::Shared { start: at, .. } if at == start)
    );
    assert_eq!(regions.page(0).unwrap(), ZEROS);
}

#[test]
fn huge_pages_of_hugetlbfs_are_refused() {
    needs!(Userfaultfd);
    // Without a reservation, so that no huge page need be available.
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_NORESERVE;
    let regions = Regions::with(&[4 * MIB], flags);
    let error = regions
        .adopt(on_demand(), open_chain(&images()))
        .unwrap_err();
    assert!(matches!(
        userfaultfd_error(error),
        UserfaultfdError::HugePages { .. }
    ));
}

/// Like a vhost-user back end: another process with the memory, which reads all of it once it is
/// notified.
#[test]
fn shared_memory_back_end_never_reads_zeros() {
    needs!(Userfaultfd);
    let images = images();
    let file = memfd();
    let regions = Regions::of_file(&file, 4 * MIB, MapFlags::MAP_SHARED);
    let (mut go, mut notify) = std::io::pipe().unwrap();
    let (start, len) = regions.0[0];
    let child = child(|| {
        let _ = go.read(&mut [0]);
        // SAFETY: mapped, and no longer written since the parent has notified the child.
        let seen = unsafe { std::slice::from_raw_parts(start, len) };
        seen == images.ram
    });
    // With lazy filling the child would read zeros, so the memory is restored at once.
    regions.adopt(on_demand(), open_chain(&images)).unwrap_err();
    // SAFETY: mapped, and the child waits.
    let mut ram = unsafe { HostRam::new(regions.0.iter().copied()) };
    open_chain(&images).restore(&mut ram).unwrap();
    notify.write_all(b"!").unwrap();
    child.succeeds();
}

/// A forked child that acts without the parent's threads.
struct Child(nix::unistd::Pid);

fn child(act: impl FnOnce() -> bool) -> Child {
    // SAFETY: the child makes system calls and compares memory: it takes no lock.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Child(child),
        ForkResult::Child => {
            nix::unistd::alarm::set(120);
            let code = i32::from(!act());
            // SAFETY: ends the process, without the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
    }
}

impl Child {
    #[track_caller]
    fn succeeds(self) {
        let ended = waitpid(self.0, None).unwrap();
        assert_eq!(ended, WaitStatus::Exited(self.0, 0));
    }
}

/// Returns the errno of a system call that reads the first byte.
fn errno_of(pipe: i32, address: *const u8) -> i32 {
    // SAFETY: the kernel reads one byte, and reports an error if it cannot.
    match unsafe { libc::write(pipe, address.cast(), 1) } {
        -1 => nix::errno::Errno::last_raw(),
        _ => 0,
    }
}

#[rstest]
#[case::on_demand(on_demand())]
#[case::ahead(LazyRam::options())]
fn forked_child_never_reads_zeros(#[case] options: LazyRamOptions) {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[2 * MIB, 2 * MIB]);
    // The VMM has excluded a part itself.
    let (start, _) = regions.0[1];
    let own = NonNull::new(start).unwrap().cast();
    // SAFETY: mapped; the advice affects only children.
    unsafe { madvise(own, PAGE as usize, MmapAdvise::MADV_DONTFORK) }.unwrap();
    let ram = regions.adopt(options, open_chain(&images)).unwrap();
    let (_read, pipe) = std::io::pipe().unwrap();
    let pipe = pipe.as_raw_fd();
    let addresses = [0, 3 * PAGE, 2 * MIB + 100 * PAGE].map(|offset| regions.address(offset));
    let expected = [0, 3, 612].map(|page| bytes(&images, page)[0]);
    // The child inherits the memory only after filling has completed.
    child(|| {
        let mut answers = addresses.iter().zip(expected);
        answers.all(|(address, byte)| match errno_of(pipe, *address) {
            libc::EFAULT => true,
            // SAFETY: readable, because the kernel has just read it.
            0 => unsafe { address.read_volatile() == byte },
            _ => false,
        })
    })
    .succeeds();
    ram.wait().unwrap();
    child(|| {
        let mut answers = addresses.iter().zip(expected);
        // SAFETY: the child has the memory as the parent has it.
        answers.all(|(address, byte)| unsafe { address.read_volatile() } == byte)
    })
    .succeeds();
    let withheld = |address: *mut u8| flags(address.addr()).contains(&"dc".to_owned());
    assert!(withheld(start));
    assert!(!withheld(start.wrapping_add(PAGE as usize)) && !withheld(regions.address(0)));
    drop(ram);
}

fn write(start: *mut u8, _: usize) {
    // SAFETY: mapped, and owned by this test.
    unsafe { start.write(9) };
}

fn read(start: *mut u8, _: usize) {
    // SAFETY: as for `write`.
    assert_eq!(unsafe { start.read_volatile() }, 0);
}

fn lock(start: *mut u8, len: usize) {
    // SAFETY: the call populates every page, and changes no byte.
    assert_eq!(unsafe { libc::mlock(start.cast(), len) }, 0);
}

fn write_huge_pages(start: *mut u8, len: usize) {
    advise(start, len as u64, libc::MADV_HUGEPAGE).unwrap();
    // SAFETY: as for `write`.
    unsafe { std::ptr::write_bytes(start, 9, len) };
}

#[rstest]
#[case::written(write)]
#[case::read(read)]
#[case::locked(lock)]
#[case::of_huge_pages(write_huge_pages)]
fn previous_content_of_adopted_memory_is_discarded(#[case] hold: fn(*mut u8, usize)) {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[4 * MIB]);
    let (start, len) = regions.0[0];
    hold(start, len);
    let ram = regions
        .adopt(LazyRam::options(), open_chain(&images))
        .unwrap();
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}
