//! Images without a path: open files, and readers.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(target_os = "linux")]
use dirty_bitmap::DirtyBitmap;
use memory_image::{
    Chain, ChainError, Damage, Image, Layout, MapError, MappedChain, MappedImage, OpenImageError,
    ReadAmbiguity, ReadImageError, RestoreError,
};
use memory_writer::{MemoryWriter, PackedStream, Seal};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;

const PAGE: u64 = 4096;
const SIZE: u64 = (2 << 20) + 16 * PAGE;

fn ram(seed: u8) -> Vec<u8> {
    let byte = |at| (at / 512) as u8 ^ (at as u8).wrapping_mul(31) ^ seed;
    let mut ram: Vec<_> = (0..SIZE as usize).map(byte).collect();
    ram[40 * PAGE as usize..80 * PAGE as usize].fill(0);
    ram
}

/// Returns an unlinked file with an image of `ram`.
fn file(ram: &[u8], layout: Layout) -> File {
    let file = tempfile::tempfile().unwrap();
    let options = MemoryWriter::options().layout(layout).skip_zeros(true);
    let open = options.open_file(file.try_clone().unwrap(), SIZE, PAGE);
    let mut writer = open.unwrap();
    writer.write_full(ram).unwrap();
    writer.commit().unwrap();
    file
}

fn bytes_of(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn restored(chain: &Chain) -> Vec<u8> {
    let mut ram = vec![9; SIZE as usize];
    chain.restore(ram.as_mut_slice()).unwrap();
    ram
}

fn as_image(file: File, layout: Layout, in_a_file: bool) -> Image {
    let options = Image::options().layout(layout);
    if in_a_file {
        return options.open_file(file).unwrap();
    }
    let bytes = bytes_of(file);
    let len = bytes.len() as u64;
    options.open_reader(bytes, len).unwrap()
}

#[rstest]
fn image_without_a_path_is_read(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(false, true)] in_a_file: bool,
) {
    let ram = ram(1);
    let image = as_image(file(&ram, layout), layout, in_a_file);
    assert_eq!((image.ram_size(), image.layout()), (SIZE, layout));
    image.check_unchanged().unwrap();
    if layout.has_footer() {
        let report = image.verify(&mut |_| std::ops::ControlFlow::Continue(()));
        let report = report.unwrap();
        assert!(report.is_ok(), "{report}");
    }
    let chain = Chain::from_image(image, PAGE).unwrap();
    assert!(restored(&chain) == ram);
    let mut sparse = vec![0; SIZE as usize];
    chain.restore_zeroed(sparse.as_mut_slice()).unwrap();
    assert!(sparse == ram);
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged");
    chain.flatten(&merged).unwrap();
    assert!(fs::read(&merged).unwrap() == ram);
}

/// The base is at a path, one diff in memory, and one in an unlinked file.
#[test]
fn chain_mixes_paths_files_and_readers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let mut ram = ram(1);
    let options = MemoryWriter::options().layout(Layout::Sealed);
    let mut writer = options.open(&path, SIZE, PAGE).unwrap();
    let parent = writer.image_id().unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();

    ram[5 * PAGE as usize..7 * PAGE as usize].fill(2);
    let runs = || std::iter::once(5 * PAGE..7 * PAGE);
    let options = PackedStream::options().seal(Seal::new().parent(parent));
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    let parent = stream.image_id();
    stream.write_runs(&ram, runs).unwrap();
    let in_memory = stream.finish().unwrap();

    ram[6 * PAGE as usize..8 * PAGE as usize].fill(3);
    let runs = || std::iter::once(6 * PAGE..8 * PAGE);
    let unlinked = tempfile::tempfile().unwrap();
    let seal = Seal::new().parent(parent).metadata(b"newest".to_vec());
    let options = MemoryWriter::options().layout(Layout::Sealed).seal(seal);
    let open = options.open_file(unlinked.try_clone().unwrap(), SIZE, PAGE);
    let mut writer = open.unwrap();
    writer.write_runs(&ram, runs).unwrap();
    writer.commit().unwrap();

    let len = in_memory.len() as u64;
    let second = Arc::new(in_memory);
    let mut chain = Chain::open(&path, PAGE).unwrap();
    let image = Image::from_reader(Arc::clone(&second), len).unwrap();
    chain.push_image(image).unwrap();
    chain
        .push_image(Image::from_file(unlinked).unwrap())
        .unwrap();
    assert!(restored(&chain) == ram);
    assert_eq!(chain.metadata(), Some(&b"newest"[..]));
    let again = Image::from_reader(second, len).unwrap();
    let error = chain.push_image(again).unwrap_err();
    assert!(matches!(error, ChainError::Link { .. }), "{error:?}");
}

