//! The life of one guest: it runs, it is saved, things go wrong, and all that was saved is there.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use image_format::Placement;
use random::Random;

use super::chain::{Expected, Images, Saved, names};
use super::plan::{Kind, Plan};
use super::save::{Done, Room, Save, rebuild};
use super::saved_guest::SavedGuest;
use super::settings::{Mutant, Settings};
use super::shadow::Shadow;
use super::shape::Shape;

/// Rounds of one guest, before another one takes its place.
const ROUNDS: u64 = 48;

/// When guests are done: at a time, or after so many rounds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limit {
    Until(Instant),
    Rounds(u64),
}

impl Limit {
    pub(super) fn is_over(self, rounds: u64) -> bool {
        match self {
            Self::Until(end) => Instant::now() >= end,
            Self::Rounds(all) => rounds >= all,
        }
    }
}

/// Images of one guest, before they are made one.
pub(super) const LONGEST: usize = 8;

pub(super) struct Life<'s> {
    settings: &'s Settings,
    shape: Shape,
    // Before the room, so that nothing of it is still in use there.
    subject: Box<dyn SavedGuest>,
    room: Room,
    images: Images,
    /// The RAM at the last save, and at the one before.
    shadow: Option<Shadow>,
    older: Option<Shadow>,
}

impl<'s> Life<'s> {
    /// Lives guest number `guest`'s life number `life`, until it ends or the limit is reached, and
    /// counts its `rounds`.
    pub(super) fn live(
        settings: &'s Settings,
        guest: u64,
        life: u64,
        limit: Limit,
        rounds: &mut u64,
    ) -> anyhow::Result<()> {
        let random = &mut settings.random(&[guest, life]);
        let kind = settings.kinds[(guest % settings.kinds.len() as u64) as usize];
        let shape = Shape::choose(kind, random);
        let named = || {
            let seed = settings.seed;
            format!("{shape}; repeat with: cargo xtask soak --seed {seed} --only {guest}.{life}")
        };
        let dir = settings.dir.join(format!("guest-{guest}.{life}"));
        let born = || {
            let subject = shape.create(random.below(u64::MAX))?;
            let room = Room::new(dir.clone(), settings.means.root)?;
            anyhow::Ok(Self {
                settings,
                shape: shape.clone(),
                subject,
                room,
                images: Images::default(),
                shadow: None,
                older: None,
            })
        };
        let mut this = { born }().with_context(named)?;
        for round in 0..ROUNDS {
            let enough = limit.is_over(*rounds) || settings.tally.found();
            if enough || settings.interrupt.check().is_err() {
                break;
            }
            let random = &mut settings.random(&[guest, life, round]);
            this.round(round, random)
                .with_context(|| format!("round {round}"))
                .with_context(named)?;
            settings.tally.rounds.fetch_add(1, Ordering::Relaxed);
            *rounds += 1;
        }
        let fault = this.subject.fault().with_context(named)?;
        if let Some(fault) = fault {
            bail!("{}: {fault}", named());
        }
        if settings.mutant == Some(Mutant::FileKept) {
            std::mem::forget(File::open(&this.room.dir)?);
        }
        Ok(fs::remove_dir_all(&this.room.dir)?)
    }

    fn round(&mut self, round: u64, random: &mut Random) -> anyhow::Result<()> {
        let first = self.images.0.is_empty();
        let plan = Plan::choose(random, self.shape.ram(), first, self.settings.means);
        self.round_of(&plan, round, random)
            .with_context(|| format!("{plan:?}"))
    }

    fn round_of(&mut self, plan: &Plan, round: u64, random: &mut Random) -> anyhow::Result<()> {
        self.run(plan)?;
        let failed = !self.save(plan, round.to_string())?;
        self.look_around(plan, random)?;
        if failed {
            if random.below(2) == 0 {
                self.run(plan)?;
            }
            let again = plan.again(self.images.0.is_empty());
            ensure!(self.save(&again, format!("{round}-again"))?, "it is saved");
            self.look_around(&again, random)?;
        }
        if self.images.0.len() >= LONGEST {
            self.cut(plan, round, random)?;
            self.look_around(plan, random)?;
        }
        Ok(())
    }

