//! Start of lazily filled RAM: working sets and permissions.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io::{self, Write};
use std::sync::Arc;

use lazy_restore::{LazyError, LazyRam, UserfaultfdError, WorkingSet, WorkingSetError};
use nix::libc;
use support::lazy_images::on_demand;
use support::open_chain;
use support::regions::page_at;
use test_images::{Images, whole};
use test_machine::{Need, needs};

const PAGE: u64 = 4096;

const MIB: u64 = 1 << 20;

/// A base with holes, and two diffs: 16 MiB.
fn full_and_two_diffs() -> Images {
    Images::new(16 * MIB, PAGE)
        .with([0..1000, 1500..3000, 3500..4096])
        .with((0..400).map(|i| 10 * i..10 * i + 1))
        .with([900..1100, 2000..2003, 3200..3300])
}

fn page(ram: &LazyRam, offset: u64) -> io::Result<Vec<u8>> {
    page_at(ram.as_ptr().wrapping_add(offset as usize))
}

#[test]
fn working_set_pages_do_not_fault_again() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let chain = Arc::new(open_chain(&images));
    let touch = |ram: &LazyRam| {
        // Stored pages and zeros. Pages 7 and 8 are touched in sequence.
        for number in [3000, 7, 8, 1200, 905, 7, 4000, 20] {
            let start = (number * PAGE) as usize;
            assert!(page(ram, number * PAGE).unwrap() == images.ram[start..][..4096]);
        }
        ram.faults()
    };
    let ram = LazyRam::options()
        .record(true)
        // Recording disables prefetching.
        .fault_around(1 << 20)
        .start(Arc::clone(&chain))
        .unwrap();
    assert_eq!(touch(&ram), 7);
    let recorded = ram.recorded();
    let expected = [3000..3001, 7..9, 1200..1201, 905..906, 4000..4001, 20..21];
    let expected = expected.map(|pages| pages.start * PAGE..pages.end * PAGE);
    assert!(recorded.runs().eq(expected), "{recorded:?}");
    ram.wait().unwrap();
    assert_eq!(ram.recorded(), recorded, "untouched pages are not recorded");

    let file = images.dir().join("set");
    recorded.save(&file).unwrap();
    let ram = LazyRam::options()
        .working_set(WorkingSet::load(&file).unwrap())
        .start(Arc::clone(&chain))
        .unwrap();
    // Like a VMM that prefers a slightly later start to faults. Two of the pages are zeros, but not
    // the last.
    while ram.progress().done < 5 * PAGE {
        std::thread::yield_now();
    }
    assert_eq!(touch(&ram), 0);
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

/// The set may have been recorded on a machine with smaller pages.
#[test]
fn working_set_may_have_partial_pages() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let runs = [7, 20, 905, 1205, 3105, 4000].map(|page| [page * PAGE + 512, 1024]);
    let body = [&[16 * MIB], runs.as_flattened()].concat();
    let body: Vec<u8> = body.iter().flat_map(|word| word.to_le_bytes()).collect();
    let sum = crc32fast::hash(&body).to_le_bytes();
    let file = images.dir().join("set");
    std::fs::write(&file, [b"RAMSNAPW\x01\0\0\0", &sum[..], &body].concat()).unwrap();
    let ram = LazyRam::options()
        .working_set(WorkingSet::load(&file).unwrap())
        .start(open_chain(&images))
        .unwrap();
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

#[test]
fn working_set_of_another_ram_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = Images::new(2 * MIB, PAGE).with([0..1]);
    needs!(Userfaultfd);
    let recorded = LazyRam::options()
        .start(open_chain(&other))
        .unwrap()
        .recorded();
    let error = LazyRam::options()
        .working_set(recorded.clone())
        .start(open_chain(&full_and_two_diffs()))
        .unwrap_err();
    assert!(
        matches!(error, LazyError::WorkingSetSize { working_set, .. } if working_set == 2 * MIB),
        "{error:?}"
    );
    let unwritable = dir.path().join("none").join("set");
    assert!(matches!(
        recorded.save(unwritable).unwrap_err(),
        WorkingSetError::Stage(_)
    ));
}

/// Runs in a thread with its own credentials. The credentials of the process do not change.
fn in_thread<T: Send>(change: fn(), work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            change();
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn missing_userfaultfd_permission_error_names_the_remedies() {
    let test = "missing_userfaultfd_permission_error_names_the_remedies";
    if !Need::Root.met(test) || unprivileged() {
        return;
    }
    let chain = open_chain(&full_and_two_diffs());
    let as_another_user = || {
        // SAFETY: the call takes no address and changes only this thread, because no libc wrapper
        // applies it to the others.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
    };
    let error = in_thread(as_another_user, || on_demand().start(chain)).unwrap_err();
    let LazyError::Userfaultfd(why @ UserfaultfdError::NotPermitted(_)) = error else {
        panic!("{error:?}");
    };
    assert!(why.to_string().contains("/dev/userfaultfd"), "{why}");
}

#[test]
fn device_permission_suffices_without_privilege() {
    needs!(Root, Userfaultfd);
    let images = full_and_two_diffs();
    let no_capabilities = || {
        // capset(2): version 3, this thread; two sets of effective, permitted and inheritable
        // capabilities, all empty.
        let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
        // SAFETY: both have the layout of the kernel's structs and outlive the call, which changes
        // only this thread.
        let changed = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
        assert_eq!(changed, 0);
    };
    let ram = in_thread(no_capabilities, || on_demand().start(open_chain(&images))).unwrap();
    assert!(page(&ram, 0).unwrap() == images.ram[..4096]);
}

/// Returns whether every user may use userfaultfd here.
fn unprivileged() -> bool {
    let path = "/proc/sys/vm/unprivileged_userfaultfd";
    let open = std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    if open {
        let line = b"NOT RUN: on this machine every user may use userfaultfd\n";
        io::stderr().write_all(line).unwrap();
    }
    open
}