#[test]
fn raw_diff_without_a_name_takes_its_pages_from_the_caller() {
    let (base, new) = (ram(1), ram(2));
    let raw = Image::options().layout(Layout::Raw);
    let open = |bytes: &Vec<u8>| raw.open_reader(bytes.clone(), SIZE).unwrap();
    let mut chain = Chain::from_image(open(&base), PAGE).unwrap();

    let error = chain.push_image(open(&new)).unwrap_err();
    let is_reader = |why: &ReadAmbiguity| matches!(why, ReadAmbiguity::NoFile);
    assert!(
        matches!(&error, ChainError::AmbiguousDiff { why, .. } if is_reader(why)),
        "{error:?}"
    );
    assert!(error.to_string().contains("push_image_pages"), "{error}");

    chain
        .push_image_pages(open(&new), [PAGE + 1..2 * PAGE])
        .unwrap();
    let mut expected = base.clone();
    expected[PAGE as usize..2 * PAGE as usize].copy_from_slice(&new[PAGE as usize..][..4096]);
    assert!(restored(&chain) == expected);

    let sealed = Image::from_file(file(&new, Layout::Sealed)).unwrap();
    let error = chain.push_image_pages(sealed, [0..PAGE]).unwrap_err();
    assert!(matches!(error, ChainError::NotRawDiff { .. }), "{error:?}");
}

/// Returns an open file with a raw diff of page 3, and its path.
#[cfg(target_os = "linux")]
fn raw_diff(dir: &std::path::Path) -> (File, std::path::PathBuf) {
    let path = dir.join("diff");
    let mut writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    marks.mark_page(3).unwrap();
    writer.write_diff(&ram(2), &marks).unwrap();
    writer.commit().unwrap();
    (File::open(&path).unwrap(), path)
}

#[cfg(target_os = "linux")]
#[test]
fn raw_diff_in_an_open_file_needs_a_name_for_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (open, path) = raw_diff(dir.path());
    let raw = Image::options().layout(Layout::Raw);
    let image = || raw.open_file(open.try_clone().unwrap()).unwrap();
    let chain = || {
        let base = raw.open_reader(ram(1), SIZE).unwrap();
        Chain::from_image(base, PAGE).unwrap()
    };
    let mut by_holes = chain();
    by_holes.push_image(image()).unwrap();
    let mut expected = ram(1);
    expected[3 * 4096..][..4096].copy_from_slice(&ram(2)[3 * 4096..][..4096]);
    assert!(restored(&by_holes) == expected);

    // Another file with its name is not its directory.
    for replace in [false, true] {
        let _ = fs::remove_file(&path);
        if replace {
            fs::write(&path, b"other").unwrap();
        }
        let error = chain().push_image(image()).unwrap_err();
        assert!(
            matches!(
                error,
                ChainError::AmbiguousDiff {
                    why: ReadAmbiguity::NoDirectory,
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn unsuitable_files_and_readers_are_refused() {
    let (reader, mut pipe) = io::pipe().unwrap();
    pipe.write_all(b"bytes").unwrap();
    let refused = Image::from_file(File::from(OwnedFd::from(reader))).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::NotSeekable { .. }),
        "{refused:?}"
    );
    assert!(
        refused.to_string().contains("Image::from_reader"),
        "{refused}"
    );

    let named = tempfile::NamedTempFile::new().unwrap();
    let refused = Image::from_file(named.reopen().unwrap()).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::Empty { .. }),
        "{refused:?}"
    );
    fs::write(named.path(), ram(1)).unwrap();
    let raw = Image::options().layout(Layout::Raw);
    let write_only = File::options().write(true).open(named.path()).unwrap();
    let refused = raw.open_file(write_only).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::WriteOnly { .. }),
        "{refused:?}"
    );
    let directory = File::open(std::env::temp_dir()).unwrap();
    let refused = raw.open_file(directory).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::NotSeekable { .. }),
        "{refused:?}"
    );

    let refused = raw.open_reader(ram(1), SIZE - 1).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::NotRaw { .. }),
        "{refused:?}"
    );
    let refused = raw.open_reader(ram(1), SIZE + PAGE).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::Open { .. }),
        "{refused:?}"
    );
    let refused = raw.open_reader(Vec::new(), 0).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::Empty { .. }),
        "{refused:?}"
    );
    let refused = Image::from_reader(ram(1), SIZE).unwrap_err();
    assert!(
        matches!(refused, OpenImageError::Footer { .. }),
        "{refused:?}"
    );
}

#[test]
fn only_an_image_in_a_file_is_mapped() {
    let ram = ram(1);
    let mapped = MappedImage::from_image(Image::from_file(file(&ram, Layout::Sealed)).unwrap());
    let mut bytes = vec![0; SIZE as usize];
    mapped.unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes == ram);

    let reader = || as_image(file(&ram, Layout::Sealed), Layout::Sealed, false);
    let is_refused = |error: MapError| {
        assert!(
            matches!(error, MapError::Read(ReadImageError::NoFile { .. })),
            "{error:?}"
        );
        assert!(error.to_string().contains("Chain::restore"), "{error}");
    };
    is_refused(MappedImage::from_image(reader()).unwrap_err());
    let chain = Chain::from_image(reader(), PAGE).unwrap();
    is_refused(MappedChain::open(&chain).unwrap_err());
    is_refused(
        MappedChain::options()
            .max_mappings(1)
            .map(&chain)
            .unwrap_err(),
    );
    let error = reader().version().unwrap_err();
    assert!(matches!(error, ReadImageError::NoFile { .. }), "{error:?}");
}

