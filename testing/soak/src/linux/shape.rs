//! The guests that are saved, and the choice of them.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use dirty_bitmap::{Costs, Policy};
use guests::guest::Guest;
use guests::kind::Kind;
#[cfg(target_arch = "x86_64")]
use guests::kvm::Machine;
use guests::ledger::Layout;
#[cfg(target_arch = "x86_64")]
use page_reader::RamLayout;
use random::Random;

use super::embedded::{Guarded, Writers};
use super::ledger::Ledger;
use super::saved_guest::SavedGuest;

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
            Kind::Hvf | Kind::Userfaultfd | Kind::Mprotect => (16 + random.below(240)) * UNIT,
        };
        let low = match kind {
            // The ledger's machine page lies in the first 2 MiB.
            Kind::Kvm => (2 << 20) + random.below((ram - (2 << 20)) / UNIT) * UNIT,
            Kind::Hvf | Kind::Mprotect => 0,
            Kind::Userfaultfd => random.below(ram / UNIT) * UNIT,
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

    /// Creates the guest, and starts tracking its writes, which `seed` determines.
    pub(super) fn create(&self, seed: u64) -> anyhow::Result<Box<dyn SavedGuest>> {
        let guarded = match self.kind {
            Kind::Userfaultfd => Guarded::Userfaultfd,
            Kind::Mprotect => Guarded::Mprotect,
            Kind::Kvm => return Ok(Box::new(Ledger::new(machine(self)?)?)),
            // Any other guest, in RAM of one region.
            Kind::Hvf => {
                let guest = self.kind.create(Layout::of(self.ram()))?;
                return Ok(Box::new(Ledger::new(guest)?));
            }
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
            Kind::Mprotect => "threads tracked by mprotect",
            Kind::Hvf => "a guest of the Hypervisor framework",
        };
        write!(f, "{name}, {self:?}")
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
