//! A small file may claim any amount of RAM. Memory is allocated for stored pages only.

#![cfg(target_os = "linux")]

use std::fs;
use std::ops::ControlFlow;
use std::sync::Mutex;

use memory_image::{Chain, CompareError, Image, MapError, MappedChain, MergeError, compare};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;
use test_images::{image_of_zeros, with_little_memory};

const PAGE: u64 = 4096;

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
        let path = image_of_zeros(dir.path(), ram_size);
        let chain = with_little_memory("opening", ram_size, || {
            Chain::open_sealed(&[&path]).unwrap()
        });
        assert_eq!(chain.ram_size(), ram_size);
        with_little_memory("looking at", ram_size, || {
            assert_eq!(chain.stored_runs().count(), 0);
            let mut last = [1; 4096];
            chain.read_at(ram_size - 4096, &mut last).unwrap();
            assert_eq!(last, [0; 4096]);
        });
        let verified = with_little_memory("verifying", ram_size, || {
            let image = Image::open(&path).unwrap();
            image.verify(&mut |_| ControlFlow::Continue(())).unwrap()
        });
        assert!(verified.is_ok());
        for zeros in [false, true] {
            with_little_memory("merging", ram_size, || {
                let options = options(Layout::Packed, chain.seal()).skip_zeros(zeros);
                assert_eq!(chain.merge(options, &out).unwrap(), 0);
            });
            assert_eq!(Image::open(&out).unwrap().ram_size(), ram_size);
            fs::remove_file(&out).unwrap();
        }
        for layout in [Layout::Raw, Layout::Sealed] {
            let merged = with_little_memory("merging in place", ram_size, || {
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
        let compared = with_little_memory("comparing", ram_size, || {
            compare(&chain, &chain, ram_size, PAGE, &mut |_| {
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
        let coarse = with_little_memory("comparing in large pages", ram_size, || {
            compare(&chain, &chain, ram_size, 1 << 30, &mut |_| {
                ControlFlow::Continue(())
            })
        });
        assert_eq!(coarse.unwrap().dirty_bytes(), 0);
        is_mapped_or_refused(with_little_memory("mapping", ram_size, || {
            MappedChain::open(&chain).map(drop)
        }));
    }
}

#[test]
fn comparison_without_reads_can_be_cancelled() {
    let _alone = ALONE.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let chain = Chain::open_sealed(&[image_of_zeros(dir.path(), 1 << 40)]).unwrap();
    let error = compare(&chain, &chain, 1 << 40, PAGE, &mut |_| {
        ControlFlow::Break(())
    })
    .unwrap_err();
    assert!(
        matches!(error, CompareError::Cancelled { compared } if compared == 1 << 40),
        "{error:?}"
    );
}
