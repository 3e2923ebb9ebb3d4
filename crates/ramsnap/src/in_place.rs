//! Merging a chain into its first file.

mod shared;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::AtomicWriter;
use image_format::{Footer, ImageId};
use memory_image::{Chain, Image};
use sparse_file::FileIdentity;

use crate::args::{Output, kept_seal};
use crate::catalog::{Catalog, Entry, Unusable};
use crate::chain_lock::dirs_of;
use crate::failure::ImagesFailure;
use crate::print;
use crate::session::Session;
use crate::{input, save};
use shared::Changes;

/// Writes the state of `chain` to a file that is staged beside its first one, for the caller to
/// commit by [`save::put_in_place`] or [`save::put_image_in_place`]. The first file stays as it is
/// until then. Only pages that changed are written where the file system can share blocks (btrfs,
/// XFS) and the first file is sealed or raw.
pub fn stage(session: &Session, chain: &Chain, verify: bool) -> anyhow::Result<AtomicWriter> {
    let first = chain.images().next().context("there is no image")?;
    let path = first.path().to_owned();
    let below = first.footer().and_then(Footer::parent);
    save::check_replaces_no(below.filter(|_| !chain.is_full()), &path)?;
    let layout = first.layout();
    let options = session
        .options("merging")
        .layout(layout)
        .seal(kept_seal(layout, chain.seal()))
        .skip_untouched(true)
        .ram_start(0)
        // A file that another writer puts there in the meantime stays.
        .replace_only(first.version()?);
    if layout.has_footer() {
        input::warn_of_old_metadata(session, chain);
    }
    let (size, page_size) = (chain.ram_size(), save::page_size(chain)?);
    let output = Output { path, force: true };
    let staged = save::stage_for(session, &output, &options, size, page_size)?;
    let check = || match verify {
        true => input::check_sums(session, chain.images()),
        false => Ok(()),
    };
    if let Some(changes) = Changes::of(chain)
        && changes.share(first, staged.file())?
    {
        check()?;
        changes.write(session, staged.file())?;
        return Ok(staged);
    }
    let mut writer = options.open_on(staged, size, page_size)?;
    save::check_room_for(session, &writer, chain)?;
    check()?;
    save::write_chain(&mut writer, chain)?;
    Ok(writer.finish()?)
}

/// Refuses to replace a state that a diff outside of `chain` was taken after, in the directories of
/// its files and of those that links lead to. `removes` states whether the diffs of the chain are
/// removed.
pub fn check_not_needed(chain: &Chain, removes: bool) -> anyhow::Result<()> {
    let paths: Vec<PathBuf> = chain.paths().map(Path::to_owned).collect();
    let is_raw = chain
        .images()
        .next()
        .is_some_and(|it| it.footer().is_none());
    // A raw image gets no id, by which later diffs would follow it.
    let followed = chain.id().filter(|_| !is_raw || !removes);
    let is_lost = |id: ImageId| Some(id) != followed && chain.ids().any(|it| it == id);
    let (mut entries, mut unusable) = (Vec::new(), Vec::new());
    for dir in dirs_of(chain.paths()) {
        let catalog = Catalog::with_hidden(&dir)?;
        entries.extend(catalog.entries);
        unusable.extend(catalog.unusable);
    }
    let is_other = |path: &Path| !input::is_one_of(path, &paths);
    for entry in entries.iter().filter(|entry| entry.is_diff) {
        let path = || entry.path.clone();
        match entry.parent {
            Some(parent) if is_lost(parent) && is_other(&entry.path) => {
                // Another full image may have the same state.
                let has_state = |it: &Entry| !it.is_diff && it.id == parent && is_other(&it.path);
                if !entries.iter().any(has_state) {
                    let path = path();
                    return Err(ImagesFailure::NeededByOther { path, parent }.into());
                }
            }
            None if is_raw && is_other(&entry.path) => {
                return Err(ImagesFailure::MayFollowRaw { path: path() }.into());
            }
            Some(_) | None => {}
        }
    }
    match unusable.into_iter().find(|it| is_other(&it.path)) {
        Some(Unusable { path, why }) => Err(ImagesFailure::MayNeedLost { path, why }.into()),
        None => Ok(()),
    }
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
