//! Guest bytes that pass through this process on the way to or from a file do not stay in its
//! memory.
#![cfg(target_os = "linux")]

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use memory_image::{Chain, Image, RamTarget, compare};
use memory_writer::{Engine, Layout, MemoryWriter};
use page_reader::PageReader;
use test_images::{Secrets, found_secrets, save_secrets};
use test_memory::stay_on_this_processor;

/// The target of the restore.
struct Elsewhere;

impl RamTarget for Elsewhere {
    fn ram_size(&self) -> u64 {
        Secrets::RAM_SIZE
    }

    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

fn restored([full, diff]: [PathBuf; 2]) {
    let verified = Image::open(&diff)
        .unwrap()
        .verify(&mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert!(verified.is_ok());
    let chain = Chain::open_sealed(&[&full, &diff]).unwrap();
    chain.restore(&mut Elsewhere).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let _ = compare(&Secrets, &chain, Secrets::RAM_SIZE, Secrets::PAGE, go_on).unwrap();
    chain
        .merge(MemoryWriter::options(), full.with_extension("merged"))
        .unwrap();
}

#[test]
fn saves_and_restores_leave_no_guest_bytes_in_buffers() {
    // One processor, so that this thread does all the checksumming.
    stay_on_this_processor();
    let dir = tempfile::tempdir().unwrap();
    // A machine may lack io_uring, which `Engine::Auto` uses where it can.
    let everywhere = |engine: &&Engine| **engine != Engine::IoUring;
    for &engine in Engine::ALL.iter().filter(everywhere) {
        for (name, layout) in [("sealed", Layout::Sealed), ("packed", Layout::Packed)] {
            let files = save_secrets(dir.path(), engine, layout);
            let now = found_secrets();
            assert!(now.is_empty(), "{engine:?}, {name}, saved: {now:x?}");
            restored(files);
            let now = found_secrets();
            assert!(now.is_empty(), "{engine:?}, {name}, restored: {now:x?}");
        }
    }
    // Checks that the search would have found it.
    let mut kept = vec![0; 64 << 10];
    Secrets.read_at(0, &mut kept).unwrap();
    assert_ne!(found_secrets(), [0; 0]);
    drop(kept);
}
