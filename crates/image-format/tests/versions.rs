//! Files that each version of the format wrote.

use std::fs::File;
use std::os::unix::fs::FileExt;

use image_format::{Checksums, Footer, ImageId, ImageKind, Version};
use rstest::rstest;

/// Files that each version wrote when it was current.
#[rstest]
fn files_of_all_versions_are_readable(
    #[values("sealed", "packed", "full")] what: &str,
    #[values(Version::V1, Version::V2)] version: Version,
) {
    let number = if version == Version::V1 { 1 } else { 2 };
    let name = format!("{what}-v{number}.mem");
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let file = File::open(path).unwrap();
    let footer = Footer::read(&file).unwrap();
    assert_eq!(footer.version, version);
    assert_eq!(footer.ram_size, 64 * 1024);
    assert_eq!(
        footer.metadata,
        format!("made by version {number}").into_bytes()
    );
    for chunk in footer.chunks() {
        let mut sums = Checksums::new(footer.ram_size);
        for (range, at) in chunk.pieces() {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, at).unwrap();
            // Every byte of a page is its number, from 1 on.
            assert!(
                bytes
                    .chunks(4096)
                    .zip(range.start / 4096 + 1..)
                    .all(|(page, number)| page.iter().all(|byte| u64::from(*byte) == number))
            );
            sums.update(range.start, &bytes);
        }
        assert_eq!(sums.finish(), [chunk.checksum]);
    }
    let (id, parent) = (ImageId::from_bytes([1; 16]), ImageId::from_bytes([2; 16]));
    if what == "full" {
        assert_eq!((footer.id, footer.kind), (parent, ImageKind::Full));
    } else {
        assert_eq!((footer.id, footer.parent()), (id, Some(parent)));
    }
}

#[rstest]
fn writing_reproduces_the_files_of_all_versions(
    #[values("sealed", "packed", "full")] what: &str,
    #[values(1, 2)] version: u32,
) {
    let path = format!(
        "{}/tests/golden/{what}-v{version}.mem",
        env!("CARGO_MANIFEST_DIR")
    );
    let bytes = std::fs::read(&path).unwrap();
    let footer = Footer::read(&File::open(&path).unwrap()).unwrap();
    let copy = tempfile::NamedTempFile::new().unwrap();
    let (start, end) = (footer.data_start() as usize, footer.data_end() as usize);
    copy.as_file()
        .write_all_at(&bytes[start..end], start as u64)
        .unwrap();
    footer.write(copy.as_file()).unwrap();
    assert!(std::fs::read(copy.path()).unwrap() == bytes);
}
