//! Snapshots in files that the caller has opened.

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use image_format::Footer;
use memory_writer::{
    Durability, Layout, MemoryWriter, OpenFileError, Placement, Seal, SnapshotError,
};
use rstest::rstest;
use support::images::{PAGE, dirty, options};
use support::{Place, Until, pattern};

const SIZE: u64 = 2 << 20;

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[rstest]
fn open_file_gets_the_bytes_of_a_staged_one(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(Durability::None, Durability::Full)] durability: Durability,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let seal = Seal::new().id(memory_writer::ImageId::from_bytes([7; 16]));
    let options = options(layout, seal).durability(durability);
    let file = tempfile::tempfile().unwrap();
    for mut writer in [
        options.open(&place.dest, SIZE, PAGE).unwrap(),
        options
            .open_file(file.try_clone().unwrap(), SIZE, PAGE)
            .unwrap(),
    ] {
        writer.write_full(&ram).unwrap();
        // Written twice, so that its checksum is computed from the file.
        writer.write_diff(&ram, &dirty(SIZE, &[3])).unwrap();
        writer.commit().unwrap();
    }
    assert!(bytes_of(&file) == place.read());
}

#[cfg(target_os = "linux")]
#[test]
fn memfd_holds_a_sealed_diff() {
    let memfd = memfd();
    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[5]));
    let epoch = marks.begin_epoch().unwrap();
    let mut writer = options(Layout::Sealed, Seal::new().on_raw_image())
        .open_file(memfd.try_clone().unwrap(), SIZE, PAGE)
        .unwrap();
    writer.write_diff(&ram, epoch.bitmap()).unwrap();
    writer.commit_and_release(epoch).unwrap();
    assert_eq!(Footer::read(&memfd).unwrap().present_bytes(), PAGE);
    assert!(marks.is_clean());
}

