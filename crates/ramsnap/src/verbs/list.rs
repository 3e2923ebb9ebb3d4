//! `ramsnap list`: the chains in a directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use clap::Args;
use serde::Serialize;

use crate::catalog::{Catalog, Entry};
use crate::exit_status::ExitStatus;
use crate::print::{self, JsonPath, count, size};

/// The most columns before a name.
const WIDEST: usize = 40;

/// Show the images in directories as trees of chains
///
/// Each diff is below the image that it was taken after, which is found by its id. The exit status
/// is 1 if an image is not usable, or if the parent of a diff is in no file. Files without a footer
/// may be raw images, and are only counted. Files with equal ids have the same state, and name each
/// other. `--chain DIR NEWEST` of the other verbs finds a chain
/// in the same way.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap list /var/lib/snapshots\n  \
    ramsnap list . --json")]
pub struct List {
    /// Directories, without their subdirectories
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// As JSON: a list of objects, sizes in bytes. A path that is not UTF-8 is an object: text, and
    /// bytes_hex
    #[arg(long)]
    json: bool,
}

/// The images of a directory.
#[derive(Debug, Serialize)]
struct Listing {
    dir: JsonPath,
    /// Parents before their diffs.
    images: Vec<Listed>,
    unusable: Vec<Unusable>,
    other_files: u64,
}

#[derive(Debug, Serialize)]
struct Listed {
    file: JsonPath,
    layout: &'static str,
    kind: &'static str,
    id: String,
    parent: Option<String>,
    /// The file of the parent.
    parent_file: Option<JsonPath>,
    /// Other files that have the same id, and so the same state.
    same_id: Vec<JsonPath>,
    /// The number of images below it.
    depth: u64,
    ram_bytes: u64,
    file_bytes: u64,
    /// Seconds since 1970.
    modified: u64,
    /// The lines of the tree before the name.
    #[serde(skip)]
    lines: String,
}

#[derive(Debug, Serialize)]
struct Unusable {
    file: JsonPath,
    why: String,
}

impl List {
    pub fn run(&self) -> anyhow::Result<ExitStatus> {
        let listings = self
            .dirs
            .iter()
            .map(|dir| Ok(Listing::of(&Catalog::of(dir)?)));
        let listings = listings.collect::<anyhow::Result<Vec<_>>>()?;
        if self.json {
            print::json(&listings)?;
        } else {
            let texts: Vec<_> = listings.iter().map(Listing::text).collect();
            print::line(&texts.join("\n\n"))?;
        }
        let good = listings.iter().all(Listing::is_good);
        Ok(ExitStatus::of_check(good))
    }
}

impl Listing {
    fn of(catalog: &Catalog) -> Self {
        let mut tree = Tree {
            catalog,
            listed: BTreeSet::new(),
            images: Vec::new(),
        };
        let is_root = |entry: &&Entry| {
            let parent = entry.parent.filter(|_| entry.is_diff);
            parent.is_none_or(|parent| catalog.state(parent).is_none())
        };
        let roots = catalog.entries.iter().filter(is_root);
        roots.for_each(|root| tree.add(root, None));
        // Diffs that only follow each other, without a full image.
        catalog
            .entries
            .iter()
            .for_each(|entry| tree.add(entry, None));
        let unusable = catalog.unusable.iter().map(|file| Unusable {
            file: file.path.clone().into(),
            why: file.why.clone(),
        });
        Self {
            dir: catalog.dir.clone().into(),
            images: tree.images,
            unusable: unusable.collect(),
            other_files: catalog.others.len() as u64,
        }
    }

    fn is_good(&self) -> bool {
        self.unusable.is_empty() && self.images.iter().all(Listed::is_linked)
    }

    fn text(&self) -> String {
        let mut lines = vec![print::path(&self.dir)];
        lines.extend(self.images.iter().map(Listed::text));
        for file in &self.unusable {
            lines.push(format!("{}: UNUSABLE: {}", name(&file.file), file.why));
        }
        if self.other_files > 0 {
            let files = count(self.other_files, "other file");
            lines.push(format!("{files}, without a footer"));
        }
        lines.join("\n")
    }
}

