//! The life of a guest of which live snapshots are taken: threads of this process write its RAM
//! before, during and after each snapshot.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};

use anyhow::{Context, anyhow, ensure};
use guest_ram::GuestRam;
use live_snapshot::{
    CancelToken, LiveError, LiveSnapshot, LiveSnapshotOptions, Method, UffdTracker, WhenPoolFull,
};
use memory_image::Chain;
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use page_reader::RamLayout;
use random::Random;
use test_machine::Need;

use super::guest_loop::Limit;
use super::settings::{Mutant, Settings};
use super::shadow::Shadow;

const PAGE: u64 = 4096;

/// Rounds of one guest, before another one takes its place.
const ROUNDS: u64 = 32;

/// The longest chain, after which the next image is a full one.
const LONGEST: usize = 6;

/// Returns whether live snapshots are taken of guest number `guest`: of every fourth.
pub(super) fn is_live(guest: u64) -> bool {
    guest % 4 == 3 && Need::Userfaultfd.is_met()
}

/// A guest whose vCPUs are threads.
struct Vcpus {
    /// Held for reading while a vCPU runs, and for writing in a pause.
    running: RwLock<()>,
    stop: AtomicBool,
    writes: AtomicU64,
}

struct LiveGuest<'s> {
    settings: &'s Settings,
    ram: Arc<GuestRam>,
    tracker: Arc<UffdTracker>,
    vcpus: Arc<Vcpus>,
    threads: Vec<JoinHandle<()>>,
    dir: PathBuf,
    layout: Layout,
    images: Vec<PathBuf>,
    newest: Option<ImageId>,
}

/// Lives guest number `guest`'s life number `life`, until it ends or the limit is reached, and
/// counts its `rounds`.
pub(super) fn live(
    settings: &Settings,
    guest: u64,
    life: u64,
    limit: Limit,
    rounds: &mut u64,
) -> anyhow::Result<()> {
    let named = || {
        let seed = settings.seed;
        format!("live snapshots; repeat with: cargo xtask soak --seed {seed} --only {guest}.{life}")
    };
    let random = &mut settings.random(&[guest, life]);
    let dir = settings.dir.join(format!("guest-{guest}.{life}"));
    let mut this = LiveGuest::start(settings, dir, random).with_context(named)?;
    for round in 0..ROUNDS {
        let enough = limit.is_over(*rounds) || settings.tally.found();
        if enough || settings.interrupt.check().is_err() {
            break;
        }
        let random = &mut settings.random(&[guest, life, round]);
        let done = this.round(round, random);
        done.with_context(|| format!("round {round}"))
            .with_context(named)?;
        settings.tally.rounds.fetch_add(1, Ordering::Relaxed);
        *rounds += 1;
    }
    Ok(fs::remove_dir_all(&this.dir)?)
}

impl<'s> LiveGuest<'s> {
    fn start(settings: &'s Settings, dir: PathBuf, random: &mut Random) -> anyhow::Result<Self> {
        fs::create_dir_all(&dir)?;
        let size = (1 + random.below(12)) << 20;
        let ram: Arc<GuestRam> = Arc::new(GuestRam::new(RamLayout::single(1 << 30, size)?)?);
        let tracker = Arc::new(UffdTracker::start(&ram)?);
        let vcpus = Arc::new(Vcpus {
            running: RwLock::new(()),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        });
        // Part of the RAM is never written.
        let used = PAGE * (1 + random.below(size / PAGE));
        let mut this = Self {
            settings,
            ram,
            tracker,
            vcpus,
            threads: Vec::new(),
            dir,
            layout: [Layout::Raw, Layout::Sealed, Layout::Packed][random.below(3) as usize],
            images: Vec::new(),
            newest: None,
        };
        for _ in 0..1 + random.below(3) {
            let random = Random::seeded(random.number());
            let (ram, vcpus) = (Arc::clone(&this.ram), Arc::clone(&this.vcpus));
            let thread = thread::spawn(move || run(&ram, &vcpus, used, random));
            this.threads.push(thread);
        }
        Ok(this)
    }

    fn round(&mut self, round: u64, random: &mut Random) -> anyhow::Result<()> {
        // A raw diff of which all pages are dirty is refused.
        let diffs = self.layout != Layout::Raw && !self.images.is_empty();
        let diff = diffs && self.images.len() < LONGEST && random.below(4) > 0;
        let method = Method::ALL[random.below(Method::ALL.len() as u64) as usize];
        let when_pool_full = match random.below(6) {
            0 => WhenPoolFull::Cancel,
            1 => WhenPoolFull::Throttle,
            _ => WhenPoolFull::Wait,
        };
        let cancel = CancelToken::new();
        let mut options = LiveSnapshot::options()
            .method(method)
            .diff(diff)
            .when_pool_full(when_pool_full)
            .pool(PAGE * (2 << random.below(12)))
            .remainder(PAGE << random.below(10))
            .cancel(cancel.clone());
        if random.below(8) == 0 {
            options = options.rate_limit(4 << 20 << random.below(6));
        }
        // A third of the snapshots is cancelled somewhere.
        let cancelled_at = (random.below(3) == 0).then(|| random.below(12));
        let path = self.dir.join(format!("{round}.mem"));
        let plan = format!(
            "{options:?} of {:?}, cancelled at {cancelled_at:?}",
            self.layout
        );
        let taken = self.take(&path, &options, diff, cancelled_at, &cancel);
        let may_fail = cancelled_at.is_some() || when_pool_full == WhenPoolFull::Cancel;
        match taken.with_context(|| plan.clone())? {
            Some((id, shadow)) => {
                self.settings.tally.saves.fetch_add(1, Ordering::Relaxed);
                self.newest = id;
                if !diff {
                    self.images.clear();
                }
                self.images.push(path);
                self.compare(&shadow).with_context(|| plan)
            }
            None => {
                ensure!(may_fail, "it failed without a fault: {plan}");
                self.settings.tally.faults.add("live snapshot cancelled");
                ensure!(!path.exists(), "a cancelled snapshot was committed: {plan}");
                let left = fs::read_dir(&self.dir)?.count();
                ensure!(left <= round as usize, "a staged file is left: {plan}");
                Ok(())
            }
        }
    }

