//! Chains that verify each chunk before they return a byte of it.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memory_image::{Chain, Damage, Image, ReadImageError, VerifiedChain};
use memory_writer::Layout;
use page_reader::PageReader;
use rstest::rstest;
use support::sealed_guest::{Guest, PAGE, SIZE, whole};

const MIB: u64 = 1 << 20;

/// Changes a byte of the page that `image` stores at the guest offset `at`.
fn damage(image: &Path, at: u64) {
    let footer = Image::open(image).unwrap().footer().cloned().unwrap();
    let stored = footer.run_at(at).unwrap().stored_at(at).unwrap();
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, stored).unwrap();
    file.write_all_at(&[byte[0] ^ 1], stored).unwrap();
}

#[rstest]
fn verified_bytes_are_those_of_the_chain(#[values(Layout::Sealed, Layout::Packed)] layout: Layout) {
    let guest = Guest::with_history(layout);
    let chain = VerifiedChain::new(guest.chain());
    assert!(whole(&chain) == guest.ram);
    // Verified chunks are read in parts.
    for at in [0, 100, 40 * PAGE + 7, MIB - 3, SIZE - 5] {
        let mut bytes = [0; 5];
        chain.read_at(at, &mut bytes).unwrap();
        assert_eq!(bytes, guest.ram[at as usize..][..5], "at {at}");
    }
    // The first read of a chunk is of a part of it.
    let chain = VerifiedChain::new(guest.chain());
    let mut bytes = vec![0; 3 * PAGE as usize];
    chain.read_at(254 * PAGE + 9, &mut bytes).unwrap();
    assert!(bytes == guest.ram[254 * PAGE as usize + 9..][..bytes.len()]);
}

#[rstest]
fn no_byte_of_a_damaged_chunk_is_returned(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let guest = Guest::with_history(layout);
    damage(&guest.snapshots[0], 300 * PAGE);
    let chain = VerifiedChain::new(guest.chain());
    // The chain itself does not notice it.
    guest.chain().read_at(300 * PAGE, &mut [0]).unwrap();
    for at in [257 * PAGE, 300 * PAGE, 257 * PAGE] {
        let mut byte = [0];
        let error = chain.read(at, &mut byte).unwrap_err();
        let ReadImageError::Damaged { path, damage } = &error else {
            panic!("{error}");
        };
        assert_eq!(*path, guest.snapshots[0]);
        let Damage::Chunk {
            number: 1,
            guest: range,
            ..
        } = damage
        else {
            panic!("{damage}");
        };
        assert_eq!(*range, MIB..2 * MIB);
        assert_eq!(byte, [0], "bytes of a damaged chunk were returned");
    }
    // Other chunks of the image, and other images, are returned.
    for at in [0, 255 * PAGE, 256 * PAGE, 2 * MIB, SIZE - PAGE] {
        let mut byte = [0xee];
        chain.read_at(at, &mut byte).unwrap();
        assert_eq!(byte[0], guest.ram[at as usize], "at {at}");
    }
}

#[test]
fn chunks_that_newer_images_replace_are_not_read() {
    let guest = Guest::with_history(Layout::Packed);
    // The last image stores pages 255 and 256, in two chunks.
    damage(&guest.snapshots[3], 256 * PAGE);
    let chain = VerifiedChain::new(guest.chain());
    chain.read_at(255 * PAGE, &mut [0]).unwrap();
    chain.read_at(256 * PAGE, &mut [0]).unwrap_err();
    chain.read_at(257 * PAGE, &mut [0]).unwrap();
}

#[test]
fn raw_images_are_read_without_checksums() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let chain = VerifiedChain::new(Chain::open_raw(&path, 4096).unwrap());
    let mut bytes = [0; 5];
    chain.read_at(4094, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 5]);
    assert!(chain.read_at(8190, &mut bytes).is_err());
}
