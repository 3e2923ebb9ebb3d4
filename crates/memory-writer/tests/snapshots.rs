//! Contents of the file after a full dump, a diff, and sequences of both.

mod support;

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, MemoryWriter, SnapshotError};
use page_reader::{HostMemory, PageReader};
use rstest::rstest;
use support::{Place, Until, pattern};
use write_faults::Memory;

const SIZE: u64 = 4 << 20;
const PAGE: u64 = 16384;
const START: u64 = 0x8000_0000;

fn ram(seed: u8) -> Vec<u8> {
    pattern(SIZE as usize, seed)
}

fn bitmap(page_size: u64) -> DirtyBitmap {
    DirtyBitmap::new(START, SIZE, page_size).unwrap()
}

/// Returns `base` with the pages of the file that `runs` touch replaced by those of `ram`.
fn merged(base: &[u8], ram: &[u8], runs: impl Iterator<Item = std::ops::Range<u64>>) -> Vec<u8> {
    let mut merged = base.to_vec();
    for run in runs {
        let pages = (run.start / PAGE * PAGE) as usize..(run.end.div_ceil(PAGE) * PAGE) as usize;
        merged[pages.clone()].copy_from_slice(&ram[pages]);
    }
    merged
}

#[test]
fn full_snapshot_equals_the_ram() {
    let (place, ram) = (Place::new(), ram(1));
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!((writer.ram_size(), writer.page_size()), (SIZE, PAGE));
    writer.write_full(&ram).unwrap();
    assert_eq!(
        std::fs::read(&place.dest).unwrap(),
        support::OLD,
        "until it commits"
    );
    writer.commit().unwrap();
    assert!(place.read() == ram);
    place.assert_nothing_else();
}

#[test]
fn full_snapshot_writes_zeros() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&vec![0; SIZE as usize]).unwrap();
    writer.commit().unwrap();
    assert!(std::fs::metadata(&place.dest).unwrap().blocks() * 512 >= SIZE);
}

#[test]
fn full_twice_does_not_double_the_file() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&ram(1)).unwrap();
    writer.write_full(&ram(2)).unwrap();
    writer.commit().unwrap();
    assert!(place.read() == ram(2));
}

#[test]
fn diff_then_full_is_at_the_right_offsets() {
    let (place, dirty) = (Place::new(), bitmap(4096));
    dirty.mark(START + SIZE / 2).unwrap();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!(writer.write_diff(&ram(1), &dirty).unwrap(), 1);
    writer.write_full(&ram(2)).unwrap();
    writer.commit().unwrap();
    assert!(place.read() == ram(2));
}

/// A full write while the guest runs, the diff of what it dirtied during the write, and a commit.
#[test]
fn pre_copy_snapshot_equals_the_ram_at_the_pause() {
    let (place, mut ram, dirty) = (Place::new(), ram(1), bitmap(4096));
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&ram).unwrap();
    for round in 0..3 {
        for page in [3, 400 + round, 1023] {
            ram[page * 4096 + 17] ^= 0xff;
            dirty.mark(START + page as u64 * 4096).unwrap();
        }
        let dirtied = epoch.extend().unwrap();
        assert_eq!(writer.write_diff(&ram, &dirtied).unwrap(), 3);
    }
    writer.commit_and_release(epoch).unwrap();
    assert!(place.read() == ram);
    assert!(dirty.is_clean());
}

#[test]
fn only_a_successful_commit_releases_marks() {
    let (place, ram, dirty) = (Place::new(), ram(1), bitmap(PAGE));
    let save = || {
        let epoch = dirty.begin_epoch().unwrap();
        let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
        writer.write_diff(&ram, epoch.bitmap()).unwrap();
        (writer, epoch)
    };
    dirty.mark_page(7).unwrap();
    let (writer, epoch) = save();
    std::fs::remove_file(&place.dest).unwrap();
    std::fs::create_dir(&place.dest).unwrap();
    let error = writer.commit_and_release(epoch).unwrap_err();
    assert!(matches!(error, SnapshotError::Commit(_)), "{error}");
    assert_eq!(dirty.dirty_bytes(), PAGE, "the mark is back");
    std::fs::remove_dir(&place.dest).unwrap();

    let (writer, epoch) = save();
    assert!(dirty.reclaim_epoch().unwrap());
    let error = writer.commit_and_release(epoch).unwrap_err();
    let reclaimed = matches!(error, SnapshotError::EpochReclaimed { .. });
    assert!(reclaimed, "{error}");
    assert!(!place.dest.exists(), "it is not committed");
    assert_eq!(dirty.dirty_bytes(), PAGE, "it was never released");

    let (writer, epoch) = save();
    writer.commit_and_release(epoch).unwrap();
    assert!(dirty.is_clean());
}