/// RAM that may report that it has changed.
struct Changing(Vec<u8>, Arc<AtomicBool>);

impl PageReader for Changing {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn check_source(&self) -> io::Result<()> {
        match self.1.load(Ordering::Relaxed) {
            true => Err(io::Error::other("it was written to")),
            false => Ok(()),
        }
    }
}

#[test]
fn change_that_a_reader_reports_is_an_error_of_the_restore() {
    let changed = Arc::new(AtomicBool::new(false));
    let reader = Changing(ram(1), Arc::clone(&changed));
    let raw = Image::options().layout(Layout::Raw).name("live");
    let chain = Chain::from_image(raw.open_reader(reader, SIZE).unwrap(), PAGE).unwrap();
    restored(&chain);
    changed.store(true, Ordering::Relaxed);
    let error = chain
        .restore(vec![0; SIZE as usize].as_mut_slice())
        .unwrap_err();
    assert!(
        matches!(error, RestoreError::Read(ReadImageError::Source { .. })),
        "{error:?}"
    );
    assert!(error.to_string().contains("\"live\""), "{error}");
}

#[test]
fn merged_image_keeps_the_regions_of_the_chain() {
    let layout = RamLayout::new([(0, PAGE), (1 << 32, SIZE - PAGE)]).unwrap();
    let seal = Seal::new().ram_layout(&layout);
    let mut stream = PackedStream::options()
        .seal(seal)
        .open(Vec::new(), SIZE, PAGE)
        .unwrap();
    stream.write_full(&ram(1)).unwrap();
    let bytes = stream.finish().unwrap();
    let len = bytes.len() as u64;
    let image = Image::from_reader(bytes, len).unwrap();
    assert_eq!(image.ram_layout().as_ref(), Some(&layout));
    let chain = Chain::from_image(image, PAGE).unwrap();
    assert_eq!(chain.ram_layout(), Some(&layout));

    // The seal of the options names no regions.
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged");
    let options = MemoryWriter::options().layout(Layout::Sealed);
    chain.merge(options, &merged).unwrap();
    let merged = Image::open(&merged).unwrap();
    assert_eq!(merged.ram_layout().as_ref(), Some(&layout));

    // RAM that is mapped is of the same guest.
    let chain = Chain::from_image(merged, PAGE).unwrap();
    let mapped = MappedChain::open(&chain).unwrap();
    assert_eq!(PageReader::ram_layout(&mapped), Some(&layout));
    let merged = Image::open(dir.path().join("merged")).unwrap();
    let mapped = MappedImage::from_image(merged).unwrap();
    assert_eq!(PageReader::ram_layout(&mapped), Some(&layout));
}

/// Bytes of which one cannot be read.
struct Unreadable {
    bytes: Vec<u8>,
    at: u64,
    fails: Arc<AtomicBool>,
}

impl PageReader for Unreadable {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        if self.fails.load(Ordering::Relaxed) && (offset..end).contains(&self.at) {
            return Err(io::Error::other("a bad sector"));
        }
        self.bytes.as_slice().read_at(offset, buf)
    }
}

#[rstest]
#[case::in_a_page(Layout::Packed, 5 * PAGE, Some(0))]
#[case::in_a_later_chunk(Layout::Sealed, (1 << 20) + 77, Some(1))]
#[case::between_pages(Layout::Sealed, 50 * PAGE, None)]
fn a_part_that_cannot_be_read_is_damage_beside_others(
    #[case] layout: Layout,
    #[case] at: u64,
    #[case] chunk: Option<u64>,
) {
    let mut bytes = bytes_of(file(&ram(1), layout));
    // Damage in the last chunk, which is verified too.
    let start = Image::from_reader(bytes.clone(), bytes.len() as u64).unwrap();
    let last = start.footer().unwrap().runs.last().unwrap();
    let damaged = last.stored_at(last.range().end - 1).unwrap();
    bytes[damaged as usize] ^= 1;
    let (len, fails) = (bytes.len() as u64, Arc::new(AtomicBool::new(false)));
    let reader = Unreadable {
        bytes,
        at,
        fails: Arc::clone(&fails),
    };
    let image = Image::from_reader(reader, len).unwrap();
    fails.store(true, Ordering::Relaxed);
    let report = image.verify(&mut |_| std::ops::ControlFlow::Continue(()));
    let report = report.unwrap();
    assert_eq!(report.damage_count, 2, "{report:?}");
    let [
        Damage::Unreadable {
            chunk: found,
            offset,
            reason,
        },
        Damage::Chunk { number: 2, .. },
    ] = &report.damage[..]
    else {
        panic!("{report:?}");
    };
    assert_eq!(found.as_ref().map(|(number, _)| *number), chunk);
    assert!(*offset <= at && reason.contains("bad sector"), "{report:?}");
    assert!(report.damage[0].to_string().contains("cannot be read"));
}
