//! Detection of the populated parts of files, memfds and composed sources.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::sync::Arc;

use host_memory::HostMemory;
use nix::sys::memfd::MFdFlags;
use page_reader::{FileReader, Layered, MappedMemory, PageReader, RamLayout};
use support::populated::{
    Flags, PAGE, PAGES, SIZE, SOME, count, guest, joined, memfd, populated, touch, untouched,
};
use test_machine::needs;
use test_memory::Mapping;

#[test]
fn memfd_pages_written_by_others_are_populated() {
    let memfd = memfd(MFdFlags::empty());
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    let mut touched = touch(&mapping, SOME);
    memfd.write_all_at(b"!", 1000 * PAGE).unwrap(); // like another process
    touched[1000] = true;
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
    assert_eq!(populated(&FileReader::new(&memfd), SIZE), touched);
}

/// Without access to `/proc/self/map_files`, the file is opened through a descriptor of the
/// process.
#[test]
fn an_unprivileged_process_finds_pages_of_its_open_memfd() {
    const INSIDE: &str = "PAGE_READER_TEST_UNPRIVILEGED";
    const NAME: &str = "an_unprivileged_process_finds_pages_of_its_open_memfd";
    if std::env::var_os(INSIDE).is_some() {
        let memfd = memfd(MFdFlags::empty());
        let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
        let touched = touch(&mapping, SOME);
        assert_eq!(populated(&guest(&mapping), SIZE), touched);
        drop(memfd);
        assert_eq!(count(&populated(&guest(&mapping), SIZE)), PAGES as usize);
        return;
    }
    needs!(Root);
    use std::os::unix::process::CommandExt;
    let program = test_memory::world_executable();
    let output = Command::new(program.path())
        .args(["--exact", NAME])
        .env(INSIDE, "1")
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{output:?}"
    );
}

/// A segment is listed on the device of memfds, with its id as inode number.
#[test]
fn a_system_v_segment_is_not_taken_for_a_memfd_with_its_number() {
    const INSIDE: &str = "PAGE_READER_TEST_SEGMENT";
    const NAME: &str = "a_system_v_segment_is_not_taken_for_a_memfd_with_its_number";
    if std::env::var_os(INSIDE).is_some() {
        // SAFETY: the thread gets its own System V segments.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWIPC) }, 0);
        let memfd = memfd(MFdFlags::empty());
        let number = memfd.metadata().unwrap().ino();
        std::fs::write("/proc/sys/kernel/shm_next_id", number.to_string()).unwrap();
        // SAFETY: maps a new segment where the kernel chooses. It stays mapped until this process
        // ends.
        let memory = unsafe {
            let id = libc::shmget(libc::IPC_PRIVATE, SIZE as usize, 0o666);
            assert_eq!(u64::try_from(id).unwrap(), number);
            let start = libc::shmat(id, std::ptr::null(), 0);
            assert_ne!(start.addr(), usize::MAX);
            assert_eq!(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()), 0);
            HostMemory::new(start.cast(), SIZE as usize)
        };
        // Without privileges, no file is opened through a mapping.
        // SAFETY: changes the user of this process, and lets it examine itself.
        unsafe {
            assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
            assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1), 0);
        }
        let layout = RamLayout::single(0, SIZE).unwrap();
        let ram = MappedMemory::new(layout, [memory]).unwrap();
        assert_eq!(count(&populated(&ram, SIZE)), PAGES as usize);
        drop(memfd);
        return;
    }
    needs!(Root);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{output:?}"
    );
}

#[test]
fn a_privately_mapped_file_may_be_populated_everywhere() {
    let memfd = memfd(MFdFlags::empty());
    memfd.write_all_at(b"!", 5 * PAGE).unwrap();
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, false);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), PAGES as usize);
}

/// The memfd has no page: neither queries nor reads allocate one.
#[test]
fn missing_huge_pages_of_a_memfd_are_not_populated() {
    let memfd = memfd(MFdFlags::MFD_HUGETLB);
    assert_eq!(count(&populated(&FileReader::new(&memfd), SIZE)), 0);
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), 0);
    assert_eq!(memfd.metadata().unwrap().blocks(), 0);
}