    /// Takes a snapshot. Returns its id and the RAM in the pause, or `None` if it was cancelled.
    fn take(
        &self,
        path: &Path,
        options: &LiveSnapshotOptions,
        diff: bool,
        cancelled_at: Option<u64>,
        cancel: &CancelToken,
    ) -> anyhow::Result<Option<(Option<ImageId>, Shadow)>> {
        let seal = match (diff, self.newest) {
            (true, Some(parent)) => Seal::new().parent(parent),
            _ => Seal::new(),
        };
        let mut reports = 0;
        let token = cancel.clone();
        let writer = MemoryWriter::options()
            .layout(self.layout)
            .seal(seal)
            .progress(move |_| {
                reports += 1;
                // Later than the first cancellations, which are between the steps.
                if cancelled_at == Some(reports + 2) {
                    token.cancel();
                }
                ControlFlow::Continue(())
            })
            .open(path, self.ram.layout().ram_size(), PAGE)?;
        let id = writer.image_id();
        let live = match options.begin(&self.tracker, writer) {
            Ok(live) => live,
            Err(error) => return cancelled(error),
        };
        if cancelled_at == Some(0) {
            return Ok(None);
        }
        let (frozen, shadow) = {
            let _paused = self.vcpus.running.write();
            let shadow = self.copy()?;
            (live.freeze(), shadow)
        };
        let frozen = match frozen {
            Ok(frozen) => frozen,
            Err(error) => return cancelled(error),
        };
        if cancelled_at == Some(1) {
            return Ok(None);
        }
        let (written, late) = thread::scope(|scope| {
            let written = scope.spawn(|| frozen.write());
            // The pool may be full before the write begins, and these writes wait for it.
            self.wait_for_writes(200);
            let late = self.copy();
            (written.join(), late)
        });
        let shadow = match self.settings.mutant {
            // A copy that is taken too late must differ.
            Some(Mutant::LateCopy) => late?,
            _ => shadow,
        };
        let written = match written.map_err(|_| anyhow!("the write panicked"))? {
            Ok(written) => written,
            Err(error) => return cancelled(error),
        };
        if cancelled_at == Some(2) {
            return Ok(None);
        }
        self.wait_for_writes(50);
        written.commit()?;
        Ok(Some((id, shadow)))
    }

    /// Waits until the vCPUs have made this many more writes.
    fn wait_for_writes(&self, count: u64) {
        let end = self.vcpus.writes.load(Ordering::Relaxed) + count;
        while self.vcpus.writes.load(Ordering::Relaxed) < end {
            thread::yield_now();
        }
    }

    fn copy(&self) -> anyhow::Result<Shadow> {
        Shadow::take(&*self.ram, self.ram.layout().ram_size())
    }

    /// Compares the chain with the RAM in the pause.
    fn compare(&self, shadow: &Shadow) -> anyhow::Result<()> {
        let (first, diffs) = self.images.split_first().context("a chain has an image")?;
        let mut chain = match self.layout {
            Layout::Raw => Chain::open_raw(first, PAGE)?,
            Layout::Sealed | Layout::Packed => Chain::open(first, PAGE)?,
        };
        for diff in diffs {
            chain.push(diff)?;
        }
        if self.layout != Layout::Raw {
            chain.verify(&mut |_| ControlFlow::Continue(()))?;
        }
        self.settings.tally.restores.add("read from a live chain");
        self.settings.tally.compared(self.ram.layout().ram_size());
        shadow.compare(&chain, None)
    }
}

/// Returns that a snapshot was cancelled, or the error if it failed in another way.
fn cancelled<T>(error: LiveError) -> anyhow::Result<Option<T>> {
    match error {
        LiveError::Cancelled | LiveError::PoolFull => Ok(None),
        error => Err(error.into()),
    }
}

impl Drop for LiveGuest<'_> {
    fn drop(&mut self) {
        self.vcpus.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Writes words at random, and runs of pages, to the first `used` bytes.
fn run(ram: &GuestRam, vcpus: &Vcpus, used: u64, mut random: Random) {
    while !vcpus.stop.load(Ordering::SeqCst) {
        let _running = vcpus.running.read();
        let sequential = random.below(4) == 0;
        let mut offset = random.below(used / 8) * 8;
        for _ in 0..16 {
            let word = random.number().to_ne_bytes();
            ram.write_at(offset, &word).expect("it is RAM");
            vcpus.writes.fetch_add(1, Ordering::Relaxed);
            offset = match sequential {
                true if offset + PAGE + 8 <= used => offset + PAGE,
                _ => random.below(used / 8) * 8,
            };
        }
    }
}
