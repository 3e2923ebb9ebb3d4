//! RAM of guests, and golden files that are built field by field.

#![allow(dead_code, reason = "each test file uses its part")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use page_reader::{PageReader, RamLayout};
use vmm_files::{FilePlan, Format, GuestFile, OpenError, WriteOptions};

pub(crate) const PAGE: u64 = 4096;

/// Returns bytes that differ from page to page and are not zeros.
pub(crate) fn noise(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at / PAGE * 7 + at % 251) as u8 | 1)
        .collect()
}

/// Returns all bytes of the RAM in a file.
pub(crate) fn all(guest: &GuestFile) -> Vec<u8> {
    let mut bytes = vec![0xee; guest.layout().ram_size() as usize];
    guest.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Checks reads of every alignment, and that nothing outside the populated ranges is not zero.
pub(crate) fn assert_ram(guest: &GuestFile, expected: &[u8]) {
    assert!(all(guest) == expected, "the bytes differ");
    let size = expected.len() as u64;
    for (start, len) in [
        (0, 1),
        (1, 5000),
        (4095, 2),
        (size / 2 - 3, 9000),
        (size - 1, 1),
    ] {
        let end = size.min(start + len);
        let mut bytes = vec![0xee; (end - start) as usize];
        guest.read_at(start, &mut bytes).unwrap();
        assert!(
            bytes == expected[start as usize..end as usize],
            "at {start}"
        );
    }
    let mut last = 0;
    for range in guest.populated(0..size).chain([size..size]) {
        assert!(last <= range.start && range.end <= size, "{range:?}");
        let skipped = &expected[last as usize..range.start as usize];
        assert!(skipped.iter().all(|byte| *byte == 0), "before {range:?}");
        last = range.end;
    }
    guest.read_at(size, &mut [0]).unwrap_err();
    guest.read_at(u64::MAX, &mut [0; 2]).unwrap_err();
    guest.check_source().unwrap();
}

/// Writes the plan of a file of a RAM. Returns the bytes of RAM that were written.
pub(crate) fn write(path: &Path, plan: &FilePlan, ram: &[u8], skip_zeros: bool) -> u64 {
    let file = std::fs::File::create(path).unwrap();
    let (options, mut last) = (WriteOptions::new(), 0);
    let written = plan.write(&file, ram, &options, skip_zeros, &mut |progress| {
        assert!(last <= progress.done && progress.done <= progress.total);
        last = progress.done;
        ControlFlow::Continue(())
    });
    assert_eq!(file.metadata().unwrap().len(), plan.len());
    written.unwrap()
}

/// A temporary directory with one file.
pub(crate) struct Golden {
    dir: tempfile::TempDir,
    pub(crate) bytes: Vec<u8>,
}

impl Golden {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            bytes,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    pub(crate) fn open(&self, format: Format) -> Result<GuestFile, OpenError> {
        std::fs::write(self.path(), &self.bytes).unwrap();
        assert_eq!(Format::detect(&self.path()).unwrap(), Some(format));
        GuestFile::open(self.path(), format)
    }

    /// Asserts that the file is refused at an offset, with all of these words.
    #[track_caller]
    pub(crate) fn refused(&self, format: Format, at: u64, words: &str) {
        std::fs::write(self.path(), &self.bytes).unwrap();
        let error = GuestFile::open(self.path(), format).unwrap_err();
        let OpenError::Invalid { offset, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*offset, at, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
}

/// Two regions with a gap.
pub(crate) fn layout() -> RamLayout {
    RamLayout::new([(0, 64 * PAGE), (4 << 30, 192 * PAGE)]).unwrap()
}
