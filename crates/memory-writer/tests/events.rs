//! Events of the feature `tracing`.
#![cfg(all(feature = "tracing", target_os = "linux"))]

use std::fs::File;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Layout, MemoryWriter, SnapshotError};
use test_events::captured;

const SIZE: u64 = 4 << 20;

fn ram() -> Vec<u8> {
    b"S3cr3t!!".repeat(SIZE as usize / 8)
}

#[test]
fn a_dump_reports_its_engine_and_no_guest_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("full.mem");
    for layout in Layout::ALL {
        let options = MemoryWriter::options().layout(layout);
        let events = captured(|| {
            let mut writer = options.open(&dest, SIZE, 4096).unwrap();
            writer.write_full(&ram()).unwrap();
            writer.commit().unwrap();
        });
        assert!(
            events.contains("memory_writer: snapshot staged"),
            "{events}"
        );
        assert!(events.contains(&format!("layout={layout}")), "{events}");
        assert!(events.contains("sparse_file: "), "{events}");
        assert!(events.contains("engine="), "{events}");
        assert!(events.contains("atomic_file: file staged"), "{events}");
        assert!(!events.contains("S3cr3t"), "{events}");
    }
}

#[test]
fn an_image_whose_blocks_are_not_shared_is_reported() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return;
    };
    let full = dir.path().join("full.mem");
    std::fs::write(&full, ram()).unwrap();
    let events = captured(|| {
        let dest = dir.path().join("new.mem");
        let mut writer = MemoryWriter::open(dest, SIZE, 4096).unwrap();
        let shared = writer.reflink_full(&File::open(&full).unwrap()).unwrap();
        assert!(!shared);
    });
    assert!(events.contains("does not share blocks"), "{events}");
}

#[test]
fn a_raw_diff_that_is_refused_is_reported_with_why() {
    let dir = tempfile::tempdir().unwrap();
    let dirty = DirtyBitmap::new(0, SIZE, 512).unwrap();
    dirty.mark(0).unwrap();
    let events = captured(|| {
        let mut writer = MemoryWriter::open(dir.path().join("d"), SIZE, 512).unwrap();
        let error = writer.write_diff(&ram(), &dirty).unwrap_err();
        let SnapshotError::AmbiguousDiff { source, .. } = error else {
            panic!("{error}");
        };
        assert!(source.to_string().contains("holes"), "{source}");
    });
    assert!(
        events.contains("INFO memory_writer: holes are not trusted: the raw diff is refused"),
        "{events}"
    );
}