#[test]
fn diff_has_the_size_of_the_ram_and_the_dirty_pages() {
    let (place, ram, dirty) = (Place::new(), ram(1), bitmap(PAGE));
    for index in [0, 7, 8] {
        dirty.mark_page(index).unwrap();
    }
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!(writer.write_diff(&ram, &dirty).unwrap(), 3);
    writer.commit().unwrap();
    assert!(place.read() == merged(&vec![0; SIZE as usize], &ram, dirty.runs()));
    let file = std::fs::File::open(&place.dest).unwrap();
    let extents = sparse_file::extents(&file).unwrap().map(Result::unwrap);
    let data: Vec<_> = extents
        .filter(|extent| extent.kind == sparse_file::ExtentKind::Data)
        .map(|extent| extent.range)
        .collect();
    assert_eq!(data, [0..PAGE, 7 * PAGE..9 * PAGE]);
}

#[rstest]
fn finer_and_coarser_bitmaps_are_accepted(
    #[values(512, 4096, 16384, 65536, 1 << 21)] granule: u64,
) {
    let (place, ram, dirty) = (Place::new(), ram(1), bitmap(granule));
    for address in [0, 3 * PAGE + 4095, 3 * PAGE + 5000, SIZE / 2, SIZE - 1] {
        dirty.mark(START + address).unwrap();
    }
    let mut writer = MemoryWriter::options()
        .allow_ambiguous_diff(true) // of every page, in the end
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    let pages = writer.write_diff(&ram, &dirty).unwrap();
    writer.commit().unwrap();
    let expected = if granule <= PAGE {
        4
    } else {
        dirty.dirty_bytes() / PAGE
    };
    assert_eq!(pages, expected, "counted in pages of the file, each once");
    assert!(place.read() == merged(&vec![0; SIZE as usize], &ram, dirty.runs()));
}

#[rstest]
fn rebuilt_bitmap_yields_the_same_or_a_larger_diff(#[values(512, 65536)] granule: u64) {
    let (place, ram, dirty) = (Place::new(), ram(1), bitmap(PAGE));
    dirty.mark(START + 5 * PAGE).unwrap();
    dirty.rebuild(granule).unwrap();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!(
        writer.write_diff(&ram, &dirty).unwrap(),
        granule.max(PAGE) / PAGE
    );
    writer.commit().unwrap();
    assert!(place.read() == merged(&vec![0; SIZE as usize], &ram, dirty.runs()));
}

#[test]
fn diff_of_a_clean_guest_is_one_hole() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!(writer.write_diff(&ram(1), &bitmap(4096)).unwrap(), 0);
    writer.commit().unwrap();
    assert!(place.read() == vec![0; SIZE as usize]);
}

#[test]
fn reader_without_host_memory_yields_the_same_bytes() {
    let (place, dirty) = (Place::new(), bitmap(4096));
    dirty.mark_range(START + 1000, 2 << 20).unwrap();
    let reader = Until {
        ram: ram(3),
        offset: SIZE,
        then: || unreachable!("nothing is read past the end"),
    };
    let mut writer = MemoryWriter::options()
        .chunk_size(4096)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    writer.write_full(&reader).unwrap();
    writer.write_diff(&reader, &dirty).unwrap();
    writer.commit().unwrap();
    assert!(place.read() == ram(3));
}

#[test]
fn aligned_host_memory_is_written_without_a_copy() {
    struct Mapped(Memory);
    impl PageReader for Mapped {
        fn read_at(&self, offset: u64, _: &mut [u8]) -> io::Result<()> {
            panic!("{offset} is read");
        }
        fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
            self.0.host_memory(offset, len)
        }
    }
    let place = Place::new();
    let mapped = Mapped(Memory::new(SIZE).unwrap());
    mapped.0.write(0, &ram(3));
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&mapped).unwrap();
    writer.commit().unwrap();
    assert!(place.read() == ram(3));
}

