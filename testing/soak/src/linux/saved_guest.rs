//! The guests that are saved: each is stopped, but for the time that other work takes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dirty_bitmap::{Costs, Policy};
use guests::guest::{Guest, Kind, Ram, Tracker};
#[cfg(target_arch = "x86_64")]
use guests::kvm::Machine;
use guests::ledger::Layout;
#[cfg(target_arch = "x86_64")]
use page_reader::RamLayout;
use scenarios::random::Random;

use super::embedded::{Guarded, Writers};

/// A guest whose writes are tracked.
pub(super) trait SavedGuest {
    fn ram(&self) -> Ram;

    fn tracker(&self) -> Arc<dyn Tracker>;

    /// Runs the guest during `work`, and then stops it at an arbitrary instruction.
    fn run(&mut self, work: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<()>;

    /// Returns the error that the guest itself found in its memory.
    fn fault(&mut self) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
}

/// The properties of a guest that are chosen before it is created.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub kind: Kind,
    /// The guest-physical addresses of the RAM, ascending.
    pub regions: Vec<Range<u64>>,
    /// Whether the memory is a file that a device writes to, past all write protection.
    device: bool,
    threads: u64,
    /// Bytes of a page as the tracker protects it.
    page: u64,
    policy: Policy,
}

/// RAM sizes and page sizes are multiples of it.
pub(super) const UNIT: u64 = 64 << 10;

impl Shape {
    pub(super) fn choose(kind: Kind, random: &mut Random) -> Self {
        let ram = match kind {
            Kind::Kvm => [4 << 20, 6 << 20, 8 << 20, 16 << 20][random.below(4) as usize],
            _ => (16 + random.below(240)) * UNIT,
        };
        let low = match kind {
            // The ledger's machine page lies in the first 2 MiB.
            Kind::Kvm => (2 << 20) + random.below((ram - (2 << 20)) / UNIT) * UNIT,
            Kind::Mprotect => 0,
            _ => random.below(ram / UNIT) * UNIT,
        };
        const HIGH: u64 = 4 << 30;
        let regions = match low {
            0 => vec![0..ram],
            low => vec![0..low, HIGH..HIGH + ram - low],
        };
        let policy = match random.below(4) {
            0 => Policy::Pages,
            1 => Policy::Blocks,
            2 => Policy::FaultLimit(1 + random.below(64) as u32),
            _ => Policy::Cost(Costs {
                fault: Duration::from_nanos(100 << random.below(8)),
                write_mib: Duration::from_micros(625),
            }),
        };
        Self {
            kind,
            regions,
            device: random.below(2) == 0,
            threads: 1 + random.below(3),
            page: [4096, 4096, 16384, UNIT][random.below(4) as usize],
            policy,
        }
    }

    pub(super) fn ram(&self) -> u64 {
        self.regions
            .iter()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Makes it, and begins to track its writes. `seed` is for what it writes.
    pub(super) fn create(&self, seed: u64) -> anyhow::Result<Box<dyn SavedGuest>> {
        let guarded = match self.kind {
            Kind::Userfaultfd => Guarded::Userfaultfd,
            Kind::Mprotect => Guarded::Mprotect,
            _ => return Ok(Box::new(Ledger::new(self)?)),
        };
        let sizes = self.regions.iter().map(|range| range.end - range.start);
        let writers = Writers::new(sizes, self.device, self.threads, seed)?;
        Ok(Box::new(writers.track(guarded, self.page, self.policy)?))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            Kind::Kvm => "a KVM guest",
            Kind::Userfaultfd => "threads tracked by userfaultfd",
            _ => "threads tracked by mprotect",
        };
        write!(f, "{name}, {self:?}")
    }
}

/// Says that the work is done, also where it panics.
pub(super) struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A virtual machine that keeps the demo's ledger.
struct Ledger {
    guest: Box<dyn Guest>,
    tracker: Arc<dyn Tracker>,
}

/// Steps of the ledger in one go, and how long the machine then idles: other guests want the
/// processors too.
const SPELL: u64 = 48;
const IDLE: Duration = Duration::from_micros(300);

impl Ledger {
    fn new(shape: &Shape) -> anyhow::Result<Self> {
        let mut guest = machine(shape)?;
        guest.boot()?;
        let tracker = guest.track()?;
        Ok(Self { guest, tracker })
    }
}

#[cfg(target_arch = "x86_64")]
fn machine(shape: &Shape) -> anyhow::Result<Box<dyn Guest>> {
    let regions = shape.regions.iter();
    let regions = RamLayout::new(regions.map(|range| (range.start, range.end - range.start)))?;
    let machine = Machine::with_regions(regions, Layout::of(shape.ram()))?;
    Ok(Box::new(machine))
}

/// There is none, which the kind says.
#[cfg(not(target_arch = "x86_64"))]
fn machine(shape: &Shape) -> anyhow::Result<Box<dyn Guest>> {
    shape.kind.create(Layout::of(shape.ram()))
}

impl SavedGuest for Ledger {
    fn ram(&self) -> Ram {
        self.guest.ram()
    }

    fn tracker(&self) -> Arc<dyn Tracker> {
        Arc::clone(&self.tracker)
    }

    fn run(&mut self, work: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let stop = AtomicBool::new(false);
        let (guest, stop) = (&mut self.guest, &stop);
        thread::scope(|scope| {
            let vcpu = scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    guest.work_until(guest.steps() + SPELL)?;
                    thread::sleep(IDLE);
                }
                guest.pause()
            });
            let done = {
                let _stop = Stop(stop);
                work()
            };
            let ran = vcpu.join();
            ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            done
        })
    }

    fn fault(&mut self) -> anyhow::Result<Option<String>> {
        // It was stopped anywhere, and takes the order when it has arrived.
        self.guest.work_until(self.guest.steps() + SPELL)?;
        let verdict = self.guest.check()?;
        let found = format!("the guest finds {} faults in its ledger", verdict.faults);
        Ok((verdict.faults > 0).then_some(found))
    }
}
