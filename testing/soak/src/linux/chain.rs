//! The images of one guest, and ways to have its RAM back from them.

use std::fs;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, ensure};
use lazy_restore::LazyRam;
use memory_image::{Chain, ChainError, Image, MappedChain, MappedImage, OpenImageError};
use memory_writer::ImageId;
use page_reader::PageReader;
use random::Random;
use test_machine::Need;

use super::plan::Plan;
use super::shadow::{Difference, PageViolation, Shadow};

/// An image that was committed.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub path: PathBuf,
    pub page: u64,
    /// What was dirty, in bytes: a raw diff doesn't say it on every file system.
    pub pages: Vec<Range<u64>>,
    pub id: Option<ImageId>,
    /// What was committed with it, and what is in there.
    pub state: Option<(PathBuf, String)>,
}

impl Saved {
    pub(super) fn open(&self) -> Result<Image, OpenImageError> {
        match self.id {
            None => Image::open_raw(&self.path),
            Some(_) => Image::open(&self.path),
        }
    }
}

/// A full image and its diffs, oldest first; none before the first save.
#[derive(Default)]
pub(super) struct Images(pub Vec<Saved>);

/// A way to have the RAM back.
#[derive(Clone, Copy, Debug)]
enum Way {
    Read,
    Mapped,
    Lazy,
    Merged,
    Restored,
    Written,
}

/// What the RAM must be, and was before.
pub(super) struct Expected<'a> {
    pub now: &'a Shadow,
    pub before: Option<&'a Shadow>,
}

impl Expected<'_> {
    fn compare(&self, restored: &dyn PageReader) -> anyhow::Result<()> {
        self.now.compare(restored, self.before)
    }
}

impl Images {
    pub(super) fn newest(&self) -> Option<&Saved> {
        self.0.last()
    }

    /// The names of all files in `dir` that are theirs.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().flat_map(|saved| {
            let state = saved.state.iter().map(|(path, _)| path.as_path());
            state.chain([saved.path.as_path()])
        })
    }

    /// Removes all files but those that `kept` has too.
    pub(super) fn remove_but(&mut self, kept: Vec<Saved>) -> anyhow::Result<()> {
        let old = std::mem::replace(&mut self.0, kept);
        for file in Self(old).files() {
            if !self.files().any(|kept| kept == file) {
                fs::remove_file(file)
                    .with_context(|| format!("can't remove {}", file.display()))?;
            }
        }
        Ok(())
    }

    pub(super) fn open(&self) -> anyhow::Result<Chain> {
        let page = self.0.iter().map(|saved| saved.page).min();
        let (full, diffs) = self.0.split_first().context("there is an image")?;
        let page = page.context("there is an image")?;
        let mut chain = Chain::from_image(full.open()?, page)?;
        for diff in diffs {
            match chain.push_image(diff.open()?) {
                Err(ChainError::AmbiguousDiff { .. }) => {
                    chain.push_pages(&diff.path, diff.pages.iter().cloned())?;
                }
                pushed => pushed?,
            }
        }
        Ok(chain)
    }

    /// Whether the sums of sealed images hold: of `all`, or of the newest.
    pub(super) fn verify(&self, all: bool) -> anyhow::Result<()> {
        let from = if all { 0 } else { self.0.len() - 1 };
        for saved in &self.0[from..] {
            if let Some((path, wanted)) = &saved.state {
                let found = fs::read_to_string(path)?;
                ensure!(
                    found == *wanted,
                    "{}: {found}, not {wanted}",
                    path.display()
                );
            }
            if saved.id.is_none() {
                continue;
            }
            let image = saved.open()?;
            ensure!(
                image.id() == saved.id,
                "{} has another id",
                saved.path.display()
            );
            let verified = image.verify(&mut |_| ControlFlow::Continue(()))?;
            if let Some(damage) = verified.damage.first() {
                let torn = Difference {
                    at: damage.offset(),
                    what: PageViolation::Torn,
                };
                let context = format!("{}: {damage:?}", saved.path.display());
                return Err(anyhow::Error::from(torn).context(context));
            }
        }
        Ok(())
    }

    /// Restores the RAM in a way chosen at random, which is returned, and compares it. `scratch` is
    /// a file that may be made.
    pub(super) fn compare(
        &self,
        expected: &Expected<'_>,
        random: &mut Random,
        plan: &Plan,
        scratch: &Path,
    ) -> anyhow::Result<&'static str> {
        let chain = self.open()?;
        let ways = [
            Way::Read,
            Way::Mapped,
            Way::Lazy,
            Way::Merged,
            Way::Restored,
            Way::Written,
        ];
        let way = ways[random.below(ways.len() as u64) as usize];
        let way = match way {
            Way::Lazy if !Need::Userfaultfd.is_met() => Way::Read,
            way => way,
        };
        let found = match way {
            Way::Read => expected.compare(&chain),
            Way::Mapped => {
                let mappings = [1, 16, 4096][random.below(3) as usize];
                let options = MappedChain::options().max_mappings(mappings);
                expected.compare(&options.map(&chain)?)
            }
            Way::Lazy => lazily(chain, expected, random),
            Way::Merged => merged(&chain, expected, plan, scratch),
            Way::Restored => restored(&chain, expected),
            Way::Written => written(&chain, expected, plan, scratch),
        };
        found.with_context(|| format!("{way:?} back from {:#?}", self.0))?;
        Ok(way.name())
    }
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Mapped => "mapped",
            Self::Lazy => "lazily",
            Self::Merged => "merged",
            Self::Restored => "restored",
            Self::Written => "written",
        }
    }
}