/// Before the commit, a file without a footer is not an image.
#[rstest]
fn partial_file_is_not_an_image(#[values(Layout::Sealed, Layout::Packed)] layout: Layout) {
    let file = tempfile::tempfile().unwrap();
    let reader = Until {
        ram: pattern(SIZE as usize, 1),
        offset: SIZE / 2,
        then: || io::ErrorKind::PermissionDenied.into(),
    };
    let mut writer = options(layout, Seal::new())
        .open_file(file.try_clone().unwrap(), SIZE, PAGE)
        .unwrap();
    writer.write_full(&reader).unwrap_err();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
    Footer::read(&file).unwrap_err();
    if layout.placement() == Placement::ByOffset {
        assert_eq!(file.metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn unsuitable_file_is_refused_unchanged() {
    let place = Place::new();
    let open = |file: File| {
        let refused = MemoryWriter::options().open_file(file, SIZE, PAGE);
        match refused.map(drop).unwrap_err() {
            SnapshotError::OpenFile(why) => why,
            error => panic!("{error:?}"),
        }
    };
    let with = |read: bool, append: bool| {
        let file = File::options()
            .read(read)
            .append(append)
            .write(!append)
            .open(&place.dest);
        file.unwrap()
    };
    let why = open(File::open(&place.dest).unwrap());
    assert!(matches!(why, OpenFileError::NotReadWrite), "{why:?}");
    let why = open(with(false, false));
    assert!(matches!(why, OpenFileError::NotReadWrite), "{why:?}");
    let why = open(with(true, true));
    assert!(matches!(why, OpenFileError::Append), "{why:?}");
    let why = open(with(true, false));
    let expected = support::OLD.len() as u64;
    assert!(
        matches!(why, OpenFileError::NotEmpty { len } if len == expected),
        "{why:?}"
    );
    let why = open(File::open(place.path()).unwrap());
    assert!(matches!(why, OpenFileError::NotAFile), "{why:?}");
    let (_reader, pipe) = io::pipe().unwrap();
    let why = open(File::from(std::os::fd::OwnedFd::from(pipe)));
    assert!(matches!(why, OpenFileError::NotAFile), "{why:?}");
    assert!(why.to_string().contains("PackedStream"), "{why}");
    place.assert_untouched();
}

#[test]
fn open_file_is_not_finished_for_a_group() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = MemoryWriter::options().open_file(file, SIZE, PAGE).unwrap();
    writer.write_full(&pattern(SIZE as usize, 1)).unwrap();
    assert!(fs::symlink_metadata(writer.dest_path()).is_err(), "no path");
    let error = writer.finish().map(drop).unwrap_err();
    assert!(
        matches!(error, SnapshotError::NotStaged { .. }),
        "{error:?}"
    );
}

#[rstest]
fn open_file_has_one_writer_at_a_time(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let file = tempfile::tempfile().unwrap();
    let open = || options(layout, Seal::new()).open_file(file.try_clone().unwrap(), SIZE, PAGE);
    let first = open().unwrap();
    let error = open().unwrap_err();
    assert!(matches!(
        error,
        SnapshotError::OpenFile(OpenFileError::NotEmpty { .. })
    ));
    drop(first);
}

#[rstest]
fn truncation_of_an_open_file_is_found_at_the_commit(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let (file, ram) = (tempfile::tempfile().unwrap(), pattern(SIZE as usize, 1));
    let options = options(layout, Seal::new());
    let mut writer = options
        .open_file(file.try_clone().unwrap(), SIZE, PAGE)
        .unwrap();
    writer.write_full(&ram).unwrap();
    file.set_len(SIZE - PAGE).unwrap();
    let error = writer.commit().unwrap_err();
    assert!(matches!(
        error,
        SnapshotError::OpenFile(OpenFileError::Truncated { .. })
    ));
}

#[cfg(target_os = "linux")]
#[test]
fn open_file_with_direct_io_is_refused() {
    use std::os::unix::fs::OpenOptionsExt;

    let place = Place::new();
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    let mut open = fs::OpenOptions::new();
    open.read(true).write(true).create(true);
    let file = open.custom_flags(direct).open(&place.dest).unwrap();
    let error = options(Layout::Packed, Seal::new()).open_file(file, SIZE, PAGE);
    assert!(matches!(
        error.unwrap_err(),
        SnapshotError::OpenFile(OpenFileError::Direct)
    ));
}

/// `memory_image` derives the pages of a raw diff from holes only in a file with a name.
#[cfg(target_os = "linux")]
#[rstest]
#[case::memfd(memfd())]
#[case::unnamed(tempfile::tempfile().unwrap())]
#[case::unlinked(unlinked())]
fn raw_diff_in_a_file_without_a_name_is_refused(#[case] file: File) {
    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[5]));
    let open = |allow| {
        let options = MemoryWriter::options().allow_ambiguous_diff(allow);
        file.set_len(0).unwrap();
        options
            .open_file(file.try_clone().unwrap(), SIZE, PAGE)
            .unwrap()
    };
    let mut writer = open(false);
    let error = writer.write_diff(&ram, &marks).unwrap_err();
    assert!(
        matches!(
            &error,
            SnapshotError::AmbiguousDiff {
                source: memory_writer::WriteAmbiguity::NoName,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("Layout::Packed"), "{error}");
    assert!(bytes_of(&file).iter().all(|byte| *byte == 0));
    // Nothing was written. A full image needs no holes.
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    // The caller keeps the list of the pages.
    let mut writer = open(true);
    assert_eq!(writer.write_diff(&ram, &marks).unwrap(), 1);
    writer.commit().unwrap();
}

#[cfg(target_os = "linux")]
fn memfd() -> File {
    let memfd = nix::sys::memfd::memfd_create(c"diff", nix::sys::memfd::MFdFlags::empty());
    File::from(memfd.unwrap())
}

#[cfg(target_os = "linux")]
fn unlinked() -> File {
    tempfile::NamedTempFile::new().unwrap().into_file()
}