#[test]
fn a_huge_page_that_was_written_is_populated() {
    needs!(HugePages);
    let memfd = memfd(MFdFlags::MFD_HUGETLB);
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    let page = (SIZE / 2) as usize;
    mapping.write_at(page + (1 << 20), b"!");
    let mut expected = vec![false; PAGES as usize];
    expected[PAGES as usize / 2..][..512].fill(true);
    assert_eq!(populated(&FileReader::new(&memfd), SIZE), expected);
    assert_eq!(populated(&guest(&mapping), SIZE), expected);
}

#[test]
fn a_file_is_populated_where_it_has_data() {
    use std::io::{Seek, SeekFrom};
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[1; PAGE as usize], 512 * PAGE).unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    let pages = populated(&FileReader::new(&file), SIZE);
    assert!(pages[512] && count(&pages) <= 16);
    let half = populated(&FileReader::range(&file, 512 * PAGE, SIZE / 2), SIZE / 2);
    assert!(half[0] && count(&half) <= 16);
    assert_eq!(file.stream_position().unwrap(), 3);
}

/// ext4 reports pages of such files as a hole until they are written back.
#[test]
fn a_file_without_extents_may_be_populated_everywhere() {
    use test_machine::{FileSystem, LoopMount};
    needs!(Mount(FileSystem::EXT4_NO_EXTENTS));
    let disk = LoopMount::new(FileSystem::EXT4_NO_EXTENTS).unwrap();
    let file = tempfile::tempfile_in(disk.path()).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[1; PAGE as usize], 512 * PAGE).unwrap();
    let mapping = Mapping::of_file(file.as_fd(), SIZE as usize, true);
    for synced in [false, true] {
        if synced {
            file.sync_all().unwrap();
        }
        let pages = populated(&FileReader::new(&file), SIZE);
        assert_eq!(count(&pages), PAGES as usize, "{synced}");
        assert_eq!(count(&populated(&guest(&mapping), SIZE)), PAGES as usize);
    }
}

#[test]
fn a_range_past_the_end_of_a_file_is_reported() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let found: Vec<_> = FileReader::new(&file).populated(0..SIZE + 100).collect();
    assert_eq!(found, [SIZE..SIZE + 100]);
    for (start, size) in [
        (u64::MAX, u64::MAX),
        (i64::MAX as u64, u64::MAX),
        (0, u64::MAX),
    ] {
        let source = FileReader::range(&file, start, size);
        let found: Vec<_> = source.populated(u64::MAX - 5..u64::MAX).collect();
        assert_eq!(joined(found), [u64::MAX - 5..u64::MAX]);
    }
}

#[test]
fn layers_are_populated_where_the_topmost_is() {
    let base = tempfile::tempfile().unwrap();
    base.set_len(SIZE).unwrap();
    base.write_all_at(&vec![1; 64 * PAGE as usize], 0).unwrap();
    let base = FileReader::new(base);
    let (empty, written) = (untouched(Flags::Private), untouched(Flags::Private));
    touch(&written, [2]);
    let (empty, written) = (guest(&empty), guest(&written));
    let mut layered = Layered::<&dyn PageReader>::over(&base, SIZE).unwrap();
    layered.overlay(32 * PAGE, 32 * PAGE, &empty).unwrap();
    layered.overlay(1000 * PAGE, 4 * PAGE, &written).unwrap();
    let mut expected = vec![false; PAGES as usize];
    expected[..32].fill(true);
    expected[1002] = true;
    assert_eq!(populated(&layered, SIZE), expected);
}

#[test]
fn pointers_forward_populated() {
    // A source without host memory, whose own method must be called.
    let memfd = memfd(MFdFlags::empty());
    memfd.write_all_at(b"!", 7 * PAGE).unwrap();
    let source = FileReader::new(&memfd);
    let pointers: [Box<dyn PageReader + '_>; 3] = [
        Box::new(&source),
        Box::new(Box::new(source.clone())),
        Box::new(Arc::new(source.clone())),
    ];
    for pointer in pointers {
        assert_eq!(count(&populated(&pointer, SIZE)), 1);
    }
}
