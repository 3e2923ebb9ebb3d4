//! A guest in a virtual machine: `ledger.s` on a vCPU of KVM. [`smp`] has machines with two vCPUs.

mod pause;
mod program;
pub mod smp;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use dirty_bitmap::TakenBitmap;
use kvm_backend::{
    DirtyLog, GuestRam, MsrList, PauseError, PausedHarvest, RamSlots, Vcpu, VcpuState, Vcpus,
    long_mode,
};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use page_reader::{PageReader, RamLayout};

use super::guest::{Dirty, Epoch, Guest, Ram, Tracker};
use super::ledger::{self, Layout, Verdict, Words, front};

/// The port of the guest's doorbell.
const PORT: u16 = 0x80;
/// Doorbell value: the requested step is reached.
const ARRIVED: u8 = 1;
/// Doorbell value: the ledger is checked.
const CHECKED: u8 = 2;

/// The commands of the host.
const WORK: u64 = 0;
const CHECK: u64 = 1;

/// The page tables, the program above them, and the stack, which grows from the front page down
/// towards the program.
const PAGE_TABLES: u64 = 4096;
const PROGRAM: u64 = Layout::FRONT - (64 << 10);
const STACK: u64 = Layout::FRONT;

/// The number of steps after which a guest that is to be paused stops by itself: ten times as many
/// as it does until the interrupt.
const PAUSE_WITHIN: u64 = 400;

/// A virtual machine with one vCPU.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    vcpu: Vcpu,
    vcpus: Vcpus,
    slots: Arc<RamSlots>,
    ram: Arc<GuestRam>,
    layout: Layout,
}

/// The reason why a vCPU stopped.
enum StopReason {
    /// The guest rang its doorbell with this value.
    Doorbell(u8),
    /// A signal interrupted the vCPU.
    Interrupted,
}

/// The host's access to a ledger in the RAM: every store is marked dirty.
struct Access<'a> {
    ram: &'a GuestRam,
    /// The offset in the RAM of the ledger's first word.
    start: u64,
}

impl Words for Access<'_> {
    fn load(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        let read = self.ram.read_at(self.start + offset, &mut word);
        read.expect("the front page is in the RAM");
        u64::from_ne_bytes(word)
    }

    fn store(&mut self, offset: u64, word: u64) {
        let written = self.ram.write_at(self.start + offset, &word.to_ne_bytes());
        written.expect("the front page is in the RAM");
    }
}

impl Access<'_> {
    /// Writes the place of the hole in the guest's addresses.
    fn store_gap(&mut self, layout: &RamLayout) {
        if let [low, high, ..] = layout.regions() {
            self.store(front::GAP_START, low.guest_end());
            self.store(front::GAP_SIZE, high.guest_start - low.guest_end());
        }
    }
}

/// Checks that this host has KVM.
pub fn available() -> anyhow::Result<()> {
    let kvm = kvm_backend::open_kvm()?;
    kvm_backend::create_vm(&kvm).context("failed to create a KVM virtual machine")?;
    Ok(())
}

impl Machine {
    /// Creates a machine with empty memory in the layout of x86: a hole of 1 GiB below 4 GiB.
    pub fn new(layout: Layout) -> anyhow::Result<Self> {
        Self::with_regions(RamLayout::x86_with_gap(layout.ram)?, layout)
    }

    /// Creates a machine with empty memory in these regions, the lowest of which contains the first
    /// 2 MiB.
    pub fn with_regions(regions: RamLayout, layout: Layout) -> anyhow::Result<Self> {
        let kvm = kvm_backend::open_kvm()?;
        let vm = kvm_backend::create_vm(&kvm)?;
        let ram = Arc::new(GuestRam::new(regions)?);
        let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
        let vcpus = Vcpus::new(&vm)?;
        let vcpu = vcpus.create(&vm, 0)?;
        Ok(Self {
            kvm,
            vm,
            vcpu,
            vcpus,
            slots,
            ram,
            layout,
        })
    }

    fn front(&self) -> Access<'_> {
        Access {
            ram: &self.ram,
            start: 0,
        }
    }

    /// Runs the guest until it rings its doorbell with `expected`.
    fn run_until(&mut self, expected: u8) -> anyhow::Result<()> {
        run_until(&mut self.vcpu, expected)
    }
}

/// Runs a vCPU until the guest rings its doorbell or a signal arrives, and completes its I/O.
fn run(vcpu: &mut Vcpu) -> anyhow::Result<StopReason> {
    let value = match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, &[value])) => value,
        Ok(exit) => bail!("the guest stopped with an unexpected exit: {exit:?}"),
        Err(error) if error.errno() == libc::EINTR => {
            complete_io(vcpu)?;
            return Ok(StopReason::Interrupted);
        }
        Err(error) => return Err(error).context("KVM_RUN failed"),
    };
    // KVM completes an `out` when the vCPU is run again. Until then its state is that in the
    // middle of the instruction.
    complete_io(vcpu)?;
    Ok(StopReason::Doorbell(value))
}

