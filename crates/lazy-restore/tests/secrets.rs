//! Guest bytes that are read to fill memory stay only there.
#![cfg(target_os = "linux")]

use std::path::PathBuf;

use lazy_restore::LazyRam;
use memory_image::Chain;
use memory_writer::{Engine, Layout};
use page_reader::PageReader;
use test_images::{Secrets, found_secrets, save_secrets};
use test_machine::needs;
use test_memory::stay_on_this_processor;

fn filled([full, diff]: [PathBuf; 2]) {
    let chain = Chain::open_sealed(&[&full, &diff]).unwrap();
    let ram = LazyRam::options().start(chain).unwrap();
    ram.wait().unwrap();
}

#[test]
fn filling_leaves_no_guest_bytes_in_buffers() {
    needs!(Userfaultfd);
    // One processor, so that this thread does all the checksumming.
    stay_on_this_processor();
    let dir = tempfile::tempdir().unwrap();
    for (name, layout) in [("sealed", Layout::Sealed), ("packed", Layout::Packed)] {
        filled(save_secrets(dir.path(), Engine::Auto, layout));
        let now = found_secrets();
        assert!(now.is_empty(), "{name}: {now:x?}");
    }
    // Checks that the search would have found it.
    let mut kept = vec![0; 64 << 10];
    Secrets.read_at(0, &mut kept).unwrap();
    assert_ne!(found_secrets(), [0; 0]);
    drop(kept);
}
