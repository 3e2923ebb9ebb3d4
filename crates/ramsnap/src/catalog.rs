//! The images in a directory, found by the ids that they record.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use image_format::{FooterError, ImageId};
use memory_image::{Image, Layout, OpenImageError};

use crate::failure::ImagesFailure;
use crate::words;

/// A sealed or packed image in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    pub layout: Layout,
    pub id: ImageId,
    /// `None` for a full image, and for a diff on a raw one.
    pub parent: Option<ImageId>,
    pub is_diff: bool,
    pub ram_bytes: u64,
    pub file_bytes: u64,
    pub modified: SystemTime,
}

/// A file that is an image, and that cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct Unusable {
    pub path: PathBuf,
    pub why: String,
}

/// The images in a directory, without its subdirectories.
#[derive(Debug, PartialEq, Eq)]
pub struct Catalog {
    pub dir: PathBuf,
    /// By name.
    pub entries: Vec<Entry>,
    pub unusable: Vec<Unusable>,
    /// Other regular files, which may be raw images.
    pub others: Vec<PathBuf>,
}

impl Catalog {
    /// Reads the footers of all files in `dir`. Hidden files are left out: writers stage theirs
    /// under such names.
    pub fn of(dir: &Path) -> anyhow::Result<Self> {
        Self::of_names(dir, |name| !is_hidden(name))
    }

    /// Reads the footers of all files in `dir` that are not staged.
    pub fn with_hidden(dir: &Path) -> anyhow::Result<Self> {
        Self::of_names(dir, |name| {
            !name.as_encoded_bytes().starts_with(b".atomic-file-")
        })
    }

    /// Returns the paths of the files in `dir` that [`of`](Self::of) would read.
    pub fn paths(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let names = names(dir)?.into_iter();
        let visible = names.filter(|name| !is_hidden(name));
        Ok(visible.map(|name| dir.join(name)).collect())
    }

    /// Returns the files that are not hidden, with paths in `dir`, which leads to this directory.
    pub fn visible_by(&self, dir: &Path) -> Self {
        let at = |path: &Path| {
            let name = path.file_name().filter(|name| !is_hidden(name))?;
            Some(dir.join(name))
        };
        let entries = self.entries.iter().filter_map(|entry| {
            let path = at(&entry.path)?;
            Some(Entry {
                path,
                ..entry.clone()
            })
        });
        let unusable = self.unusable.iter().filter_map(|file| {
            let (path, why) = (at(&file.path)?, file.why.clone());
            Some(Unusable { path, why })
        });
        Self {
            dir: dir.to_owned(),
            entries: entries.collect(),
            unusable: unusable.collect(),
            others: self.others.iter().filter_map(|path| at(path)).collect(),
        }
    }

    /// Reads the images that had one of `ids` again.
    pub fn read_again(&mut self, ids: &[ImageId]) {
        let entries = mem::take(&mut self.entries);
        for entry in entries {
            match ids.contains(&entry.id) {
                true => self.add(entry.path),
                false => self.entries.push(entry),
            }
        }
    }

    fn of_names(dir: &Path, is_listed: impl Fn(&OsStr) -> bool) -> anyhow::Result<Self> {
        let mut catalog = Self {
            dir: dir.to_owned(),
            entries: Vec::new(),
            unusable: Vec::new(),
            others: Vec::new(),
        };
        for name in names(dir)? {
            if is_listed(&name) {
                catalog.add(dir.join(name));
            }
        }
        Ok(catalog)
    }

