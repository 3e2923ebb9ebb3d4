//! One save: begun, written, committed, as its plan says.

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use atomic_file::{AtomicGroup, AtomicWriter};
use dirty_bitmap::{DirtyBitmap, TakenBitmap};
use guests::guest::{Dirty, Epoch, Tracker};
use memory_writer::MemoryWriter;
use test_machine::{ReadOnlyBind, TinyTmpfs};

use super::chain::{Images, Saved};
use super::child::{self, Order};
use super::plan::{Flaky, InjectedFault, Kind, ON_PURPOSE, Plan};
use super::saved_guest::SavedGuest;
use super::settings::{Mutant, Settings};
use super::shadow::{Difference, PageViolation, Shadow};
use super::shape::Shape;

/// What a tmpfs has room for that a save is to fill.
const TINY: u64 = 96 << 10;

/// Where the files of a guest lie.
pub(super) struct Room {
    pub dir: PathBuf,
    pub tiny: Option<TinyTmpfs>,
}

impl Room {
    pub(super) fn new(dir: PathBuf, root: bool) -> anyhow::Result<Self> {
        fs::create_dir(&dir).with_context(|| format!("can't make {}", dir.display()))?;
        let tiny = root.then(|| TinyTmpfs::new(TINY)).transpose()?;
        Ok(Self { dir, tiny })
    }

    /// Where the directory is while another one is in its place.
    fn away(&self) -> PathBuf {
        self.dir.with_extension("away")
    }
}

/// A save of one guest.
pub(super) struct Save<'a> {
    pub settings: &'a Settings,
    pub shape: &'a Shape,
    pub room: &'a Room,
    pub images: &'a Images,
    /// The RAM at the last save.
    pub shadow: Option<&'a Shadow>,
    pub plan: &'a Plan,
    /// Of the files, without the extension.
    pub name: String,
}

/// A save that has begun.
struct Begun {
    epoch: Epoch,
    /// The pages that it writes: those of the epoch, unless a mark is dropped on purpose.
    pages: DirtyBitmap,
}

/// What came of it.
pub(super) struct Done {
    pub saved: Saved,
    pub shadow: Shadow,
}

