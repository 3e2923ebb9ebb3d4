//! RAM on a file system that reports written bytes as a hole is read, not skipped.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use memory_writer::MemoryWriter;
use misbehaving_fs::{Behavior, Lseek};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_reader::{FileReader, PageReader};
use rstest::rstest;
use support::{Mapping, PAGE, RAM, mount, sparse, with_lseek};
use test_machine::{Overlay, TinyTmpfs};

/// The offset of the written page.
const WRITTEN: u64 = 1 << 20;

fn expected() -> Vec<u8> {
    let mut ram = vec![0; RAM as usize];
    ram[WRITTEN as usize..(WRITTEN + PAGE) as usize].fill(0x5a);
    ram
}

fn is_populated(reader: &impl PageReader, offset: u64) -> bool {
    reader
        .populated(0..RAM)
        .any(|range| range.contains(&offset))
}

/// Returns a full image, written with everything skipped that may be skipped.
fn dump(reader: &(impl PageReader + ?Sized)) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("full.mem");
    let mut writer = MemoryWriter::options()
        .skip_untouched(true)
        .skip_zeros(true)
        .open(&dest, RAM, PAGE)
        .unwrap();
    writer.write_full(reader).unwrap();
    writer.commit().unwrap();
    std::fs::read(dest).unwrap()
}

/// The kernel does not write back a mapping before it sends the request to the server.
#[test]
fn ram_written_through_a_mapping_on_fuse_is_dumped() {
    let Some(fs) = mount(
        "ram_written_through_a_mapping_on_fuse_is_dumped",
        Behavior::default(),
    ) else {
        return;
    };
    let file = sparse(&fs.path().join("ram"));
    let mapping = Mapping::of(&file);
    mapping.write(WRITTEN, 0x5a);
    // The precondition of the test: the file system reports one hole.
    assert_eq!(lseek(&file, 0, Whence::SeekData), Err(Errno::ENXIO));

    assert!(is_populated(&FileReader::new(&file), WRITTEN));
    assert!(is_populated(&mapping.reader(), WRITTEN));
    assert!(dump(&FileReader::new(&file)) == expected());
    assert!(dump(&mapping.reader()) == expected());
}

#[test]
fn ram_in_the_writeback_cache_of_fuse_is_dumped() {
    let Some(fs) = mount(
        "ram_in_the_writeback_cache_of_fuse_is_dumped",
        Behavior {
            writeback_cache: true,
            ..Behavior::default()
        },
    ) else {
        return;
    };
    let file = sparse(&fs.path().join("ram"));
    file.write_all_at(&[0x5a; PAGE as usize], WRITTEN).unwrap();
    assert_eq!(lseek(&file, 0, Whence::SeekData), Err(Errno::ENXIO));
    assert!(dump(&FileReader::new(&file)) == expected());
}

#[rstest]
fn ram_is_dumped_with_any_reported_holes(
    #[values(Lseek::Exact, Lseek::AllHole, Lseek::HoleIsEnxio, Lseek::DataIsEnxio)]
    lseek_results: Lseek,
) {
    let Some(fs) = mount(
        "ram_is_dumped_with_any_reported_holes",
        with_lseek(lseek_results),
    ) else {
        return;
    };
    let file = sparse(&fs.path().join("ram"));
    file.write_all_at(&[0x5a; PAGE as usize], WRITTEN).unwrap();
    assert!(dump(&FileReader::new(&file)) == expected());
    assert!(dump(&Mapping::of(&file).reader()) == expected());
    // A part of the file, which is queried separately.
    let part = FileReader::range(&file, WRITTEN, RAM - WRITTEN);
    assert!(part.populated(0..PAGE).any(|range| range.contains(&0)));
}

