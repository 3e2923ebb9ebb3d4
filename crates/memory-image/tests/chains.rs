//! Reads, merges and flattens chains of snapshots that the writer has taken.

mod support;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use atomic_file::{AtomicWriter, CommitError};
use memory_image::{Chain, ChainError, MappedImage, MergeError, ReadAmbiguity, ReadImageError};
use memory_writer::{CancelToken, MemoryWriter, SnapshotError};
use page_reader::PageReader;
use proptest::prelude::*;
use rstest::rstest;
use support::raw_guest::{Guest, PAGE, SIZE, whole};

#[test]
fn chain_reads_as_the_ram_at_its_last_snapshot() {
    let guest = Guest::with_history();
    let chain = guest.chain();
    assert!(whole(&chain) == guest.ram);
    assert_eq!(
        (chain.len(), chain.ram_size(), chain.page_size()),
        (4, SIZE, PAGE)
    );
    assert!(
        chain
            .paths()
            .eq(guest.snapshots.iter().map(PathBuf::as_path))
    );
}

/// Includes chains that end before the last snapshot.
#[test]
fn every_prefix_of_a_chain_reads_as_its_ram() {
    let mut guest = Guest::new();
    let mut history = Vec::new();
    for round in 0..5_u8 {
        guest.write(u64::from(round) * 3 * PAGE, 4 * PAGE, round + 1);
        guest.save();
        history.push(guest.ram.clone());
    }
    let mut chain = Chain::open_raw(&guest.snapshots[0], PAGE).unwrap();
    assert!(whole(&chain) == history[0]);
    for (diff, ram) in guest.snapshots[1..].iter().zip(&history[1..]) {
        chain.push_raw(diff).unwrap();
        assert!(whole(&chain) == *ram);
    }
}

#[rstest]
#[case(0, 1)]
#[case(PAGE - 1, 2)]
#[case(3 * PAGE + 99, 3 * PAGE)]
#[case(SIZE - 1, 1)]
#[case(SIZE, 0)]
fn chain_reads_any_range(#[case] offset: u64, #[case] len: u64) {
    let guest = Guest::with_history();
    let mut bytes = vec![0xee; len as usize];
    guest.chain().read_at(offset, &mut bytes).unwrap();
    assert_eq!(bytes, guest.ram[offset as usize..(offset + len) as usize]);
}