    fn add(&mut self, path: PathBuf) {
        // A file that was removed meanwhile, or a link to none, is none.
        if !path.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return;
        }
        match Entry::at(&path) {
            Ok(Some(entry)) => self.entries.push(entry),
            Ok(None) => self.others.push(path),
            Err(error) => {
                let why = words::text(&error);
                self.unusable.push(Unusable { path, why });
            }
        }
    }

    /// Returns the images with this id, full ones first, and then the one that was written first: a
    /// later one may lead back to an older state.
    pub fn with_id(&self, id: ImageId) -> impl Iterator<Item = &Entry> {
        let found = self.entries.iter().filter(|entry| entry.id == id);
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|entry| (entry.is_diff, entry.modified));
        found.into_iter()
    }

    /// Returns the image that stands for this state in the tree: a full one if there is one.
    pub fn state(&self, id: ImageId) -> Option<&Entry> {
        self.with_id(id).next()
    }

    /// Returns the diffs that were taken after this state.
    pub fn after(&self, id: ImageId) -> impl Iterator<Item = &Entry> {
        self.entries
            .iter()
            .filter(move |entry| entry.parent == Some(id))
    }

    /// Returns the file of the image that `newest` stands for: a path, a name in the directory, or
    /// an id.
    pub fn newest(&self, newest: &Path) -> anyhow::Result<PathBuf> {
        Ok(self.find(newest)?.path)
    }

    /// Returns the files of the chain that ends with `newest`, oldest first. `newest` is a path, a
    /// name in the directory, or an id.
    pub fn chain(&self, newest: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let newest = self.find(newest)?;
        // Another image of the state may have all that is needed, as after a commit to it.
        let others = self.with_id(newest.id).filter(|it| it.path != newest.path);
        let mut missing = None;
        for newest in std::iter::once(&newest).chain(others) {
            let mut chain = Vec::new();
            match self.complete(newest, &mut chain, &mut BTreeSet::new()) {
                Ok(()) => {
                    chain.reverse();
                    return Ok(chain);
                }
                Err(why) => _ = missing.get_or_insert(why),
            }
        }
        let (path, parent) = missing.context("there is no image")?;
        let dir = self.dir.clone();
        Err(ImagesFailure::NoParent { path, parent, dir }.into())
    }

    /// Adds `entry` and all that it builds on to `chain`, newest first. Returns the diff whose
    /// parent is in no file otherwise. `below` has the files that were tried.
    fn complete(
        &self,
        entry: &Entry,
        chain: &mut Vec<PathBuf>,
        below: &mut BTreeSet<PathBuf>,
    ) -> Result<(), (PathBuf, ImageId)> {
        let mut at = entry;
        // A loop for the only parent, as chains may have thousands of images.
        loop {
            below.insert(at.path.clone());
            chain.push(at.path.clone());
            let Some(parent) = at.parent.filter(|_| at.is_diff) else {
                return Ok(());
            };
            let parents = self
                .with_id(parent)
                .filter(|it| it.ram_bytes == at.ram_bytes);
            let parents: Vec<_> = parents.filter(|it| !below.contains(&it.path)).collect();
            match &parents[..] {
                [] => return Err((at.path.clone(), parent)),
                [first, ..] if parents.len() == 1 || !first.is_diff => at = first,
                several => {
                    let (len, mut missing) = (chain.len(), None);
                    for it in several {
                        match self.complete(it, chain, below) {
                            Ok(()) => return Ok(()),
                            Err(other) => missing = Some(other),
                        }
                        chain.truncate(len);
                    }
                    return Err(missing.unwrap_or((at.path.clone(), parent)));
                }
            }
        }
    }

    fn find(&self, newest: &Path) -> anyhow::Result<Entry> {
        let id = newest.to_str().and_then(|text| text.parse().ok());
        if let Some(entry) = id.and_then(|id| self.state(id)) {
            return Ok(entry.clone());
        }
        let path = match newest.exists() {
            true => newest.to_owned(),
            false => self.dir.join(newest),
        };
        let entry = Entry::at(&path)?;
        entry.ok_or_else(|| ImagesFailure::RawNewest { path }.into())
    }
}

/// Returns the names in a directory, in order.
fn names(dir: &Path) -> anyhow::Result<Vec<OsString>> {
    let failed = || format!("cannot list the directory {dir:?}");
    let entries = fs::read_dir(dir).with_context(failed)?;
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>().with_context(failed)?;
    names.sort();
    Ok(names)
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

impl Entry {
    /// Returns the image at `path`, or `None` if it is neither sealed nor packed.
    fn at(path: &Path) -> anyhow::Result<Option<Self>> {
        let image = match Image::open(path) {
            Ok(image) => image,
            Err(OpenImageError::Empty { .. }) => return Ok(None),
            Err(OpenImageError::Footer {
                source: FooterError::NotSealed,
                ..
            }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(footer) = image.footer() else {
            return Ok(None);
        };
        let metadata = image.version()?.file().metadata();
        let looking = || format!("cannot look at {path:?}");
        let metadata = metadata.with_context(looking)?;
        Ok(Some(Self {
            path: path.to_owned(),
            layout: footer.layout,
            id: footer.id,
            parent: footer.parent(),
            is_diff: image.is_diff(),
            ram_bytes: image.ram_size(),
            file_bytes: metadata.len(),
            modified: metadata.modified().with_context(looking)?,
        }))
    }
}