impl Listed {
    fn is_linked(&self) -> bool {
        self.parent.is_none() || self.parent_file.is_some()
    }

    fn text(&self) -> String {
        let Self { layout, kind, .. } = self;
        let (ram, file) = (size(self.ram_bytes), size(self.file_bytes));
        let parent = self.parent.as_deref().filter(|_| !self.is_linked());
        let missing = parent.map(|id| format!(", NOT LINKED: no file here has its parent {id}"));
        let same: Vec<_> = self.same_id.iter().map(|path| name(path)).collect();
        let same = match same.is_empty() {
            true => String::new(),
            false => format!(", the same as {}", same.join(", ")),
        };
        format!(
            "{}{}: {layout} {kind}, {file} of {ram} of RAM, id {}{same}{}",
            self.lines,
            name(&self.file),
            self.id,
            missing.unwrap_or_default()
        )
    }
}

fn name(path: &Path) -> String {
    print::path(path.file_name().unwrap_or_default().as_ref())
}

/// The tree while it is made.
struct Tree<'c> {
    catalog: &'c Catalog,
    listed: BTreeSet<&'c Path>,
    images: Vec<Listed>,
}

/// An image whose diffs are listed, and the lines before their names.
struct Place<'c> {
    entry: &'c Entry,
    parent: Option<&'c Entry>,
    depth: u64,
    lines: String,
    below: String,
}

impl<'c> Tree<'c> {
    /// Adds an image and all that follows it, unless it is listed.
    fn add(&mut self, root: &'c Entry, parent: Option<&'c Entry>) {
        // No recursion, as chains may have thousands of images.
        let mut left = vec![Place {
            entry: root,
            parent,
            depth: 0,
            lines: String::new(),
            below: String::new(),
        }];
        while let Some(place) = left.pop() {
            if !self.listed.insert(&place.entry.path) {
                continue;
            }
            let entry = place.entry;
            let is_state = self.catalog.state(entry.id);
            let stands_for_it = is_state.is_some_and(|state| state.path == entry.path);
            let after = self.catalog.after(entry.id).filter(|_| stands_for_it);
            let after: Vec<_> = after
                .filter(|it| !self.listed.contains(&*it.path))
                .collect();
            for (number, diff) in after.iter().enumerate().rev() {
                let last = number + 1 == after.len();
                let branch = if last { "└ " } else { "├ " };
                let line = if last { "  " } else { "│ " };
                // Long chains stay readable.
                let below = match place.below.chars().count() < WIDEST {
                    true => format!("{}{line}", place.below),
                    false => place.below.clone(),
                };
                left.push(Place {
                    entry: diff,
                    parent: Some(entry),
                    depth: place.depth + 1,
                    lines: format!("{}{branch}", place.below),
                    below,
                });
            }
            self.images.push(listed(self.catalog, &place));
        }
    }
}

fn listed(catalog: &Catalog, place: &Place<'_>) -> Listed {
    let entry = place.entry;
    let same = catalog.with_id(entry.id).filter(|it| it.path != entry.path);
    let since = entry.modified.duration_since(UNIX_EPOCH);
    Listed {
        file: entry.path.clone().into(),
        layout: entry.layout.name(),
        kind: if entry.is_diff { "diff" } else { "full" },
        id: entry.id.to_string(),
        parent: entry.parent.map(|parent| parent.to_string()),
        parent_file: place.parent.map(|parent| parent.path.clone().into()),
        same_id: same.map(|it| it.path.clone().into()).collect(),
        depth: place.depth,
        ram_bytes: entry.ram_bytes,
        file_bytes: entry.file_bytes,
        modified: since.map_or(0, |since| since.as_secs()),
        lines: place.lines.clone(),
    }
}
