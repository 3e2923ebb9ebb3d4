//! The library as the checks use it, and deliberately broken ones that the checks must catch.

use std::fs::{self, File};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, MemoryWriter};
use page_reader::PageReader;
use sparse_file::{RunSource, WriteError, WriteOptions, write_runs};

/// Which library is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target(pub Option<Mutant>);

/// The library with one error that libraries make. Nothing else differs, so that no other check
/// fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mutant {
    /// Renames the staged file without syncing it.
    SkipFileSync,
    /// Stages at a fixed name without creating a new file, so that a symbolic link planted there
    /// is followed.
    FollowStageSymlink,
    /// Takes the numbers of the bitmap's pages for those of the file's.
    IgnoreBitmapPageSize,
    /// Writes the blocks of a run, and not what is left beside them at its ends.
    SkipPartialBlocks,
}

impl Target {
    /// Writes all of `ram`, of `size` bytes, to `dest` and commits.
    pub fn full(
        self,
        dest: &Path,
        ram: &dyn PageReader,
        size: u64,
        page_size: u64,
    ) -> anyhow::Result<()> {
        if self.0 == Some(Mutant::FollowStageSymlink) && fixed_stage(dest).is_symlink() {
            return through_the_link(dest, ram, size);
        }
        let mut writer = self.open(dest, size, page_size)?;
        writer.write_full(ram)?;
        self.commit(writer)
    }

    /// Writes the pages of `ram` that `dirty` marks to `dest` and commits. Returns how many.
    pub fn diff(
        self,
        dest: &Path,
        ram: &dyn PageReader,
        dirty: &DirtyBitmap,
        page_size: u64,
    ) -> anyhow::Result<u64> {
        let mut writer = self.open(dest, dirty.ram_size(), page_size)?;
        let pages = if self.0 == Some(Mutant::IgnoreBitmapPageSize) {
            writer.write_diff(ram, &misread(dirty, page_size)?)?
        } else {
            writer.write_diff(ram, dirty)?
        };
        self.commit(writer)?;
        Ok(pages)
    }

    /// Writes `runs` of `source` to `file`.
    pub fn runs(
        self,
        file: &File,
        runs: &[Range<u64>],
        source: &dyn RunSource,
        options: &WriteOptions,
    ) -> Result<u64, WriteError> {
        let runs = runs.iter().cloned().map(|run| match self.0 {
            Some(Mutant::SkipPartialBlocks) => {
                run.start.next_multiple_of(BLOCK)..run.end / BLOCK * BLOCK
            }
            _ => run,
        });
        let go_on = &mut |_| ControlFlow::Continue(());
        write_runs(file, runs, source, options, go_on)
    }

    /// Where a snapshot of `dest` will be staged: what an attacker can foresee.
    pub fn stage_of(self, dest: &Path) -> anyhow::Result<PathBuf> {
        if self.0 == Some(Mutant::FollowStageSymlink) {
            return Ok(fixed_stage(dest));
        }
        Ok(MemoryWriter::open(dest, 4096, 4096)?
            .staged_path()
            .to_owned())
    }

    fn open(self, dest: &Path, size: u64, page_size: u64) -> anyhow::Result<MemoryWriter> {
        // The checks know which pages they wrote, also where holes do not show them.
        let mut options = MemoryWriter::options().allow_ambiguous_diff(true);
        if self.0 == Some(Mutant::SkipFileSync) {
            options = options.durability(Durability::None);
        }
        Ok(options.open(dest, size, page_size)?)
    }

    fn commit(self, writer: MemoryWriter) -> anyhow::Result<()> {
        let dest = writer.dest_path().to_owned();
        writer.commit()?;
        if self.0 == Some(Mutant::SkipFileSync) {
            let dir = dest.parent().context("a destination in a directory")?;
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    }
}

/// Of a disk that direct I/O writes to.
const BLOCK: u64 = 4096;

fn fixed_stage(dest: &Path) -> PathBuf {
    dest.with_extension("tmp")
}

fn through_the_link(dest: &Path, ram: &dyn PageReader, size: u64) -> anyhow::Result<()> {
    let stage = fixed_stage(dest);
    let file = File::create(&stage)?;
    let mut bytes = vec![0; size.try_into()?];
    ram.read_at(0, &mut bytes)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    Ok(fs::rename(stage, dest)?)
}

/// Returns `dirty` with its marks misread as pages of the file.
fn misread(dirty: &DirtyBitmap, page_size: u64) -> anyhow::Result<DirtyBitmap> {
    let wrong = DirtyBitmap::new(dirty.ram_start(), dirty.ram_size(), page_size)?;
    let granule = dirty.granule();
    let bits = dirty
        .runs()
        .flat_map(|run| run.start / granule..run.end.div_ceil(granule));
    for bit in bits.filter(|bit| *bit < dirty.ram_size() / page_size) {
        wrong.mark_page(bit)?;
    }
    Ok(wrong)
}
