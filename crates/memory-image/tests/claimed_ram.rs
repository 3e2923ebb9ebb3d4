//! A small file may claim any amount of RAM. Memory is allocated for stored pages only.

#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use image_format::{Footer, ImageId, ImageKind, Run, Version};
use memory_image::{Chain, CompareError, Image, MapError, MappedChain, MergeError, compare};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;

const PAGE: u64 = 4096;
const MOST: u64 = 64 << 20;

/// Writes a full image of zeros, in a file of 4 KiB and a footer.
fn image(dir: &Path, ram_size: u64) -> PathBuf {
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Full,
        layout: Layout::Packed,
        ram_size,
        page_size: PAGE,
        regions: vec![0..ram_size],
        runs: vec![Run::zeros(0..ram_size)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    let path = dir.join(format!("{ram_size:#x}.mem"));
    footer.write(&File::create(&path).unwrap()).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 8192);
    path
}

/// Returns the peak memory of the process since `reset`, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    1024 * kib.unwrap().parse::<u64>().unwrap()
}

fn reset() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Runs `work`, and asserts that it takes little memory.
fn little<T>(what: &str, ram_size: u64, work: impl FnOnce() -> T) -> T {
    reset();
    let before = peak();
    let result = work();
    // The kernel counts pages approximately: the peak may be below the earlier one.
    let taken = peak().saturating_sub(before);
    assert!(
        taken < MOST,
        "{what} of {ram_size:#x} bytes of RAM took {taken}"
    );
    result
}

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    let options = MemoryWriter::options();
    options
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}

/// Mapping this much may exceed the address space or the machine's settings.
fn is_mapped_or_refused(result: Result<(), MapError>) {
    match result {
        Ok(()) | Err(MapError::Reserve { .. } | MapError::Map { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
}

/// Held by each test, because nothing else of the process may take memory at the same time.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn claimed_ram_takes_no_memory() {
    let _alone = ALONE.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for ram_size in [40, 44, 46, 48, 52].map(|bits| 1 << bits) {
        let path = image(dir.path(), ram_size);
        let chain = little("opening", ram_size, || {
            Chain::open_sealed(&[&path]).unwrap()
        });
        assert_eq!(chain.ram_size(), ram_size);
        little("looking at", ram_size, || {
            assert_eq!(chain.stored_runs().count(), 0);
            let mut last = [1; 4096];
            chain.read_at(ram_size - 4096, &mut last).unwrap();
            assert_eq!(last, [0; 4096]);
        });
        let verified = little("verifying", ram_size, || {
            let image = Image::open(&path).unwrap();
            image.verify(&|_, _| ControlFlow::Continue(())).unwrap()
        });
        assert!(verified.is_ok());
        for zeros in [false, true] {
            little("merging", ram_size, || {
                let options = options(Layout::Packed, chain.seal()).skip_zeros(zeros);
                assert_eq!(chain.merge(options, &out).unwrap(), 0);
            });
            assert_eq!(Image::open(&out).unwrap().ram_size(), ram_size);
            fs::remove_file(&out).unwrap();
        }
        for layout in [Layout::Raw, Layout::Sealed] {
            let merged = little("merging in place", ram_size, || {
                chain.merge(options(layout, chain.seal()), &out)
            });
            match merged {
                Ok(bytes) => {
                    assert_eq!(bytes, 0);
                    fs::remove_file(&out).unwrap();
                }
                // This file system has no files of this size.
                Err(MergeError::Write(error)) => assert!(!out.exists(), "{error:?}"),
                Err(other) => panic!("{other:?}"),
            }
        }
        let compared = little("comparing", ram_size, || {
            compare(&chain, &chain, ram_size, PAGE, &|_| {
                ControlFlow::Continue(())
            })
        });
        match compared {
            Ok(changed) => assert_eq!(changed.dirty_bytes(), 0),
            Err(CompareError::TooManyPages { .. }) => assert!(ram_size > 1 << 45),
            // The machine has no address space for the bitmap.
            Err(CompareError::Geometry(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
        let coarse = little("comparing in large pages", ram_size, || {
            compare(&chain, &chain, ram_size, 1 << 30, &|_| {
                ControlFlow::Continue(())
            })
        });
        assert_eq!(coarse.unwrap().dirty_bytes(), 0);
        is_mapped_or_refused(little("mapping", ram_size, || {
            MappedChain::open(&chain).map(drop)
        }));
    }
}

#[test]
fn comparison_without_reads_can_be_cancelled() {
    let _alone = ALONE.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let chain = Chain::open_sealed(&[image(dir.path(), 1 << 40)]).unwrap();
    let error = compare(&chain, &chain, 1 << 40, PAGE, &|_| ControlFlow::Break(())).unwrap_err();
    assert!(
        matches!(error, CompareError::Cancelled { compared } if compared == 1 << 40),
        "{error:?}"
    );
}
