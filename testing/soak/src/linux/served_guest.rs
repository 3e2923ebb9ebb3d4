//! The life of a VMM in another process, whose RAM a page server fills from a chain: it touches and
//! discards memory with several threads, its working set is recorded and prefetched, and it dies.

use std::fs;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Context, anyhow, ensure};
use lazy_restore::{OnFailure, PageServer, PageServerOptions, VmEnd, WorkingSet};
use memory_image::{Chain, VerifiedChain};
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use nix::sys::signal::Signal;
use page_client::{Client, Memory};
use random::Random;
use test_machine::Need;

use super::guest_loop::Limit;
use super::settings::{Mutant, Settings};
use super::shadow::Shadow;

const PAGE: u64 = 4096;

/// Rounds of one chain, before another one takes its place.
const ROUNDS: u64 = 16;

/// Returns whether guest number `guest` is a VMM of another process: every eighth.
pub(super) fn is_served(guest: u64) -> bool {
    guest % 8 == 5 && Need::Userfaultfd.is_met()
}

/// A chain, and the RAM that it stores.
struct ServedGuest<'s> {
    settings: &'s Settings,
    dir: PathBuf,
    /// The images with the pages of each diff: holes of a raw diff do not say it everywhere.
    images: Vec<(PathBuf, Layout, Vec<Range<u64>>)>,
    newest: Option<ImageId>,
    ram: Vec<u8>,
    /// The RAM before the newest diff.
    older: Vec<u8>,
    recorded: Option<WorkingSet>,
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
        format!("served RAM; repeat with: cargo xtask soak --seed {seed} --only {guest}.{life}")
    };
    let random = &mut settings.random(&[guest, life]);
    let dir = settings.dir.join(format!("guest-{guest}.{life}"));
    let mut this = ServedGuest::new(settings, dir, random).with_context(named)?;
    for round in 0..ROUNDS {
        let enough = limit.is_over(*rounds) || settings.tally.found();
        if enough || settings.interrupt.check().is_err() {
            break;
        }
        let random = &mut settings.random(&[guest, life, round]);
        let done = this.round(random);
        done.with_context(|| format!("round {round}"))
            .with_context(named)?;
        settings.tally.rounds.fetch_add(1, Ordering::Relaxed);
        *rounds += 1;
    }
    Ok(fs::remove_dir_all(&this.dir)?)
}

impl<'s> ServedGuest<'s> {
    /// Writes a full image and diffs.
    fn new(settings: &'s Settings, dir: PathBuf, random: &mut Random) -> anyhow::Result<Self> {
        fs::create_dir_all(&dir)?;
        let size = PAGE * (16 + random.below(768));
        let mut this = Self {
            settings,
            dir,
            images: Vec::new(),
            newest: None,
            ram: vec![0; size as usize],
            older: Vec::new(),
            recorded: None,
        };
        let layouts = [Layout::Raw, Layout::Sealed, Layout::Packed];
        let mut layout = layouts[random.below(3) as usize];
        this.write(0..size / PAGE, random);
        this.save(layout, None)?;
        for _ in 0..1 + random.below(3) {
            this.older = this.ram.clone();
            let first = random.below(size / PAGE);
            let pages = first..first + 1 + random.below(size / PAGE - first);
            this.write(pages.clone(), random);
            // A raw image has no id, so only raw ones follow.
            if layout != Layout::Raw {
                layout = layouts[random.below(3) as usize];
            }
            this.save(layout, Some(pages.start * PAGE..pages.end * PAGE))?;
        }
        Ok(this)
    }

    /// Writes pages of the RAM. Every fourth becomes zeros.
    fn write(&mut self, pages: Range<u64>, random: &mut Random) {
        for page in pages {
            let bytes = &mut self.ram[(page * PAGE) as usize..][..PAGE as usize];
            match random.below(4) {
                0 => bytes.fill(0),
                _ => {
                    let (words, _) = bytes.as_chunks_mut::<8>();
                    words
                        .iter_mut()
                        .for_each(|word| *word = random.number().to_ne_bytes());
                }
            }
        }
    }

    fn save(&mut self, layout: Layout, diff: Option<Range<u64>>) -> anyhow::Result<()> {
        let path = self.dir.join(format!("{}.mem", self.images.len()));
        let size = self.ram.len() as u64;
        let seal = match (&diff, self.newest) {
            (Some(_), Some(parent)) => Seal::new().parent(parent),
            _ => Seal::new(),
        };
        let mut writer = MemoryWriter::options()
            .layout(layout)
            .seal(seal)
            .allow_ambiguous_diff(true)
            .open(&path, size, PAGE)?;
        let id = writer.image_id();
        match &diff {
            None => writer.write_full(self.ram.as_slice())?,
            Some(pages) => {
                let dirty = dirty_bitmap::DirtyBitmap::new(0, size, PAGE)?;
                dirty.mark_range(pages.start, pages.end - pages.start)?;
                writer.write_diff(self.ram.as_slice(), &dirty)?;
            }
        };
        writer.commit()?;
        self.settings.tally.saves.fetch_add(1, Ordering::Relaxed);
        self.newest = id.or(self.newest);
        self.images.push((path, layout, diff.into_iter().collect()));
        Ok(())
    }

