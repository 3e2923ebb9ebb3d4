//! The one place where snapshots are taken, checked and restored: what an operator does with the file of a guest's RAM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, RamTarget};
use memory_writer::MemoryWriter;
use page_reader::{FileReader, PageReader};

/// The guest's page, and the memory files', in bytes.
pub const PAGE: u64 = 4096;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Snapshots of the RAM of a guest that is paused, raw.
pub struct Tool;

impl Tool {
    /// Writes all of the file `ram` to `out`.
    pub fn full(&self, ram: &Path, out: &Path) -> anyhow::Result<()> {
        let (ram, size) = open(ram)?;
        let options = MemoryWriter::options().skip_untouched(true);
        let mut writer = options.skip_zeros(true).open(out, size, PAGE)?;
        writer.write_full(&ram)?;
        Ok(writer.commit()?)
    }

    /// Writes to `out` what in the file `ram` is not as it was at the end of `chain`; returns how many pages that are.
    pub fn diff(&self, ram: &Path, chain: &[&Path], out: &Path) -> anyhow::Result<u64> {
        let (ram, size) = open(ram)?;
        let before = chained(chain)?;
        let dirty = DirtyBitmap::new(0, size, PAGE)?;
        let (mut now, mut then) = (vec![0; CHUNK], vec![0; CHUNK]);
        for start in (0..size).step_by(CHUNK) {
            ram.read_at(start, &mut now)?;
            before.read_at(start, &mut then)?;
            let pages = now.chunks(PAGE as usize).zip(then.chunks(PAGE as usize));
            for (address, (now, then)) in (start..).step_by(PAGE as usize).zip(pages) {
                if now != then {
                    dirty.set_dirty(address)?;
                }
            }
        }
        let mut writer = MemoryWriter::open(out, size, PAGE)?;
        let pages = writer.write_diff(&ram, &dirty)?;
        writer.commit()?;
        Ok(pages)
    }

    /// Whether `chain` can be told apart page by page and read to the end.
    pub fn verify(&self, chain: &[&Path]) -> anyhow::Result<()> {
        let chain = chained(chain)?;
        let mut bytes = vec![0; CHUNK];
        for start in (0..chain.size()).step_by(CHUNK) {
            chain.read_at(start, &mut bytes)?;
        }
        Ok(())
    }

    /// Writes `chain` as one full image to `out`.
    pub fn merge(&self, chain: &[&Path], out: &Path) -> anyhow::Result<()> {
        chained(chain)?.flatten(out)?;
        Ok(())
    }

    /// Makes the file `ram` out of a full image.
    pub fn restore(&self, image: &Path, ram: &Path) -> anyhow::Result<()> {
        let image = Chain::open(image, PAGE)?;
        let file =
            File::create_new(ram).with_context(|| format!("can't make {}", ram.display()))?;
        file.set_len(image.size())?;
        let size = image.size();
        Ok(image.restore_zeroed(&mut RamFile { file, size })?)
    }
}

fn open(ram: &Path) -> anyhow::Result<(FileReader, u64)> {
    let file = File::open(ram).with_context(|| format!("can't open {}", ram.display()))?;
    let size = file.metadata()?.len();
    Ok((FileReader::new(file), size))
}

fn chained(paths: &[&Path]) -> anyhow::Result<Chain> {
    let (full, diffs) = paths.split_first().context("a chain has a full image")?;
    let mut chain = Chain::open(full, PAGE)?;
    for diff in diffs {
        chain.push(diff)?;
    }
    Ok(chain)
}

/// A new file for the RAM of a guest.
struct RamFile {
    file: File,
    size: u64,
}

impl RamTarget for RamFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_restored_chain_is_the_ram_and_a_diff_is_what_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let [ram, full, diff, merged, back] = ["ram", "full", "diff", "merged", "back"].map(path);
        let file = File::create(&ram).expect("a file");
        file.set_len(4 * CHUNK as u64).expect("room");
        file.write_all_at(&[1; 3 * PAGE as usize], PAGE)
            .expect("room");
        Tool.full(&ram, &full).expect("a full image");

        // One page changes, one becomes zeros, one that nobody had touched is in another chunk.
        file.write_all_at(&[2], PAGE + 5).expect("room");
        file.write_all_at(&[0; PAGE as usize], 2 * PAGE)
            .expect("room");
        file.write_all_at(&[3], 3 * CHUNK as u64).expect("room");
        assert_eq!(Tool.diff(&ram, &[&full], &diff).expect("a diff"), 3);

        Tool.verify(&[&full, &diff]).expect("a chain");
        Tool.merge(&[&full, &diff], &merged).expect("an image");
        Tool.restore(&merged, &back).expect("RAM");
        assert!(fs::read(&ram).expect("RAM") == fs::read(&back).expect("RAM"));
        assert_eq!(
            Tool.diff(&ram, &[&full, &diff], &path("none"))
                .expect("a diff"),
            0
        );
    }

    #[test]
    fn ram_that_is_there_already_is_not_written_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let (image, ram) = (dir.path().join("image"), dir.path().join("ram"));
        fs::write(&image, [1; PAGE as usize]).expect("a file");
        fs::write(&ram, "a guest's").expect("a file");
        let error = Tool.restore(&image, &ram).expect_err("it is there");
        assert!(error.to_string().contains("can't make"), "{error:#}");
        assert_eq!(fs::read(&ram).expect("RAM"), b"a guest's");
    }
}