fn complete_io(vcpu: &mut Vcpu) -> anyhow::Result<()> {
    let mut second = None;
    vcpu.complete_io(|exit| second = Some(format!("{exit:?}")))?;
    match second {
        None => Ok(()),
        Some(exit) => bail!("the guest stopped twice in one instruction: {exit}"),
    }
}

/// Runs a vCPU until the guest rings its doorbell with `expected`.
fn run_until(vcpu: &mut Vcpu, expected: u8) -> anyhow::Result<()> {
    loop {
        match run(vcpu)? {
            StopReason::Doorbell(value) if value == expected => return Ok(()),
            StopReason::Doorbell(value) => {
                bail!("the guest rang its doorbell with {value}, not {expected}")
            }
            StopReason::Interrupted => {}
        }
    }
}

/// A tracker by KVM's dirty log.
struct LogTracker {
    log: DirtyLog,
    vcpus: Vcpus,
}

impl LogTracker {
    /// Moves the log into the bitmap of a paused guest. It stays paused until its pages are copied:
    /// one thread both runs and saves it.
    fn harvest_paused(&self) -> anyhow::Result<Option<PausedHarvest>> {
        match self.vcpus.pause() {
            Ok(paused) => Ok(Some(self.log.harvest(paused)?)),
            // The guest runs, or is about to. A consistent image includes the state of the
            // processor, which only a paused guest has.
            Err(PauseError::Running { .. } | PauseError::IoPending { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Tracker for LogTracker {
    fn dirty(&self) -> Dirty<'_> {
        Dirty::Logged(self.log.slots().ram().dirty_bitmap())
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        let epoch = match self.harvest_paused()? {
            Some(harvest) => harvest.begin_epoch()?,
            None => self.log.begin_live_epoch()?,
        };
        Ok(Epoch::Logged(epoch))
    }

    fn extend<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap> {
        let Epoch::Logged(epoch) = epoch else {
            bail!("the epoch belongs to another tracker");
        };
        let extension = match self.harvest_paused()? {
            Some(harvest) => harvest.extend(epoch)?,
            None => self.log.extend_live(epoch)?,
        };
        Ok(extension.bitmap())
    }
}

impl Guest for Machine {
    fn boot(&mut self) -> anyhow::Result<()> {
        let mut front = self.front();
        ledger::prepare(&mut front, self.layout);
        front.store_gap(self.ram.layout());
        self.ram.write(PROGRAM, program::bytes())?;
        let start = long_mode::Start {
            entry: PROGRAM,
            stack: STACK,
            page_tables: PAGE_TABLES,
        };
        long_mode::boot(&self.kvm, &self.ram, &self.vcpu, &start)?;
        let mut registers = self.vcpu.get_regs()?;
        registers.rbx = Layout::FRONT;
        Ok(self.vcpu.set_regs(&registers)?)
    }

    fn work_until(&mut self, step: u64) -> anyhow::Result<()> {
        self.front().store(front::ORDER, WORK);
        self.front().store(front::UNTIL, step);
        self.run_until(ARRIVED)
    }

    fn pause(&mut self) -> anyhow::Result<()> {
        let steps = self.steps();
        self.front().store(front::UNTIL, steps + PAUSE_WITHIN);
        // The pause is somewhere in the next steps, at a different instruction each time.
        let after = Duration::from_micros(20 + steps % 64);
        match pause::interrupted(after, || run(&mut self.vcpu))?? {
            // On a busy host the interrupt may be late.
            StopReason::Interrupted | StopReason::Doorbell(ARRIVED) => Ok(()),
            StopReason::Doorbell(value) => {
                bail!("the guest rang its doorbell with {value} before the pause")
            }
        }
    }

    fn steps(&self) -> u64 {
        self.front().load(front::STEPS)
    }

    fn check(&mut self) -> anyhow::Result<Verdict> {
        self.front().store(front::ORDER, CHECK);
        self.run_until(CHECKED)?;
        self.front().store(front::ORDER, WORK);
        Ok(ledger::verdict(&self.front()))
    }

    fn ram(&self) -> Ram {
        Ram::new(Arc::clone(&self.ram))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.ram.write_at(offset, bytes)?)
    }

    fn gap(&self) -> Option<u64> {
        self.ram.layout().regions().get(1).map(|high| high.offset)
    }

    fn track(&mut self) -> anyhow::Result<Arc<dyn Tracker>> {
        let log = DirtyLog::start(&self.slots)?;
        // Clear the marks: the first snapshot is a full one, so no diff needs the earlier writes.
        self.ram.set_baseline()?;
        Ok(Arc::new(LogTracker {
            log,
            vcpus: self.vcpus.clone(),
        }))
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        let paused = self.vcpus.pause()?;
        let state = VcpuState::capture(&MsrList::query(&self.kvm)?, &paused, &self.vcpu)?;
        Ok(state.to_bytes())
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        let state = VcpuState::from_bytes(state)?;
        // The ledger reads no MSRs, since it runs at privilege level 3, so it does not matter which
        // ones KVM refuses.
        let _ = state.restore(&self.vm, &self.vcpu)?;
        Ok(())
    }
}