    fn chain(&self) -> anyhow::Result<Chain> {
        let mut images = &self.images[..];
        if self.settings.mutant == Some(Mutant::LayerMissing) {
            images = &images[..images.len() - 1];
        }
        let ((base, layout, _), diffs) = images.split_first().context("a chain has an image")?;
        let mut chain = match layout {
            Layout::Raw => Chain::open_raw(base, PAGE)?,
            Layout::Sealed | Layout::Packed => Chain::open(base, PAGE)?,
        };
        for (path, layout, pages) in diffs {
            match layout {
                Layout::Raw => chain.push_pages(path, pages.iter().cloned())?,
                Layout::Sealed | Layout::Packed => chain.push(path)?,
            }
        }
        Ok(chain)
    }

    /// Returns options, and whether the touched pages are recorded.
    fn options(&self, random: &mut Random) -> (PageServerOptions, bool) {
        let record = random.below(4) == 0;
        let mut options = PageServer::options()
            .prefetch(random.below(2) == 0)
            .record(record)
            .handlers(1 + random.below(4) as usize)
            .fault_around(PAGE << random.below(6))
            .on_failure(match random.below(2) {
                0 => OnFailure::Kill,
                _ => OnFailure::Notify,
            });
        if let Some(set) = self.recorded.as_ref().filter(|_| !record) {
            options = options.working_set(set.clone());
        }
        (options, record)
    }

    /// Serves one to three VMMs from the chain.
    fn round(&mut self, random: &mut Random) -> anyhow::Result<()> {
        let (options, record) = self.options(random);
        let server = options.source(VerifiedChain::new(self.chain()?))?;
        let socket = self.dir.join("pages.sock");
        let listener = UnixListener::bind(&socket)?;
        for _ in 0..1 + random.below(3) {
            self.serve(&server, &listener, record, random)
                .with_context(|| format!("{options:?}"))?;
        }
        let metrics = server.metrics();
        ensure!(metrics.vms == 0, "{metrics:?}");
        ensure!(
            metrics.failed_vms + metrics.refused_clients == 0,
            "{metrics:?}"
        );
        Ok(fs::remove_file(socket)?)
    }

    fn serve(
        &mut self,
        server: &PageServer,
        listener: &UnixListener,
        record: bool,
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let size = self.ram.len() as u64;
        let mut client = Client::spawn("");
        // Two regions.
        let first = PAGE * (1 + random.below(size / PAGE - 1));
        client.map(&Memory::private([first, size - first]));
        client.connect(&self.dir.join("pages.sock"));
        let vm = server.serve(listener.accept()?.0)?;
        let mut expected = self.ram.clone();
        let removed: Vec<_> = (0..random.below(4))
            .map(|_| {
                let page = random.below(size / PAGE);
                let pages = 1 + random.below((size / PAGE - page).min(40));
                page * PAGE..(page + pages) * PAGE
            })
            .collect();
        for range in &removed {
            expected[range.start as usize..range.end as usize].fill(0);
        }
        let (threads, seed) = (1 + random.below(4), random.number());
        let tally = &self.settings.tally;
        if random.below(4) == 0 {
            client.begin_churn(threads, seed, &removed);
            let faults = random.below(size / PAGE / 8);
            while vm.faults() < faults && vm.progress().done < vm.progress().total / 2 {
                std::thread::yield_now();
            }
            client.signal(Signal::SIGKILL);
            let end = vm.wait();
            ensure!(matches!(end, VmEnd::Exited | VmEnd::Filled), "{end:?}");
            tally.faults.add("VMM killed");
            return Ok(());
        }
        // It panics if the server has killed the process.
        let churn = AssertUnwindSafe(|| client.churn(threads, seed, &removed));
        let read = std::panic::catch_unwind(churn)
            .map_err(|_| anyhow!("the VMM has ended: {:?}", vm.wait()))?
            .with_context(|| format!("{:?}", vm.error()))?;
        self.compare(&expected, &read)?;
        if record {
            let path = self.dir.join("working.set");
            let recorded = vm.recorded().context("it is recorded")?;
            recorded.save(&path)?;
            self.recorded = Some(WorkingSet::load(&path)?);
            fs::remove_file(path)?;
        }
        // Discarded while its other pages are filled.
        let complete = random.below(4) > 0;
        let last = size - PAGE;
        std::thread::scope(|scope| {
            if complete {
                scope.spawn(|| vm.complete());
            }
            client.remove(last, PAGE);
        });
        expected[last as usize..].fill(0);
        if complete {
            let end = vm.wait();
            ensure!(matches!(end, VmEnd::Filled), "{end:?}");
            drop(vm);
            client.close_descriptor();
        }
        self.compare(&expected, &client.read(0, size)?)?;
        tally.restores.add("served to another process");
        tally.compared(size);
        Ok(())
    }

    fn compare(&self, expected: &[u8], read: &[u8]) -> anyhow::Result<()> {
        let size = expected.len() as u64;
        let older = Shadow::take(&self.older.as_slice(), size)?;
        Shadow::take(&expected, size)?.compare(&read, Some(&older))
    }
}