#[test]
fn default_mode_grants_access_to_the_owner_only() {
    let (place, ram) = (Place::new(), ram(1));
    for (options, mode) in [
        (MemoryWriter::options(), 0o600),
        (MemoryWriter::options().mode(0o640), 0o640),
    ] {
        let mut writer = options
            .durability(Durability::None)
            .open(&place.dest, SIZE, PAGE)
            .unwrap();
        let staged = std::fs::metadata(writer.staged_path())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(staged & 0o077 & !mode, 0, "not even while it is staged");
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        assert_eq!(
            std::fs::metadata(&place.dest).unwrap().permissions().mode() & 0o7777,
            mode
        );
    }
}

#[test]
fn no_clobber_and_a_staging_directory_are_passed_on() {
    let place = Place::new();
    let error = MemoryWriter::options()
        .no_clobber(true)
        .open(&place.dest, SIZE, PAGE)
        .unwrap_err();
    assert!(matches!(error, SnapshotError::Open(_)), "{error}");
    place.assert_untouched();

    let staging = place.path().join("staging");
    std::fs::create_dir(&staging).unwrap();
    let writer = MemoryWriter::options()
        .staging_dir(&staging)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    assert_eq!(writer.staged_path().parent().unwrap(), staging);
}

#[test]
fn memory_and_vcpu_state_are_committed_together() {
    use std::io::Write as _;

    let place = Place::new();
    let state = place.path().join("guest.vcpu");
    let mut memory = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    memory.write_full(&ram(1)).unwrap();
    let mut vcpu = atomic_file::AtomicWriter::open(&state).unwrap();
    vcpu.write_all(b"rip=0x1000").unwrap();
    let mut group = atomic_file::AtomicGroup::new();
    group.add(memory.finish().unwrap()).unwrap();
    group.add(vcpu).unwrap();
    group.commit().unwrap();
    assert!(place.read() == ram(1));
    assert_eq!(std::fs::read(&state).unwrap(), b"rip=0x1000");
    support::assert_nothing_but(place.path(), &["guest.mem", "guest.vcpu"]);
}

#[test]
fn concurrent_writers_commit_and_the_last_one_wins() {
    let place = Place::new();
    let mut first = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let mut second = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    first.write_full(&ram(1)).unwrap();
    second.write_full(&ram(2)).unwrap();
    second.commit().unwrap();
    assert!(place.read() == ram(2));
    first.commit().unwrap();
    assert!(place.read() == ram(1));
    place.assert_nothing_else();
}

#[cfg(target_os = "linux")]
mod sharing {
    use std::fs::File;

    use memory_writer::Layout;
    use test_machine::{FileSystem, LoopMount, needs};

    use super::*;

    /// Btrfs shares blocks. The others report that they cannot, and can still be written to.
    #[rstest]
    #[case::shared(FileSystem::BTRFS, true)]
    #[case::unsupported(FileSystem::EXT4, false)]
    fn full_snapshot_can_share_the_blocks_of_an_image(
        #[case] fs: &'static FileSystem,
        #[case] shared: bool,
    ) {
        needs!(Mount(fs));
        let mount = LoopMount::new(fs).unwrap();
        let place = Place::on(mount.path());
        let (base, mut after) = (ram(1), ram(1));
        std::fs::write(&place.dest, &base).unwrap();
        after[7 * PAGE as usize] ^= 1;
        let dirty = bitmap(PAGE);
        dirty.mark(START + 7 * PAGE).unwrap();

        let image = File::open(&place.dest).unwrap();
        let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
        assert_eq!(writer.reflink_full(&image).unwrap(), shared);
        if !shared {
            writer.write_full(&base).unwrap();
        }
        writer.write_diff(&after, &dirty).unwrap();
        writer.commit().unwrap();
        assert!(place.read() == after);
        let sealed = MemoryWriter::options().layout(Layout::Sealed);
        let mut writer = sealed.open(&place.dest, SIZE, PAGE).unwrap();
        assert!(
            !writer.reflink_full(&image).unwrap(),
            "it has a footer to fill in"
        );
    }
}