    fn run(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let tracker = self.subject.tracker();
        self.subject.run(&mut || {
            std::thread::sleep(plan.runs);
            rebuild(tracker.dirty(), &plan.granules)
        })
    }

    /// Saves; false where that failed as it was to.
    fn save(&mut self, plan: &Plan, name: String) -> anyhow::Result<bool> {
        let replaces = plan.recycle && plan.fault.is_none_or(|fault| !fault.wants_new_name());
        let save = Save {
            settings: self.settings,
            shape: &self.shape,
            room: &self.room,
            images: &self.images,
            shadow: self.shadow.as_ref(),
            plan,
            name: if replaces { "full".into() } else { name },
        };
        let done = save.carry_out(&mut *self.subject);
        if let Some(fault) = plan.fault {
            self.settings.tally.faults.add(fault.name());
        }
        match (done, plan.fault) {
            (Ok(done), _) => self.keep(done, plan.kind)?,
            (Err(error), Some(fault)) if fault.explains(&error) => return Ok(false),
            (Err(error), _) => return Err(error),
        }
        self.settings.tally.saves.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    fn keep(&mut self, done: Done, kind: Kind) -> anyhow::Result<()> {
        let Done { saved, shadow } = done;
        if self.settings.mutant == Some(Mutant::PageFlipped) {
            flip(&saved)?;
        }
        let mut images = match kind {
            Kind::Full => Vec::new(),
            Kind::Diff => self.images.0.clone(),
        };
        images.push(saved);
        self.images.remove_but(images)?;
        self.older = self.shadow.replace(shadow);
        Ok(())
    }

    /// Whether everything saved is there, and nothing else.
    fn look_around(&mut self, plan: &Plan, random: &mut Random) -> anyhow::Result<()> {
        for dir in [Some(self.room.dir.as_path()), self.tiny()]
            .into_iter()
            .flatten()
        {
            for path in names(dir)? {
                let spare = path
                    .extension()
                    .is_some_and(|extension| extension == "spare");
                let known = spare || self.images.files().any(|file| file == path);
                ensure!(known, "left behind: {}", path.display());
            }
        }
        let Some(now) = &self.shadow else {
            return Ok(());
        };
        self.images.verify(random.below(4) == 0)?;
        let expected = Expected {
            now,
            before: self.older.as_ref(),
        };
        let scratch = self.room.dir.join("scratch");
        let way = self.images.compare(&expected, random, plan, &scratch)?;
        self.settings.tally.restores.add(way);
        self.settings.tally.compared(self.shape.ram());
        Ok(())
    }

    fn tiny(&self) -> Option<&Path> {
        self.room.tiny.as_ref().map(|tiny| tiny.path())
    }

    /// Makes all images one, which may replace the oldest.
    fn cut(&mut self, plan: &Plan, round: u64, random: &mut Random) -> anyhow::Result<()> {
        let chain = self.images.open()?;
        let regions = &self.shape.regions;
        let seal = chain.seal().regions(regions.iter().cloned());
        let path = match random.below(2) {
            0 => self.images.0[0].path.clone(),
            _ => self.room.dir.join(format!("merged-{round}.mem")),
        };
        // The tmpfs has no room for it.
        let path = match self.tiny() {
            Some(tiny) if path.starts_with(tiny) => self.room.dir.join("merged.mem"),
            _ => path,
        };
        chain.merge(plan.sealed(seal), &path)?;
        let id = plan.open(&path)?.id();
        let merged = Saved {
            path,
            page: chain.page_size(),
            pages: Vec::new(),
            id,
            state: None,
        };
        drop(chain);
        self.images.remove_but(vec![merged])
    }
}

/// Changes a byte of the first page of an image.
fn flip(saved: &Saved) -> anyhow::Result<()> {
    let file = File::options().read(true).write(true).open(&saved.path)?;
    let image = saved.open()?;
    let first = saved.pages.first().map_or(0, |run| run.start);
    let start = image.footer().map_or(0, |footer| footer.data_start());
    let at = match image.layout().placement() {
        Placement::ByOffset => start + first / saved.page * saved.page,
        Placement::Appended => start,
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[!byte[0]], at)?)
}
