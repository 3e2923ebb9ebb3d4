//! Which states other images need.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::path::{Path, PathBuf};

use anyhow::Context;
use image_format::{Footer, ImageId};
use memory_image::{Chain, Image};

use crate::catalog::{Catalog, Entry};
use crate::chain_lock::dirs_of;
use crate::failure::ImagesFailure;
use crate::{input, stream};

/// The images of directories, also hidden ones. Each footer is read once.
#[derive(Debug, Default)]
pub struct Neighbors {
    dirs: BTreeMap<PathBuf, Catalog>,
}

impl Neighbors {
    /// Returns the images that are in `dir` and not hidden.
    pub fn visible_in(&mut self, dir: &Path) -> anyhow::Result<Catalog> {
        let listing = || format!("cannot list the directory {dir:?}");
        let path = dir.canonicalize().with_context(listing)?;
        Ok(self.read(path)?.visible_by(dir))
    }

    fn read(&mut self, dir: PathBuf) -> anyhow::Result<&Catalog> {
        Ok(match self.dirs.entry(dir) {
            btree_map::Entry::Occupied(known) => known.into_mut(),
            btree_map::Entry::Vacant(place) => {
                let catalog = Catalog::with_hidden(place.key())?;
                place.insert(catalog)
            }
        })
    }

    /// Refuses to replace a state that a diff outside of `chain` was taken after, in the
    /// directories of its files and of those that links lead to. `removes` states whether the diffs
    /// of the chain are removed.
    pub fn check_not_needed(&mut self, chain: &Chain, removes: bool) -> anyhow::Result<()> {
        let paths: Vec<PathBuf> = chain.paths().map(Path::to_owned).collect();
        let raw = |image: &Image| image.footer().is_none();
        let is_raw = chain.images().next().is_some_and(raw);
        let any_raw = chain.images().any(raw);
        // A raw image gets no id, by which later diffs would follow it.
        let followed = chain.id().filter(|_| !is_raw || !removes);
        let is_lost = |id: ImageId| Some(id) != followed && chain.ids().any(|it| it == id);
        let dirs = dirs_of(chain.paths());
        for dir in &dirs {
            self.read(dir.clone())?;
        }
        let catalogs = || dirs.iter().filter_map(|dir| self.dirs.get(dir));
        let entries = || catalogs().flat_map(|catalog| &catalog.entries);
        let is_other = |path: &Path| !input::is_one_of(path, &paths);
        for entry in entries().filter(|entry| entry.is_diff) {
            let path = || entry.path.clone();
            match entry.parent {
                Some(parent) if is_lost(parent) && is_other(&entry.path) => {
                    // Another full image may have the same state.
                    let has_state =
                        |it: &Entry| !it.is_diff && it.id == parent && is_other(&it.path);
                    if !entries().any(has_state) {
                        let path = path();
                        return Err(ImagesFailure::NeededByOther { path, parent }.into());
                    }
                }
                None if any_raw && is_other(&entry.path) => {
                    return Err(ImagesFailure::MayFollowRaw { path: path() }.into());
                }
                Some(_) | None => {}
            }
        }
        // The result would follow an image that is nowhere.
        let first = chain.images().next().filter(|_| !chain.is_full());
        let below = first.and_then(Image::footer).and_then(Footer::parent);
        if let Some(parent) = below.filter(|parent| !is_readable(*parent, entries, is_other)) {
            let path = paths[0].clone();
            return Err(ImagesFailure::FollowsNone { path, parent }.into());
        }
        let mut others = catalogs().flat_map(|catalog| &catalog.others);
        let compressed = others.find(|path| stream::is_compressed_diff(path));
        let compressed = compressed.map(|path| {
            let why = "it is compressed, so that its parent cannot be seen";
            (path, why.to_owned())
        });
        let unreadable = || {
            let mut unusable = catalogs().flat_map(|catalog| &catalog.unusable);
            let found = unusable.find(|it| is_other(&it.path))?;
            Some((&found.path, found.why.clone()))
        };
        match compressed.or_else(unreadable) {
            Some((path, why)) => {
                let path = path.clone();
                Err(ImagesFailure::MayNeedLost { path, why }.into())
            }
            None => Ok(()),
        }
    }

    /// Reads the images that had one of `ids` again, after such images were replaced or removed.
    pub fn read_again(&mut self, ids: &[ImageId]) {
        for catalog in self.dirs.values_mut() {
            catalog.read_again(ids);
        }
    }
}

/// Returns whether a state can be read from the images that are not among those that are merged: a
/// full image has it, or diffs that lead to one.
fn is_readable<'e, E: Iterator<Item = &'e Entry>>(
    state: ImageId,
    entries: impl Fn() -> E,
    is_other: impl Fn(&Path) -> bool,
) -> bool {
    let (mut states, mut seen) = (vec![state], BTreeSet::new());
    while let Some(state) = states.pop() {
        if !seen.insert(state) {
            continue;
        }
        for entry in entries().filter(|it| it.id == state && is_other(&it.path)) {
            match (entry.is_diff, entry.parent) {
                (false, _) => return true,
                (true, Some(parent)) => states.push(parent),
                // On a raw image, which has no id.
                (true, None) => return true,
            }
        }
    }
    false
}