#[rstest]
#[case(SIZE, 1)]
#[case(SIZE - 1, 2)]
#[case(u64::MAX, 1)]
fn read_past_the_end_is_an_error(#[case] offset: u64, #[case] len: usize) {
    let error = Guest::with_history()
        .chain()
        .read_at(offset, &mut vec![0; len])
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn flattened_chain_is_one_full_image_and_keeps_holes() {
    let guest = Guest::with_history();
    let flat = guest.path("flat.mem");
    let (progress, reports) = std::sync::mpsc::channel();
    let options = MemoryWriter::options().progress(move |now| {
        progress.send(now).unwrap();
        std::ops::ControlFlow::Continue(())
    });
    guest.chain().merge(options, &flat).unwrap();
    assert!(std::fs::read(&flat).unwrap() == guest.ram);
    let last = reports.iter().last().unwrap();
    assert_eq!(last.done, last.total);
    // On XFS and btrfs, the blocks of the base are shared, and only the diffs are written.
    let base = std::fs::File::open(&guest.snapshots[0]).unwrap();
    let copy = std::fs::File::create_new(guest.path("copy")).unwrap();
    copy.set_len(SIZE).unwrap();
    match sparse_file::share_blocks(&base, &copy, SIZE) {
        Ok(()) => assert!((1..SIZE).contains(&last.done), "{last:?}"),
        Err(_) => assert_eq!(last.done, SIZE),
    }
    assert_eq!(
        std::fs::metadata(&flat).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(whole(&Chain::open_raw(&flat, PAGE).unwrap()) == guest.ram);
}

#[test]
fn pages_in_no_image_stay_holes_when_flattened() {
    let guest = Guest::new();
    let (base, flat) = (guest.path("base"), guest.path("flat"));
    std::fs::File::create(&base).unwrap().set_len(SIZE).unwrap();
    assert_eq!(
        Chain::open_raw(&base, PAGE)
            .unwrap()
            .flatten(&flat)
            .unwrap(),
        0
    );
    assert_eq!(std::fs::metadata(&flat).unwrap().len(), SIZE);
}

#[test]
fn chain_may_be_flattened_onto_its_own_base() {
    let guest = Guest::with_history();
    guest.chain().flatten(&guest.snapshots[0]).unwrap();
    assert!(std::fs::read(&guest.snapshots[0]).unwrap() == guest.ram);
}

/// Merges to `dest`, and calls `act` once the merge has begun to write.
fn merged_while(guest: &Guest, dest: &Path, mut act: impl FnMut() + Send + 'static) -> MergeError {
    let options = MemoryWriter::options().progress(move |_| {
        act();
        std::ops::ControlFlow::Continue(())
    });
    let before = std::fs::read_dir(guest.dir.path()).unwrap().count();
    let error = guest.chain().merge(options, dest).unwrap_err();
    let after = std::fs::read_dir(guest.dir.path()).unwrap().count();
    assert_eq!(after, before);
    error
}

#[test]
fn merge_onto_its_base_keeps_the_file_of_another_writer() {
    let guest = Guest::with_history();
    let base = guest.snapshots[0].clone();
    let link = guest.path("link");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    for dest in [&base, &link] {
        let base = base.clone();
        let error = merged_while(&guest, dest, move || {
            let writer = AtomicWriter::open(&base).unwrap();
            writer.file().set_len(SIZE).unwrap();
            writer.write_all_at(b"another writer's", 0).unwrap();
            writer.commit().unwrap();
        });
        let MergeError::Write(SnapshotError::Commit(why)) = &error else {
            panic!("{error:?}");
        };
        assert!(
            matches!(why, CommitError::DestinationChanged { .. }),
            "{why:?}"
        );
        let left = std::fs::read(&guest.snapshots[0]).unwrap();
        assert!(left.starts_with(b"another writer's"));
    }
}

/// It is unknown which of its bytes were read before the write.
#[rstest]
#[case::base(0)]
#[case::diff(1)]
fn image_written_during_a_merge_is_an_error(#[case] changed: usize) {
    let guest = Guest::with_history();
    let image = guest.snapshots[changed].clone();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let dest = guest.path("merged");
    let error = merged_while(&guest, &dest, move || {
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
        file.write_all_at(&[0x5a; 4096], 0).unwrap();
        // Simulates the next tick of the file system's clock.
        file.set_modified(later).unwrap();
    });
    assert!(
        matches!(&error, MergeError::Read(ReadImageError::Changed { path }) if *path == image),
        "{error:?}"
    );
    assert!(!dest.exists());
}

#[test]
fn cancelled_flatten_keeps_the_destination_and_no_other_file() {
    let guest = Guest::with_history();
    let flat = guest.path("flat.mem");
    std::fs::write(&flat, b"old").unwrap();
    let before = std::fs::read_dir(guest.dir.path()).unwrap().count();
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = guest
        .chain()
        .merge(MemoryWriter::options().cancel(cancel), &flat)
        .unwrap_err();
    let cancelled = SnapshotError::Cancelled {
        dest: flat.clone(),
        written: 0,
    };
    assert!(
        matches!(&error, MergeError::Write(why) if why.to_string() == cancelled.to_string()),
        "{error:?}"
    );
    assert_eq!(std::fs::read(&flat).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(guest.dir.path()).unwrap().count(), before);
}

/// Overwrites the file that a guest was restored from: a commit replaces it, and the mapping keeps
/// the old file.
#[test]
fn mapped_image_is_private_and_survives_the_next_snapshot() {
    let mut guest = Guest::new();
    guest.write(0, SIZE, 1);
    let path = guest.save();
    let mapped = MappedImage::open_raw(&path).unwrap();
    assert_eq!(mapped.ram_size(), SIZE);
    assert!(whole(&mapped) == guest.ram);

    // SAFETY: inside the mapping, which nothing else accesses at the time.
    #[allow(unsafe_code)]
    unsafe {
        mapped.as_ptr().add(4096).write(99);
    }
    assert!(
        std::fs::read(&path).unwrap() == guest.ram,
        "what the guest writes is its own"
    );
    let mut writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
    writer.write_full(&mapped).unwrap();
    writer.commit().unwrap();
    guest.ram[4096] = 99;
    assert!(std::fs::read(&path).unwrap() == guest.ram);
    assert!(whole(&mapped) == guest.ram);
    assert_eq!(mapped.host_memory(SIZE - 10, 100).unwrap().len(), 10);
    assert!(mapped.host_memory(SIZE, 1).is_none());
    assert!(mapped.read_at(SIZE - 1, &mut [0; 2]).is_err());
}

#[test]
fn populated_includes_the_range_past_the_end() {
    let chain = Guest::with_history().chain();
    let past = chain.populated(0..SIZE + PAGE).last();
    assert_eq!(past, Some(SIZE..SIZE + PAGE), "the read reports the error");
    assert!(chain.populated(0..SIZE).all(|range| !range.is_empty()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(12, 32)))]

    #[test]
    fn any_chain_reads_flattens_and_restores_to_the_ram(
        rounds in prop::collection::vec(prop::collection::vec((0..SIZE, 1..200_000u64, any::<u8>()), 0..4), 1..6),
    ) {
        let mut guest = Guest::new();
        for writes in rounds {
            for (at, len, value) in writes {
                guest.write(at, len.min(SIZE - at), value);
            }
            guest.save();
        }
        let mut chain = Chain::open_raw(&guest.snapshots[0], PAGE).unwrap();
        for diff in &guest.snapshots[1..] {
            match chain.push_raw(diff) {
                Ok(()) => {}
                // Every page was dirty.
                Err(ChainError::AmbiguousDiff { why: ReadAmbiguity::NoHoles, .. }) => chain.push_pages(diff, std::iter::once(0..SIZE)).unwrap(),
                Err(error) => panic!("{error:?}"),
            }
        }
        prop_assert!(whole(&chain) == guest.ram);
        chain.flatten(guest.path("flat")).unwrap();
        prop_assert!(std::fs::read(guest.path("flat")).unwrap() == guest.ram);
        let mut ram = vec![0; SIZE as usize];
        chain.restore_zeroed(ram.as_mut_slice()).unwrap();
        prop_assert!(ram == guest.ram);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn flattening_with_reflinks_allocates_only_the_diffs() {
    use dirty_bitmap::DirtyBitmap;
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::XFS));
    let mount = LoopMount::new(FileSystem::XFS).unwrap();
    let path = |name: &str| mount.path().join(name);
    let free = || {
        nix::unistd::sync();
        let space = nix::sys::statvfs::statvfs(mount.path()).unwrap();
        space.blocks_available() as u64 * space.fragment_size() as u64
    };
    let size = 32 << 20;
    let mut ram: Vec<u8> = (0..size).map(|at| (at / 512 % 251) as u8).collect();
    let mut writer = MemoryWriter::open(path("base"), size, PAGE).unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
    ram[5 * PAGE as usize..6 * PAGE as usize].fill(0);
    dirty.mark(5 * PAGE).unwrap();
    ram[size as usize - 1] = 7;
    dirty.mark(size - 1).unwrap();
    let mut writer = MemoryWriter::open(path("diff"), size, PAGE).unwrap();
    writer.write_diff(&ram, &dirty).unwrap();
    writer.commit().unwrap();

    let mut chain = Chain::open_raw(path("base"), PAGE).unwrap();
    chain.push_raw(path("diff")).unwrap();
    let before = free();
    chain.flatten(path("flat")).unwrap();
    // XFS may concurrently free blocks that it had preallocated for earlier files.
    let took = before.saturating_sub(free());
    assert!(took < 4 << 20, "took {took} bytes");
    assert!(std::fs::read(path("flat")).unwrap() == ram);

    // Zeros that a diff records take no space either.
    let options = MemoryWriter::options()
        .layout(memory_writer::Layout::Packed)
        .seal(memory_writer::Seal::new().on_raw_image());
    let mut writer = options.open(path("zeros"), size, PAGE).unwrap();
    writer
        .write_zeros(|| std::iter::once(8 << 20..24 << 20))
        .unwrap();
    writer.commit().unwrap();
    ram[8 << 20..24 << 20].fill(0);
    chain.push(path("zeros")).unwrap();
    let before = free();
    chain.flatten(path("flat")).unwrap();
    let took = before.saturating_sub(free());
    assert!(took < 4 << 20, "took {took} bytes");
    assert!(std::fs::read(path("flat")).unwrap() == ram);
}

/// Its pages are not at their offsets in the RAM.
#[cfg(target_os = "linux")]
#[test]
fn packed_base_is_flattened_without_reflinks() {
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::XFS));
    let mount = LoopMount::new(FileSystem::XFS).unwrap();
    let path = |name: &str| mount.path().join(name);
    let size = 1 << 20;
    let ram: Vec<u8> = (0..size).map(|at| (at / 512 % 251) as u8).collect();
    let options = MemoryWriter::options().layout(memory_writer::Layout::Packed);
    let mut writer = options.open(path("base"), size, PAGE).unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    let chain = Chain::open_sealed(&[path("base")]).unwrap();
    chain.flatten(path("flat")).unwrap();
    assert!(std::fs::read(path("flat")).unwrap() == ram);
}
