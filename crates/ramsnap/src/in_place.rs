//! Merging a chain into its first file.

mod needed;
mod shared;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::AtomicWriter;
use memory_image::{Chain, Image, Layout};
use memory_writer::{MemoryWriter, MemoryWriterOptions};
use sparse_file::FileIdentity;

use crate::args::{Output, kept_seal};
use crate::failure::ImagesFailure;
use crate::print;
use crate::session::Session;
use crate::{input, save};
pub use needed::Neighbors;
use shared::Changes;

/// How a chain is merged.
#[derive(Clone, Copy, Debug)]
pub struct Merging {
    /// The layout of the result.
    pub layout: Layout,
    /// Whether stored pages of zeros take no space in the result.
    pub skip_zeros: bool,
    /// Whether the images are compared with their checksums first.
    pub verify: bool,
}

impl Merging {
    /// Returns the options of the writer of the result.
    pub fn options(self, session: &Session, chain: &Chain) -> MemoryWriterOptions {
        if self.layout.has_footer() {
            input::warn_of_old_metadata(session, chain);
        }
        session
            .options("merging")
            .layout(self.layout)
            .seal(kept_seal(self.layout, chain.seal()))
            .skip_untouched(true)
            .skip_zeros(self.skip_zeros)
            .ram_start(0)
    }

    /// Writes the chain, and checks it once there is a place for the result.
    pub fn write(
        self,
        session: &Session,
        chain: &Chain,
        mut writer: MemoryWriter,
    ) -> anyhow::Result<AtomicWriter> {
        save::check_room_for(session, &writer, chain)?;
        self.check(session, chain)?;
        save::write_chain(&mut writer, chain)?;
        Ok(writer.finish()?)
    }

    fn check(self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        match self.verify {
            true => input::check_sums(session, chain.images()),
            false => Ok(()),
        }
    }
}

/// Writes the state of `chain` to a file that is staged beside its first one, for the caller to
/// commit by [`save::put_in_place`] or [`save::put_image_in_place`]. The first file stays as it is
/// until then. Only pages that changed are written where the file system can share blocks (btrfs,
/// XFS), the first file is sealed or raw, and the result is of the same layout. Zeros that the
/// first file stores are kept then.
pub fn stage(session: &Session, chain: &Chain, merging: Merging) -> anyhow::Result<AtomicWriter> {
    let first = chain.images().next().context("there is no image")?;
    let options = merging.options(session, chain);
    // A file that another writer puts there in the meantime stays.
    let options = options.replace_only(first.version()?);
    let (size, page_size) = (chain.ram_size(), save::page_size(chain)?);
    let path = first.path().to_owned();
    let output = Output { path, force: true };
    let staged = save::stage_for(session, &output, &options, size, page_size)?;
    if let Some(changes) = Changes::of(chain, merging.layout)
        && changes.share(first, staged.file())?
    {
        merging.check(session, chain)?;
        changes.write(session, staged.file(), merging.skip_zeros)?;
        return Ok(staged);
    }
    let writer = options.open_on(staged, size, page_size)?;
    merging.write(session, chain, writer)
}

/// Refuses to replace a state that other images need, as [`Neighbors::check_not_needed`] does.
pub fn check_not_needed(chain: &Chain, removes: bool) -> anyhow::Result<()> {
    Neighbors::default().check_not_needed(chain, removes)
}

/// Removes the files of `chain` after the first one, which has all of their state now and is
/// durable. The oldest is removed first, so that what is left after a crash is not linked to an
/// image that it does not follow. Returns the paths.
pub fn remove_merged(session: &Session, chain: Chain) -> anyhow::Result<Vec<PathBuf>> {
    let first = chain.paths().next().unwrap_or(Path::new("")).to_owned();
    let mut merged = Vec::new();
    for image in chain.images().skip(1) {
        let path = image.path();
        match is_still_at(image, path) {
            Ok(true) => merged.push(path.to_owned()),
            Ok(false) => session.warn(&format!(
                "{path:?} was replaced meanwhile, and is not removed"
            )),
            Err(error) => session.warn(&format!("{path:?} is not removed: {error:#}")),
        }
    }
    // A removed file that is open cannot be closed and opened again, so each takes a descriptor.
    drop(chain);
    for left in &merged {
        fs::remove_file(left).map_err(|source| ImagesFailure::NotRemoved {
            path: first.clone(),
            left: left.clone(),
            source,
        })?;
    }
    let dirs: BTreeSet<_> = merged.iter().map(|path| save::dir_of(path)).collect();
    for dir in dirs {
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.with_context(|| format!("cannot bring the removals in {dir:?} to the disk"))?;
    }
    Ok(merged)
}

fn is_still_at(image: &Image, path: &Path) -> anyhow::Result<bool> {
    let of = FileIdentity::of(image.version()?.file())?;
    match FileIdentity::at(path) {
        Ok(at) => Ok(of.may_be(&at)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Returns the names of files, for a report.
pub fn names(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| print::path(path)).collect();
    names.join(", ")
}
