//! Guest bytes that were checksummed do not stay in the memory of this process. The file has only
//! this test, because it would find the bytes of others.
#![cfg(target_os = "linux")]

use std::sync::Barrier;
use std::thread;

use image_format::ChunkSum;
use page_reader::{PageReader, SecretBuffer};
use test_images::{Secrets, found_secrets};

/// Updates the checksum with more stack in use than when it is finished.
#[inline(never)]
fn update_deep(sum: &mut ChunkSum, bytes: &[u8]) {
    let used = std::hint::black_box([1_u8; 64 << 10]);
    sum.update(bytes);
    std::hint::black_box(used);
}

/// Another thread searches, so that the frames of this one are not overwritten by the search.
#[test]
fn a_finished_checksum_leaves_no_guest_bytes() {
    let mut buffer = SecretBuffer::new();
    for len in [40, 1000, 4096, 8192, 8193, 100_000, 1 << 20] {
        let bytes = buffer.sized(len);
        Secrets.read_at(0, bytes).unwrap();
        let finished = Barrier::new(2);
        let now = thread::scope(|scope| {
            let search = scope.spawn(|| {
                finished.wait();
                found_secrets()
            });
            let mut sum = ChunkSum::new();
            update_deep(&mut sum, bytes);
            bytes.fill(0);
            assert_ne!(sum.finish(), [0; 32]);
            drop(sum);
            finished.wait();
            search.join().unwrap()
        });
        assert!(now.is_empty(), "{len} bytes: {now:x?}");
    }
}
