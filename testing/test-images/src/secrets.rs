//! RAM full of secrets, and the search for them in the memory of this process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::ImageId;
use memory_writer::{Durability, Engine, Layout, MemoryWriter, Seal};
use page_reader::{PageReader, ProcessRegion, SecretBuffer};

const PAGE: u64 = 4096;
const SIZE: u64 = 4 << 20;
/// Distance of the secrets in the guest's RAM, in bytes.
const SECRET: u64 = 16;

/// The secret is in this process's memory only where a read has put it.
fn secret(at: u64) -> u8 {
    (at % SECRET) as u8 ^ 0xa5
}

/// A guest whose RAM is full of secrets. It can only be read, like the RAM of another process.
#[derive(Debug)]
pub struct Secrets;

impl Secrets {
    /// The size of the RAM in bytes.
    pub const RAM_SIZE: u64 = SIZE;
    /// The page size of the images in bytes.
    pub const PAGE: u64 = PAGE;
}

impl PageReader for Secrets {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(buf) {
            *byte = secret(at);
        }
        Ok(())
    }
}

/// Returns the addresses of the secret in this process's memory, at most one in each MiB. The
/// stacks are searched too, with the frames of functions that have returned: the unused bytes of a
/// later value would take their content to the heap.
#[must_use]
pub fn found_secrets() -> Vec<u64> {
    let memory = File::open("/proc/self/mem").unwrap();
    let mut buffer = SecretBuffer::new();
    let own = buffer.sized(1 << 20).as_ptr_range();
    let own = own.start as u64..own.end as u64;
    let mut found = Vec::new();
    for region in ProcessRegion::of_this_process().unwrap() {
        let range = region.addresses.clone();
        if !region.permissions.write {
            continue;
        }
        for start in range.clone().step_by(1 << 20) {
            let bytes = buffer.sized((range.end - start).min(1 << 20) as usize);
            // Some mappings cannot be read.
            if memory.read_exact_at(bytes, start).is_err() {
                continue;
            }
            let is_secret = |from: usize| {
                let window = bytes.get(from..from + SECRET as usize);
                window.is_some_and(|window| (0..).zip(window).all(|(at, byte)| *byte == secret(at)))
            };
            // Sixteen bytes at any address include eight at a multiple of eight.
            let words = bytes.chunks_exact(8).enumerate();
            let candidates = words.filter_map(|(word, bytes)| {
                let phase = bytes[0] ^ secret(0);
                (phase <= 8 && bytes[7] == secret(u64::from(phase) + 7))
                    .then(|| (8 * word).checked_sub(phase.into()))
                    .flatten()
            });
            let places = candidates
                .filter(|at| is_secret(*at))
                .map(|at| start + at as u64);
            found.extend(places.filter(|at| !own.contains(at)).take(1));
        }
    }
    found
}

/// Saves a full image and a diff of a few pages in `dir`, and returns their paths.
#[must_use]
pub fn save_secrets(dir: &Path, engine: Engine, layout: Layout) -> [PathBuf; 2] {
    let [full, diff] = ["full", "diff"].map(|name| dir.join(name));
    let options = |seal| {
        let options = MemoryWriter::options().engine(engine).skip_zeros(true);
        options
            .layout(layout)
            .seal(seal)
            .durability(Durability::None)
    };
    let id = ImageId::random().unwrap();
    let mut writer = options(Seal::new().id(id)).open(&full, SIZE, PAGE).unwrap();
    writer.write_full(&Secrets).unwrap();
    writer.commit().unwrap();
    let dirty = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    for at in (0..SIZE).step_by(5 * PAGE as usize) {
        dirty.mark(at).unwrap();
    }
    let mut writer = options(Seal::new().parent(id))
        .open(&diff, SIZE, PAGE)
        .unwrap();
    writer.write_diff(&Secrets, &dirty).unwrap();
    // Writes again, so that checksummed bytes are read back.
    writer.write_diff(&Secrets, &dirty).unwrap();
    writer.commit().unwrap();
    [full, diff]
}
