//! Images whose footers are made by hand, without `MemoryWriter`.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use image_format::{Checksums, Footer, ImageId, ImageKind, Layout, Run, Version, packed_start};

/// Writes a packed image of `ram_size` bytes with the bytes of these pages, without `MemoryWriter`,
/// whose staging takes ten times as long. An image without a parent is full, and its other pages
/// are zeros.
pub fn write_packed(
    path: &Path,
    ram_size: u64,
    page: u64,
    parent: Option<ImageId>,
    pages: &[(u64, Vec<u8>)],
) -> ImageId {
    let file = File::create(path).unwrap();
    let mut checksums = Checksums::new(ram_size);
    let (mut runs, mut end, mut offset) = (Vec::new(), 0, packed_start(page));
    let zeros = |runs: &mut Vec<Run>, range: Range<u64>| {
        if parent.is_none() && !range.is_empty() {
            runs.push(Run::zeros(range));
        }
    };
    for (number, bytes) in pages {
        let range = number * page..(number + 1) * page;
        file.write_all_at(bytes, offset).unwrap();
        checksums.update(range.start, bytes);
        zeros(&mut runs, end..range.start);
        end = range.end;
        runs.push(Run::present(range, offset));
        offset += page;
    }
    zeros(&mut runs, end..ram_size);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::random().unwrap(),
        kind: match parent {
            None => ImageKind::Full,
            parent => ImageKind::Diff { parent },
        },
        layout: Layout::Packed,
        ram_size,
        page_size: page,
        regions: vec![0..ram_size],
        runs,
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
    footer.id
}

/// Writes a packed image of version 1 with all of `ram`, in pages of 256 bytes. Its metadata are
/// three bytes.
pub fn write_version_1(path: &Path, kind: ImageKind, ram: &[u8]) {
    let len = ram.len() as u64;
    let mut checksums = Checksums::new(len);
    checksums.update(0, ram);
    let footer = Footer {
        version: Version::V1,
        id: ImageId::from_bytes([9; 16]),
        kind,
        layout: Layout::Packed,
        ram_size: len,
        page_size: 256,
        regions: vec![0..len],
        runs: vec![Run::present(0..len, 0)],
        checksums: checksums.finish(),
        metadata: vec![7; 3],
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    file.write_all_at(ram, 0).unwrap();
    footer.write(&file).unwrap();
}
