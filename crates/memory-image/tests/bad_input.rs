//! Files that are not images, and images that do not fit a chain.

mod support;

use std::fs;
use std::ops::Range;
use std::path::Path;

use memory_image::{
    Chain, ChainError, Image, MappedImage, OpenImageError, ReadImageError, RestoreError,
};
use rstest::rstest;
use support::raw_guest::{Guest, PAGE, SIZE, whole};

#[rstest]
#[case::smaller(SIZE / 2)]
#[case::larger(2 * SIZE)]
fn diff_of_another_ram_size_is_refused(#[case] size: u64) {
    let guest = Guest::with_history();
    let other = guest.path("other");
    std::fs::File::create(&other)
        .unwrap()
        .set_len(size)
        .unwrap();
    let mut chain = guest.chain();
    let error = chain.push_raw(&other).unwrap_err();
    assert!(
        matches!(&error, ChainError::SizeDiffers { path, base, .. } if (path, base) == (&other, &guest.snapshots[0])),
        "{error:?}"
    );
    assert!(matches!(
        chain.push_pages(&other, []).unwrap_err(),
        ChainError::SizeDiffers { .. }
    ));
    assert!(whole(&chain) == guest.ram, "the chain is unchanged");
}

fn opened(make: impl FnOnce(&Path)) -> ChainError {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    make(&path);
    let error = Chain::open_raw(&path, PAGE).unwrap_err();
    assert!(
        MappedImage::open_raw(&path).is_err() || matches!(error, ChainError::NotWholePages { .. })
    );
    error
}

#[test]
fn file_that_is_not_an_image_is_refused() {
    assert!(matches!(
        opened(|_| ()),
        ChainError::Open(OpenImageError::Open { .. })
    ));
    assert!(matches!(
        opened(|path| std::fs::create_dir(path).unwrap()),
        ChainError::Open(OpenImageError::NotAFile { .. })
    ));
    assert!(matches!(
        opened(|path| drop(std::fs::File::create(path).unwrap())),
        ChainError::Open(OpenImageError::Empty { .. })
    ));
    assert!(matches!(
        opened(|path| std::fs::write(path, [0; 4096 + 512]).unwrap()),
        ChainError::NotWholePages { .. }
    ));
    assert!(matches!(
        opened(|path| std::fs::write(path, [0; 4097]).unwrap()),
        ChainError::Open(OpenImageError::NotRaw { size: 4097, .. })
    ));
    let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(
        matches!(
            opened(fifo),
            ChainError::Open(OpenImageError::NotAFile { .. })
        ),
        "opening a FIFO does not block"
    );
    let error = Chain::open_raw("/", 0).unwrap_err();
    assert!(matches!(
        error,
        ChainError::PageSizeNotPowerOfTwo { page_size: 0 }
    ));
}

#[test]
fn error_names_the_image_truncated_after_open() {
    let guest = Guest::with_history();
    let chain = guest.chain();
    std::fs::File::options()
        .write(true)
        .open(&guest.snapshots[0])
        .unwrap()
        .set_len(PAGE)
        .unwrap();
    let error = chain.flatten(guest.path("flat")).unwrap_err();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    assert!(
        text.contains("0.mem") && text.contains("at offset"),
        "{text}"
    );
    let mut ram = vec![0; SIZE as usize];
    let error = chain.restore(ram.as_mut_slice()).unwrap_err();
    assert!(
        matches!(&error, RestoreError::Read(ReadImageError::Read { path, .. }) if *path == guest.snapshots[0]),
        "{error:?}"
    );
}

#[rstest]
#[case::backwards(Range { start: 2 * PAGE, end: PAGE })]
#[case::past_the_end(0..SIZE + PAGE)]
fn run_outside_the_image_is_refused(#[case] run: Range<u64>) {
    let mut guest = Guest::with_history();
    let mut chain = guest.chain();
    let next = guest.save();
    let error = chain.push_pages(&next, [0..PAGE, run.clone()]).unwrap_err();
    assert!(
        matches!(error, ChainError::BadRun { start, end, .. } if (start..end) == run),
        "{error:?}"
    );
    assert!(whole(&chain) == guest.ram);
}

#[test]
fn directory_is_found_beyond_absolute_paths() {
    if !test_machine::is_alone("directory_is_found_beyond_absolute_paths") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    std::env::set_current_dir(root.path()).unwrap();
    fs::write("ram", [7; 512]).unwrap();
    let image = Image::open_raw("ram").unwrap();
    let found = image.directory().unwrap();
    assert_eq!(found, root.path().canonicalize().unwrap());
    fs::remove_file("ram").unwrap();
    let error = image.directory().unwrap_err();
    assert!(matches!(error, OpenImageError::Open { .. }), "{error:?}");

    let level = "d".repeat(250);
    for _ in 0..20 {
        fs::create_dir(&level).unwrap();
        std::env::set_current_dir(&level).unwrap();
    }
    fs::write("ram", [7; 512]).unwrap();
    let image = Image::open_raw("ram").unwrap();
    assert_eq!(image.directory().unwrap(), Path::new("."));
    let image = Image::open_raw("./ram").unwrap();
    assert_eq!(image.directory().unwrap(), Path::new("."));

    // The file may be in another directory than the link.
    std::os::unix::fs::symlink("ram", "link").unwrap();
    let image = Image::open_raw("link").unwrap();
    let error = image.directory().unwrap_err();
    assert!(matches!(error, OpenImageError::Open { .. }), "{error:?}");
}
