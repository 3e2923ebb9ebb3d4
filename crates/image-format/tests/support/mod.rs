//! Images in memory.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io;
use std::os::unix::fs::FileExt;

use image_format::{
    CHUNK_SIZE, Checksums, Footer, FooterError, ImageId, ImageKind, Layout, Placement, Run, Version,
};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const RAM: u64 = 2 * CHUNK_SIZE + 4 * PAGE;

/// Reads the footer of the image `bytes`.
pub(crate) fn read_as(bytes: &[u8], format: Option<Layout>) -> Result<Footer, FooterError> {
    Footer::read_from(bytes.len() as u64, format, |buf, at| {
        read_at(bytes, buf, at)
    })
}

/// Fills `buf` with the bytes of an image from `offset` on.
pub(crate) fn read_at(bytes: &[u8], buf: &mut [u8], offset: u64) -> io::Result<()> {
    let from = bytes.get(offset as usize..).unwrap_or_default();
    let from = from.get(..buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
    buf.copy_from_slice(from);
    Ok(())
}

/// Reads the footer of an image of unknown format.
pub(crate) fn read(bytes: &[u8]) -> Result<Footer, FooterError> {
    read_as(bytes, None)
}

/// Returns a diff of four runs, which overlap all chunks.
pub(crate) fn diff(layout: Layout) -> Footer {
    let present = [
        PAGE..3 * PAGE,
        CHUNK_SIZE - PAGE..CHUNK_SIZE + PAGE,
        2 * CHUNK_SIZE..RAM,
    ];
    let start = layout.data_start(PAGE);
    let mut next = start;
    let mut runs = vec![];
    let mut checksums = Checksums::new(RAM);
    for range in present {
        let at = match layout.placement() {
            Placement::ByOffset => start + range.start,
            Placement::Appended => next,
        };
        next += range.end - range.start;
        checksums.update(range.start, &vec![9; (range.end - range.start) as usize]);
        runs.push(Run::present(range, at));
    }
    runs.insert(1, Run::zeros(4 * PAGE..6 * PAGE));
    Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Diff {
            parent: Some(ImageId::from_bytes([2; 16])),
        },
        layout,
        ram_size: RAM,
        page_size: PAGE,
        regions: vec![0..CHUNK_SIZE, 1 << 32..(1 << 32) + RAM - CHUNK_SIZE],
        runs,
        checksums: checksums.finish(),
        metadata: b"state".to_vec(),
    }
}

/// Returns the bytes of a file that ends in `footer`, with pages of zeros.
pub(crate) fn sealed(footer: &Footer) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let len = footer.write(&file).expect("a valid footer");
    assert_eq!(file.metadata().unwrap().len(), len);
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
