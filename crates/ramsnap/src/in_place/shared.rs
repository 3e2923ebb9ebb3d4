//! A sealed image whose unchanged pages share the blocks of the image that it replaces.
//!
//! Sealed images have their pages at their guest offsets. On a file system that shares blocks, the
//! pages that no diff has are not written again: the new file begins as a copy that shares all
//! blocks, and only pages of the diffs are written to it. Checksums of chunks without such pages
//! stay, because the old file was verified.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use dirty_bitmap::PageSet;
use image_format::{CHUNK_SIZE, Checksum, ChunkSum, Footer, ImageKind, Run, Version};
use memory_image::{Chain, Image, Layout};
use page_reader::{SecretBuffer, ZeroRuns};
use sparse_file::{SpaceError, WriteOptions, grow, share_blocks, zero_range};

use crate::session::Session;

/// Bytes copied at a time.
const PIECE: u64 = 1 << 20;

/// The pages of a chain that its first image does not have.
pub(super) struct Changes<'c> {
    chain: &'c Chain,
    /// The footer of the first image.
    old: &'c Footer,
    /// The footer of the newest image.
    new: &'c Footer,
    changed: PageSet,
    stored: PageSet,
}

impl<'c> Changes<'c> {
    /// Returns the changes, or `None` if the first image cannot become the new one by them: it is
    /// not sealed and full, its pages are of another size, an image is raw, or the result has
    /// another layout.
    pub(super) fn of(chain: &'c Chain, layout: Layout) -> Option<Self> {
        let old = chain.images().next()?.footer()?;
        let new = chain.images().last()?.footer()?;
        let fits = (old.layout, layout) == (Layout::Sealed, Layout::Sealed)
            && old.version == Version::CURRENT
            && old.kind == ImageKind::Full
            && old.page_size == chain.page_size();
        if !fits {
            return None;
        }
        let all = 0..chain.ram_size();
        let (mut changed, mut stored) = (
            PageSet::new(all.clone(), chain.page_size()),
            PageSet::new(all, chain.page_size()),
        );
        for image in chain.images().skip(1) {
            let runs = &image.footer()?.runs;
            runs.iter().for_each(|run| changed.add(&run.range()));
        }
        chain.stored_runs().for_each(|run| stored.add(&run));
        Some(Self {
            chain,
            old,
            new,
            changed,
            stored,
        })
    }

    /// Makes the staged file share the blocks of the first image. Returns `false` if the file
    /// system cannot, and leaves the file without data then.
    pub(super) fn share(&self, base: &Image, staged: &File) -> anyhow::Result<bool> {
        let version = base.version()?;
        grow(staged, self.chain.ram_size())?;
        match share_blocks(version.file(), staged, self.chain.ram_size()) {
            Ok(()) => Ok(true),
            Err(SpaceError::Unsupported { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the changed pages and the footer of the new state to the file that shares the blocks.
    /// With `skip_zeros`, changed pages of zeros are not stored.
    pub(super) fn write(
        mut self,
        session: &Session,
        staged: &File,
        skip_zeros: bool,
    ) -> anyhow::Result<()> {
        if skip_zeros {
            self.skip_zeros(session)?;
        }
        let bar = session.bar("merging");
        bar.set_length(self.changed.page_count() * self.chain.page_size());
        let mut buffer = SecretBuffer::new();
        for run in self.changed.runs() {
            for stored in self.stored.runs_in(run.clone()) {
                for start in stored.clone().step_by(PIECE as usize) {
                    session.check("nothing was written")?;
                    let len = PIECE.min(stored.end - start);
                    let piece = buffer.sized(len as usize);
                    self.chain.read(start, piece)?;
                    let written = staged.write_all_at(piece, start);
                    written.context("cannot write the changed pages")?;
                    bar.inc(len);
                }
            }
            for zeros in self.stored.gaps_in(run.clone()) {
                bar.inc(zeros.end - zeros.start);
                zero_range(staged, zeros, &WriteOptions::new())?;
            }
        }
        let footer = self.footer(session)?;
        footer.write(staged).context("cannot write the footer")?;
        Ok(self.chain.check_unchanged()?)
    }

    fn skip_zeros(&mut self, session: &Session) -> anyhow::Result<()> {
        let runs = self.changed.runs();
        let runs = runs.flat_map(|run| self.stored.runs_in(run));
        let report = |_| session.check("nothing was written");
        let found = ZeroRuns::find(self.chain, runs, self.chain.page_size(), report)?;
        found.zeros().iter().for_each(|run| self.stored.remove(run));
        Ok(())
    }

    fn footer(&self, session: &Session) -> anyhow::Result<Footer> {
        let mut runs = Vec::new();
        let mut at = 0;
        for stored in self.stored.runs() {
            if at < stored.start {
                runs.push(Run::zeros(at..stored.start));
            }
            at = stored.end;
            runs.push(Run::present(stored.clone(), stored.start));
        }
        if at < self.chain.ram_size() {
            runs.push(Run::zeros(at..self.chain.ram_size()));
        }
        Ok(Footer {
            version: Version::CURRENT,
            id: self.new.id,
            kind: ImageKind::Full,
            layout: Layout::Sealed,
            ram_size: self.chain.ram_size(),
            page_size: self.chain.page_size(),
            regions: self.old.regions.clone(),
            runs,
            checksums: self.checksums(session)?,
            metadata: self.new.metadata.clone(),
        })
    }

    /// Returns the checksums of all chunks with present bytes. Those without a changed page are
    /// kept.
    fn checksums(&self, session: &Session) -> anyhow::Result<Vec<Checksum>> {
        let old = self
            .old
            .chunks()
            .map(|chunk| (chunk.number, chunk.checksum));
        let old: BTreeMap<u64, Checksum> = old.collect();
        let mut sums = Vec::new();
        let mut buffer = SecretBuffer::new();
        for start in (0..self.chain.ram_size()).step_by(CHUNK_SIZE as usize) {
            let chunk = start..self.chain.ram_size().min(start + CHUNK_SIZE);
            let present: Vec<Range<u64>> = self.stored.runs_in(chunk.clone()).collect();
            if present.is_empty() {
                continue;
            }
            let kept = old.get(&(start / CHUNK_SIZE));
            let is_changed = self.changed.runs_in(chunk).next().is_some();
            if let Some(sum) = kept.filter(|_| !is_changed) {
                sums.push(*sum);
                continue;
            }
            session.check("nothing was written")?;
            let mut sum = ChunkSum::new();
            for run in present {
                let bytes = buffer.sized((run.end - run.start) as usize);
                self.chain.read(run.start, bytes)?;
                sum.update(bytes);
            }
            sums.push(sum.finish());
        }
        Ok(sums)
    }
}