impl Save<'_> {
    /// The image that there is now, or why there is none.
    pub(super) fn carry_out(&self, subject: &mut dyn SavedGuest) -> anyhow::Result<Done> {
        let bind = (self.plan.fault == Some(InjectedFault::ReadOnly))
            .then(|| ReadOnlyBind::of(&self.room.dir))
            .transpose()?;
        let dir = match (self.plan.fault, &self.room.tiny, &bind) {
            (Some(InjectedFault::NoSpace), Some(tiny), _) => tiny.path(),
            (_, _, Some(bind)) => bind.path(),
            _ => &self.room.dir,
        };
        let dest = dir.join(format!("{}.mem", self.name));
        let attempt = || match self.plan.fault {
            Some(InjectedFault::Killed) => self.by_another_process(subject, &dest),
            _ => self.by_this_process(subject, &dest),
        };
        let done = catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| {
            match panic.downcast_ref() {
                Some(&ON_PURPOSE) => Err(anyhow!("a panic {ON_PURPOSE}")),
                _ => resume_unwind(panic),
            }
        });
        self.clear_the_way(&dest)?;
        done
    }

    fn by_this_process(&self, subject: &mut dyn SavedGuest, dest: &Path) -> anyhow::Result<Done> {
        let plan = self.plan;
        let (size, ram, tracker) = (self.shape.ram(), subject.ram(), subject.tracker());
        let reader = Flaky::new(&ram, plan.fault);
        let parent = self.images.newest().and_then(|newest| newest.id);
        let options = plan.options(&self.shape.regions, parent);
        let mut writer = options.open(dest, size, plan.page)?;
        let id = writer.image_id();

        let begin = |writer: &mut MemoryWriter| {
            let begun = self.begin(&*tracker)?;
            match plan.kind {
                Kind::Full => writer.write_full(&reader)?,
                Kind::Diff => drop(writer.write_diff(&reader, &begun.pages)?),
            }
            anyhow::Ok(begun)
        };
        let write_more = |writer: &mut MemoryWriter, begun: &mut Begun| {
            let more = tracker.extend(&mut begun.epoch)?;
            writer.write_diff(&reader, more)?;
            add(&begun.pages, more)
        };
        let Begun { epoch, pages } = if plan.passes == 0 {
            begin(&mut writer)?
        } else {
            let mut begun = None;
            subject.run(&mut || {
                let rebuilding = || rebuild(tracker.dirty(), &plan.granules);
                thread::scope(|scope| {
                    let rebuilding = scope.spawn(rebuilding);
                    let begun = begun.insert(begin(&mut writer)?);
                    for _ in 1..plan.passes {
                        write_more(&mut writer, begun)?;
                    }
                    rebuilding
                        .join()
                        .unwrap_or_else(|panic| resume_unwind(panic))
                })
            })?;
            let mut begun = begun.context("the save has begun")?;
            write_more(&mut writer, &mut begun)?;
            begun
        };

        let shadow = Shadow::take(&ram, size)?;
        if let Some(saved) = self.shadow {
            shadow.check_marks(saved, &pages)?;
        }
        if plan.fault == Some(InjectedFault::NotCommitted) {
            if self.settings.mutant == Some(Mutant::ReleasedEarly) {
                epoch.release()?;
            }
            bail!("not committed, {ON_PURPOSE}");
        }
        let pages = pages.runs().collect();
        if id.is_some() {
            writer.set_metadata(self.name.as_bytes())?;
        }
        let state = self.state(dest)?;
        let (state, both) = state.unzip();
        self.get_in_the_way(dest)?;
        let mut committing = Some((writer, state));
        let mut commit = || match committing.take() {
            Some((writer, Some(state))) => commit_both(writer, state),
            Some((writer, None)) => Ok(writer.commit()?),
            None => Ok(()),
        };
        if plan.commits_live {
            subject.run(&mut commit)?;
        } else {
            commit()?;
        }
        if plan.fault != Some(InjectedFault::NotReleased) {
            epoch.release()?;
        }
        let saved = Saved {
            path: dest.to_owned(),
            page: plan.page,
            pages,
            id,
            state: both,
        };
        Ok(Done { saved, shadow })
    }

    /// Another process saves, and is killed before anybody hears that it has committed: the marks
    /// are never released.
    fn by_another_process(
        &self,
        subject: &mut dyn SavedGuest,
        dest: &Path,
    ) -> anyhow::Result<Done> {
        let (size, ram, tracker) = (self.shape.ram(), subject.ram(), subject.tracker());
        let Begun { epoch, pages } = self.begin(&*tracker)?;
        let shadow = Shadow::take(&ram, size)?;
        if let Some(saved) = self.shadow {
            shadow.check_marks(saved, &pages)?;
        }
        let (dir, newest) = (&self.room.dir, self.images.newest());
        let (copy, file) = (dir.join("ram"), dir.join("order"));
        fs::write(&copy, shadow.bytes())?;
        let order = Order {
            ram: copy.clone(),
            size,
            page: self.plan.page,
            dirty: pages.runs().collect(),
            regions: self.shape.regions.clone(),
            parent: newest.and_then(|newest| newest.id).map(|id| id.to_bytes()),
            dest: dest.to_owned(),
            state: dest.with_extension("state"),
            says: self.name.clone(),
            sealed: self.plan.commits_live,
        };
        let program = self.settings.program.as_deref();
        let program = program.context("there is a program to run")?;
        let after = self.plan.runs;
        child::save_and_kill(program, &order, &file, after, &self.settings.interrupt)?;
        drop(epoch);
        for file in [copy, file] {
            fs::remove_file(file)?;
        }
        atomic_file::recover(dir)?;
        let there = [dest, &order.state].map(Path::exists);
        match there {
            [false, false] => bail!("killed, {ON_PURPOSE}"),
            [true, true] => {}
            _ => {
                let half = Difference {
                    at: 0,
                    what: PageViolation::Torn,
                };
                return Err(anyhow::Error::from(half).context("of two files, one was committed"));
            }
        }
        let id = match self.plan.commits_live {
            true => memory_image::Image::open(dest)?.id(),
            false => None,
        };
        let saved = Saved {
            path: dest.to_owned(),
            page: self.plan.page,
            pages: order.dirty,
            id,
            state: Some((order.state, order.says)),
        };
        Ok(Done { saved, shadow })
    }

    fn begin(&self, tracker: &dyn Tracker) -> anyhow::Result<Begun> {
        let epoch = tracker.begin()?;
        let taken = epoch.bitmap();
        let pages = DirtyBitmap::new(taken.ram_start(), taken.ram_size(), taken.granule())?;
        add(&pages, taken)?;
        if self.settings.mutant == Some(Mutant::MarkDropped) {
            drop_a_mark(&pages)?;
        }
        Ok(Begun { epoch, pages })
    }

    /// The file that is committed with the image, its path, and what is in there.
    fn state(&self, dest: &Path) -> anyhow::Result<Option<(AtomicWriter, (PathBuf, String))>> {
        // A member of a group may replace what is there.
        if !self.plan.grouped || self.plan.fault == Some(InjectedFault::Appeared) {
            return Ok(None);
        }
        let (path, says) = (dest.with_extension("state"), format!("{:?}", self.plan));
        let mut state = AtomicWriter::open(&path)?;
        state.write_all(says.as_bytes())?;
        Ok(Some((state, (path, says))))
    }

    /// What befalls the destination between the open and the commit.
    fn get_in_the_way(&self, dest: &Path) -> anyhow::Result<()> {
        match self.plan.fault {
            Some(InjectedFault::Occupied) => fs::create_dir(dest)?,
            Some(InjectedFault::Appeared) => fs::write(dest, ON_PURPOSE)?,
            Some(InjectedFault::DirectoryMoved) => {
                fs::rename(&self.room.dir, self.room.away())?;
                fs::create_dir(&self.room.dir)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes away what got in the way, which must be as it was.
    fn clear_the_way(&self, dest: &Path) -> anyhow::Result<()> {
        match self.plan.fault {
            Some(InjectedFault::Occupied) if dest.is_dir() => fs::remove_dir(dest)?,
            Some(InjectedFault::Appeared) if dest.exists() => {
                let found = fs::read(dest)?;
                ensure!(
                    found == ON_PURPOSE.as_bytes(),
                    "a file that appeared at the destination was replaced"
                );
                fs::remove_file(dest)?;
            }
            Some(InjectedFault::DirectoryMoved) if self.room.away().exists() => {
                // It must be empty.
                fs::remove_dir(&self.room.dir)?;
                fs::rename(self.room.away(), &self.room.dir)?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn commit_both(writer: MemoryWriter, state: AtomicWriter) -> anyhow::Result<()> {
    let mut group = AtomicGroup::new();
    group.add(writer.finish()?)?;
    group.add(state)?;
    Ok(group.commit()?)
}

/// Has the bitmap go over to each of `granules`, at short intervals.
pub(super) fn rebuild(bitmap: Dirty<'_>, granules: &[u64]) -> anyhow::Result<()> {
    for granule in granules {
        thread::sleep(Duration::from_micros(300));
        bitmap.rebuild(*granule)?;
    }
    Ok(())
}

/// Marks in `pages` what is marked in `more`.
fn add(pages: &DirtyBitmap, more: &TakenBitmap) -> anyhow::Result<()> {
    for run in more.runs() {
        pages.mark_range(pages.ram_start() + run.start, run.end - run.start)?;
    }
    Ok(())
}

/// Takes the first page's mark out.
fn drop_a_mark(marks: &DirtyBitmap) -> anyhow::Result<()> {
    let all = marks.drain()?;
    let mut first = marks.granule();
    for run in all.runs() {
        let start = run.start + std::mem::take(&mut first);
        if start < run.end {
            marks.mark_range(start, run.end - start)?;
        }
    }
    Ok(())
}
