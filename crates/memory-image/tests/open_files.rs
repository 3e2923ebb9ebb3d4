//! Images in open files that have a path.

use std::fs::{self, File};

use memory_image::{Chain, ChainError, Image, Layout, ReadImageError};

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;

fn ram(seed: u8) -> Vec<u8> {
    (0..SIZE as usize)
        .map(|at| (at / 512) as u8 ^ seed)
        .collect()
}

#[test]
fn change_of_an_open_file_is_detected() {
    let named = tempfile::NamedTempFile::new().unwrap();
    fs::write(named.path(), ram(1)).unwrap();
    let raw = Image::options().layout(Layout::Raw);
    let image = raw.open_file(named.reopen().unwrap()).unwrap();
    image.check_unchanged().unwrap();
    named.as_file().set_len(SIZE + PAGE).unwrap();
    let error = image.check_unchanged().unwrap_err();
    assert!(matches!(error, ReadImageError::Changed { .. }), "{error:?}");
}

/// The same file by its path and as an open file is one image.
#[test]
fn open_file_is_recognized_as_an_image_of_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    fs::write(&path, ram(1)).unwrap();
    let mut chain = Chain::open_raw(&path, PAGE).unwrap();
    let raw = Image::options().layout(Layout::Raw);
    let same = raw.open_file(File::open(&path).unwrap()).unwrap();
    let error = chain.push_image_pages(same, [0..PAGE]).unwrap_err();
    assert!(matches!(error, ChainError::Link { .. }), "{error:?}");
}

/// A merge over an open file of the chain replaces only the version that was opened.
#[test]
fn merge_over_an_open_file_that_was_written_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    fs::write(&path, ram(1)).unwrap();
    let raw = Image::options().layout(Layout::Raw);
    let image = raw.open_file(File::open(&path).unwrap()).unwrap();
    let chain = Chain::from_image(image, PAGE).unwrap();
    chain.flatten(&path).unwrap();
    assert!(fs::read(&path).unwrap() == ram(1));

    let image = raw.open_file(File::open(&path).unwrap()).unwrap();
    let chain = Chain::from_image(image, PAGE).unwrap();
    fs::write(&path, b"newer").unwrap();
    chain.flatten(&path).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"newer");
}