/// Fills memory while a thread touches it here and there.
fn lazily(chain: Chain, expected: &Expected<'_>, random: &mut Random) -> anyhow::Result<()> {
    const TOUCHED: usize = 4096;
    let pages = chain.ram_size() / TOUCHED as u64;
    let options = LazyRam::options().prefetch(random.below(2) == 0);
    let around = 4096 << random.below(8);
    let ram = options.fault_around(around).start(Arc::new(chain))?;
    let mut touch = || {
        let mut page = [0; TOUCHED];
        for _ in 0..256 {
            let at = random.below(pages) * TOUCHED as u64;
            ram.read_at(at, &mut page)?;
            expected.now.compare_piece(at, &page, expected.before)?;
        }
        anyhow::Ok(())
    };
    thread::scope(|scope| {
        let guest = scope.spawn(&mut touch);
        ram.wait()?;
        guest
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    expected.compare(&ram)
}

/// Makes a full image of it all, which is mapped, or opened as a chain where it is packed.
fn merged(
    chain: &Chain,
    expected: &Expected<'_>,
    plan: &Plan,
    scratch: &Path,
) -> anyhow::Result<()> {
    let options = plan.sealed(chain.seal());
    chain.merge(options, scratch)?;
    let compared = match (plan.layout.has_footer(), plan.layout.is_in_place()) {
        (false, _) => expected.compare(&MappedImage::open_raw(scratch)?),
        (true, true) => expected.compare(&MappedImage::open(scratch)?),
        (true, false) => expected.compare(&Chain::open(scratch, chain.page_size())?),
    };
    fs::remove_file(scratch)?;
    compared
}

fn restored(chain: &Chain, expected: &Expected<'_>) -> anyhow::Result<()> {
    let mut ram = vec![0; usize::try_from(chain.ram_size())?];
    chain.restore_zeroed(ram.as_mut_slice())?;
    expected.compare(&ram)
}

/// As a tool does that writes the chain in a layout of its choice.
fn written(
    chain: &Chain,
    expected: &Expected<'_>,
    plan: &Plan,
    scratch: &Path,
) -> anyhow::Result<()> {
    let options = plan.sealed(chain.seal());
    let mut writer = options.open(scratch, chain.ram_size(), chain.page_size())?;
    chain.write_to(&mut writer)?;
    writer.commit()?;
    let compared = plan
        .open(scratch)
        .map_err(anyhow::Error::from)
        .and_then(|image| Ok(Chain::from_image(image, chain.page_size())?))
        .and_then(|written| expected.compare(&written));
    fs::remove_file(scratch)?;
    compared
}

/// The names in `dir`; none where there is no such directory.
pub(super) fn names(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    Ok(paths.collect::<io::Result<_>>()?)
}