/// The file systems whose reports are used, as far as this machine supports them.
#[rstest]
#[case::ext4(Some(test_machine::FileSystem::EXT4))]
#[case::xfs(Some(test_machine::FileSystem::XFS))]
#[case::btrfs(Some(test_machine::FileSystem::BTRFS))]
#[case::tmpfs(None)]
fn a_page_written_through_a_mapping_is_data_at_once(
    #[case] disk: Option<&'static test_machine::FileSystem>,
    #[values("hole", "unwritten extent", "reflinked data", "punched hole")] over: &str,
    #[values(false, true)] overlay: bool,
) {
    const TEST: &str = "a_page_written_through_a_mapping_is_data_at_once";
    let (dir, _mounts): (_, (Option<_>, Option<_>)) = match disk {
        Some(fs) if test_machine::Need::Mount(fs).met(TEST) => {
            let mount = test_machine::LoopMount::new(fs).unwrap();
            (mount.path().to_owned(), (Some(mount), None))
        }
        None if test_machine::Need::Root.met(TEST) => {
            let mount = test_machine::TinyTmpfs::new(64 << 20).unwrap();
            (mount.path().to_owned(), (None, Some(mount)))
        }
        _ => return,
    };
    let reports_holes = disk.is_some() || !overlay;
    let merged = overlay.then(|| Overlay::within(&dir).unwrap());
    let dir = merged
        .as_ref()
        .map_or(dir, |merged| merged.path().to_owned());
    let file = sparse(&dir.join("ram"));
    match over {
        "hole" => {}
        "unwritten extent" => sparse_file::reserve(&file, RAM).unwrap(),
        "reflinked data" => {
            let other = sparse(&dir.join("other"));
            other.write_all_at(&[1; PAGE as usize], WRITTEN).unwrap();
            if sparse_file::share_blocks(&other, &file, RAM).is_err() {
                file.write_all_at(&[1; PAGE as usize], WRITTEN).unwrap();
            }
        }
        _ => {
            file.write_all_at(&[1; 1 << 20], WRITTEN).unwrap();
            file.sync_all().unwrap();
            sparse_file::punch_hole(&file, 0..RAM).unwrap();
        }
    }
    let mapping = Mapping::of(&file);
    let read_first = RAM - PAGE;
    let mut byte = [1];
    mapping.reader().read_at(read_first, &mut byte).unwrap();
    mapping.write(WRITTEN, 0x5a);
    assert!(is_populated(&FileReader::new(&file), WRITTEN));
    assert!(is_populated(&mapping.reader(), WRITTEN));
    // The page of an unwritten extent that was read is in the page cache, and therefore data.
    assert!(
        over == "unwritten extent"
            || reports_holes != is_populated(&FileReader::new(&file), 2 * WRITTEN),
        "an untouched page is skipped where holes are reported"
    );
    assert!(dump(&FileReader::new(&file)) == expected());
    file.sync_all().unwrap();
    assert!(dump(&FileReader::new(&file)) == expected());
    // Written again after the writeback.
    mapping.write(WRITTEN, 0x5a);
    assert!(dump(&mapping.reader()) == expected());
}

/// The overlay passes on the reports of the FUSE server.
#[test]
fn ram_in_a_layer_on_fuse_is_dumped() {
    let Some(fs) = mount("ram_in_a_layer_on_fuse_is_dumped", Behavior::default()) else {
        return;
    };
    let file = sparse(&fs.path().join("ram"));
    // On tmpfs: an overlay has no overlay as its upper layer, should this run on one.
    let layers = TinyTmpfs::new(1 << 20).unwrap();
    let [upper, work] = ["upper", "work"].map(|name| layers.path().join(name));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    let overlay = Overlay::of(fs.path(), &upper, &work).unwrap();
    let mapping = Mapping::of(&file);
    mapping.write(WRITTEN, 0x5a);
    let seen = File::open(overlay.path().join("ram")).unwrap();
    // The server reports that the whole file is a hole, and overlayfs passes this on.
    assert_eq!(lseek(&seen, 0, Whence::SeekData), Err(Errno::ENXIO));
    sparse_file::check_holes_are_zeros(&seen).unwrap_err();
    assert!(is_populated(&FileReader::new(&seen), WRITTEN));
    assert!(dump(&FileReader::new(&seen)) == expected());
}

/// Skipping the part that a truncated file lost would commit zeros.
#[test]
fn ram_that_shrinks_while_it_is_listed_fails_the_dump() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(RAM).unwrap();
    file.write_all_at(&[1; PAGE as usize], 0).unwrap();
    let reader = Shrinking(FileReader::new(&file), &file);
    let dir = tempfile::tempdir().unwrap();
    let mut writer = MemoryWriter::options()
        .skip_untouched(true)
        .open(dir.path().join("full.mem"), RAM, PAGE)
        .unwrap();
    writer.write_full(&reader).unwrap_err();
}

/// A reader that truncates its file when it is queried for populated ranges.
struct Shrinking<'f>(FileReader<&'f File>, &'f File);

impl PageReader for Shrinking<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn populated(&self, range: std::ops::Range<u64>) -> page_reader::PopulatedRanges<'_> {
        let found = self.0.populated(range);
        self.1.set_len(RAM / 2).unwrap();
        found
    }
}
