#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use memory_image::Chain;
use nix::errno::Errno;
use nix::libc;
use rstest::rstest;
use test_machine::{assert_handles_no_signals, needs};

use std::thread;

use super::*;
use crate::filling::PREFETCHER;
use crate::region::host_page;
use crate::userfaultfd::UserfaultfdError;

/// Starts RAM of one page that is stored in the image and one page that is not.
fn start(options: LazyRamOptions) -> (LazyRam, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; host_page() as usize]).unwrap();
    file.as_file().set_len(2 * host_page()).unwrap();
    let chain = Chain::open_raw(file.path(), host_page()).unwrap();
    (options.start(chain).unwrap(), file)
}

/// Reads a page by a system call.
fn read(ram: &LazyRam, page: u64) -> nix::Result<()> {
    let memory = page_reader::PageReader::host_memory(ram, page * host_page(), 1).unwrap();
    byte_at(memory.as_ptr())
}

fn byte_at(address: *const u8) -> nix::Result<()> {
    let (_read, write) = io::pipe().unwrap();
    // SAFETY: the kernel reads one byte, and reports an error if it cannot.
    let written = unsafe { libc::write(write.as_raw_fd(), address.cast(), 1) };
    Errno::result(written).map(drop)
}

#[test]
fn without_poison_an_unreadable_page_is_made_inaccessible() {
    needs!(Userfaultfd);
    let mut options = LazyRam::options().prefetch(false);
    options.poison = false;
    let (ram, file) = start(options);
    file.as_file().set_len(0).unwrap();
    assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
    assert_eq!(read(&ram, 1), Ok(()));
    assert!(matches!(*ram.wait().unwrap_err(), LazyError::Read(_)));
    assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
}

/// The test fills the page by the same descriptor, because no other can.
#[rstest]
#[case::touched(true)]
#[case::ahead(false)]
fn page_filled_by_something_else_is_an_error(#[case] touched: bool) {
    needs!(Userfaultfd);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; 4 * host_page() as usize]).unwrap();
    let chain = Chain::open_raw(file.path(), host_page()).unwrap();
    let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
    let page = host_page();
    assert_eq!(ram.pages.occupy(2 * page).stop, None);
    if touched {
        // The fault is about its neighbor.
        assert_eq!(read(&ram, 1), Ok(()));
    }
    let why = ram.wait().unwrap_err();
    assert!(
        matches!(*why, LazyError::Userfaultfd(UserfaultfdError::Occupied { offset }) if offset == 2 * page),
        "{why:?}"
    );
    assert_eq!(read(&ram, 2), Err(Errno::EFAULT));
    assert_eq!(read(&ram, 1), Ok(()));
}

#[rstest]
#[case::unmapped(0)]
#[case::mapped_still(libc::MREMAP_DONTUNMAP)]
fn without_poison_moved_memory_is_inaccessible(#[case] more_flags: libc::c_int) {
    needs!(Userfaultfd);
    let mut options = LazyRam::options().prefetch(false);
    options.poison = false;
    let (ram, _file) = start(options);
    let len = host_page() as usize;
    let elsewhere = Region::zeros(host_page()).unwrap();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more_flags;
    let to: *mut libc::c_void = elsewhere.as_ptr().cast();
    // SAFETY: nothing accesses either page during the call.
    let moved = unsafe { libc::mremap(ram.as_ptr().cast(), len, len, flags, to) };
    assert_eq!(moved, to);
    assert_eq!(byte_at(to.cast()), Err(Errno::EFAULT));
    if more_flags != 0 {
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
    }
    let why = ram.wait().unwrap_err();
    assert!(
        matches!(
            *why,
            LazyError::Userfaultfd(UserfaultfdError::Unmapped { offset: 0, .. })
        ),
        "{why:?}"
    );
}

#[test]
fn panic_of_a_thread_unblocks_waiters() {
    needs!(Userfaultfd);
    let (ram, _file) = start(LazyRam::options().prefetch(false));
    ram.filling
        .spawn("panics", || panic!("on purpose"))
        .unwrap();
    ram.filling
        .threads
        .lock()
        .unwrap()
        .pop()
        .unwrap()
        .join()
        .unwrap_err();
    assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
    let why = ram.wait().unwrap_err();
    assert!(
        matches!(*why, LazyError::Userfaultfd(UserfaultfdError::Thread(_))),
        "{why:?}"
    );
}

#[test]
fn stopped_prefetch_is_not_reported_as_complete() {
    needs!(Userfaultfd);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![1; 4 << 20]).unwrap();
    let chain = Chain::open_raw(file.path(), 4096).unwrap();
    let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
    ram.pages.status().stop_prefetch();
    ram.wait().unwrap();
    assert_eq!(ram.progress().done, 0);
    assert!(!ram.pages.status().is_finished());
}

/// The prefetcher waits for the lock that the test holds.
#[rstest]
#[case::in_the_background(true)]
#[case::in_wait(false)]
fn threads_that_fill_memory_block_signals(#[case] in_the_background: bool) {
    needs!(Userfaultfd);
    let (ram, _file) = start(LazyRam::options().prefetch(false));
    let pages = Arc::clone(&ram.pages);
    let held = pages.hold();
    if in_the_background {
        assert!(pages.status().begin_prefetch());
        let prefetcher = Arc::clone(&ram.filling.prefetcher);
        ram.filling
            .spawn(PREFETCHER, move || {
                _ = prefetcher.run(&mut || ControlFlow::Continue(()));
            })
            .unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(|| ram.wait().unwrap());
        for name in [PREFETCHER, "lazy-ram-faults"] {
            assert_handles_no_signals(name);
        }
        drop(held);
    });
}
