//! Which states other images need.

use std::collections::{BTreeMap, btree_map};
use std::path::{Path, PathBuf};

use anyhow::Context;
use image_format::ImageId;
use memory_image::Chain;

use crate::catalog::{Catalog, Entry, Unusable};
use crate::chain_lock::dirs_of;
use crate::failure::ImagesFailure;
use crate::input;

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
        let is_raw = chain
            .images()
            .next()
            .is_some_and(|it| it.footer().is_none());
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
                None if is_raw && is_other(&entry.path) => {
                    return Err(ImagesFailure::MayFollowRaw { path: path() }.into());
                }
                Some(_) | None => {}
            }
        }
        let mut unusable = catalogs().flat_map(|catalog| &catalog.unusable);
        match unusable.find(|it| is_other(&it.path)) {
            Some(Unusable { path, why }) => {
                let (path, why) = (path.clone(), why.clone());
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
