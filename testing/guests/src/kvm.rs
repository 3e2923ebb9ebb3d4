//! The guest in a virtual machine: `ledger.s` on a vCPU of KVM's.

mod pause;
mod program;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use dirty_bitmap::{Epoch as LoggedEpoch, TakenBitmap};
use kvm_backend::{DirtyLog, GuestRam, PauseError, RamSlots, Vcpu, VcpuState, Vcpus, long_mode};
use kvm_ioctls::{Kvm, VcpuExit};
use page_reader::{PageReader, RamLayout};

use super::guest::{Dirty, Epoch, Guest, Ram, Tracker};
use super::ledger::{self, Layout, Verdict, Words, front};

/// The port of the guest's bell.
const PORT: u16 = 0x80;
/// What the guest rings: it is where it was to work until.
const ARRIVED: u8 = 1;
/// What the guest rings: its ledger is checked.
const CHECKED: u8 = 2;

/// What the host may order.
const WORK: u64 = 0;
const CHECK: u64 = 1;

/// Where the page tables lie, the program above them, and, growing down towards that from the front
/// page, the stack.
const PAGE_TABLES: u64 = 4096;
const PROGRAM: u64 = Layout::FRONT - (64 << 10);
const STACK: u64 = Layout::FRONT;

/// Steps after which a guest that is to be paused waits of its own accord: ten times what it does
/// until the nudge.
const PAUSE_WITHIN: u64 = 400;

/// A virtual machine with one vCPU.
pub struct Machine {
    kvm: Kvm,
    vcpu: Vcpu,
    vcpus: Vcpus,
    slots: Arc<RamSlots>,
    ram: Arc<GuestRam>,
    layout: Layout,
}

/// Why a vCPU stopped.
enum Stop {
    /// The guest rang its bell.
    Bell(u8),
    /// A signal came.
    Nudge,
}

/// The machine's RAM as the host uses it: every store is marked dirty.
struct Access<'a>(&'a GuestRam);

impl Words for Access<'_> {
    fn load(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        let read = self.0.read_at(offset, &mut word);
        read.expect("the front page is in the RAM");
        u64::from_ne_bytes(word)
    }

    fn store(&mut self, offset: u64, word: u64) {
        let written = self.0.write_at(offset, &word.to_ne_bytes());
        written.expect("the front page is in the RAM");
    }
}

/// Whether this machine has KVM, or why not.
pub fn available() -> anyhow::Result<()> {
    let kvm = kvm_backend::open_kvm()?;
    kvm_backend::create_vm(&kvm).context("KVM makes no virtual machine")?;
    Ok(())
}

impl Machine {
    /// A machine with empty memory, laid out as x86 has it: a hole of 1 GiB below 4 GiB.
    pub fn new(layout: Layout) -> anyhow::Result<Self> {
        Self::with_regions(RamLayout::x86_with_gap(layout.ram)?, layout)
    }

    /// A machine with empty memory in these regions, the lowest of which has the first 2 MiB.
    pub fn with_regions(regions: RamLayout, layout: Layout) -> anyhow::Result<Self> {
        let kvm = kvm_backend::open_kvm()?;
        let vm = Arc::new(kvm_backend::create_vm(&kvm)?);
        let ram = Arc::new(GuestRam::new(regions)?);
        let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
        let vcpus = Vcpus::new(&vm);
        let vcpu = vcpus.create(0)?;
        Ok(Self {
            kvm,
            vcpu,
            vcpus,
            slots,
            ram,
            layout,
        })
    }

    fn front(&self) -> Access<'_> {
        Access(&self.ram)
    }

    /// Lets the guest run until it rings its bell or a signal comes.
    fn run(&mut self) -> anyhow::Result<Stop> {
        let bell = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, &[bell])) => bell,
            Ok(exit) => bail!("the guest stopped by {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {
                self.complete_io()?;
                return Ok(Stop::Nudge);
            }
            Err(error) => return Err(error).context("KVM_RUN"),
        };
        // KVM ends an `out` when the vCPU is run again: until then its state is that of the middle
        // of an instruction.
        self.complete_io()?;
        Ok(Stop::Bell(bell))
    }

    fn complete_io(&mut self) -> anyhow::Result<()> {
        let mut further = None;
        self.vcpu
            .complete_io(|exit| further = Some(format!("{exit:?}")))?;
        match further {
            None => Ok(()),
            Some(exit) => bail!("the guest stopped once more in one instruction: {exit}"),
        }
    }

    /// Lets the guest run until it rings its bell for `expected`.
    fn run_until(&mut self, expected: u8) -> anyhow::Result<()> {
        loop {
            match self.run()? {
                Stop::Bell(bell) if bell == expected => return Ok(()),
                Stop::Bell(bell) => bail!("the guest rings {bell} for {expected}"),
                Stop::Nudge => {}
            }
        }
    }
}

/// The log, and the vCPUs that write what is in there.
struct Watch {
    log: DirtyLog,
    vcpus: Vcpus,
}

impl Watch {
    /// Moves the log into the bitmap. A guest that is paused stays so until its pages are copied:
    /// the thread that has it saved is the one that runs it.
    fn harvest(&self) -> anyhow::Result<()> {
        match self.vcpus.pause() {
            Ok(paused) => drop(self.log.harvest(paused)?),
            // It works on, or is about to: an image of one instant takes the state of the
            // processor, which there is of a paused guest only.
            Err(PauseError::Running { .. } | PauseError::IoPending { .. }) => {
                self.log.harvest_running()?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Tracker for Watch {
    fn dirty(&self) -> Dirty<'_> {
        Dirty::Logged(self.log.slots().ram().dirty_bitmap())
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        self.harvest()?;
        let dirty = Arc::clone(self.log.slots().ram().dirty_bitmap());
        Ok(Epoch::Logged(LoggedEpoch::begin(dirty)?))
    }

    fn take_more<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap> {
        self.harvest()?;
        match epoch {
            Epoch::Logged(epoch) => Ok(epoch.take_more()?),
            Epoch::Tracked(_) => bail!("an epoch of another tracker"),
        }
    }
}

impl Guest for Machine {
    fn boot(&mut self) -> anyhow::Result<()> {
        let mut front = self.front();
        ledger::prepare(&mut front, self.layout);
        if let [low, high, ..] = self.ram.layout().regions() {
            front.store(front::GAP_START, low.guest_end());
            front.store(front::GAP_SIZE, high.guest_start - low.guest_end());
        }
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
        // Anywhere in the next steps, a different place each time.
        let after = Duration::from_micros(20 + steps % 64);
        match pause::nudged(after, || self.run())?? {
            // On a busy host the nudge may come late.
            Stop::Nudge | Stop::Bell(ARRIVED) => Ok(()),
            Stop::Bell(bell) => bail!("the guest rings {bell} on its way"),
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
        // What was written before is no diff's: the first snapshot is a full one.
        self.ram.dirty_bitmap().begin_epoch()?.release()?;
        Ok(Arc::new(Watch {
            log,
            vcpus: self.vcpus.clone(),
        }))
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        let paused = self.vcpus.pause()?;
        let state = VcpuState::capture(&self.kvm, &paused, &self.vcpu)?;
        Ok(postcard::to_stdvec(&state)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        let state: VcpuState = postcard::from_bytes(state).context("not the state of a vCPU")?;
        // An MSR that KVM refuses is none that the ledger reads: it runs at privilege level 3.
        let _ = state.restore(self.slots.vm(), &self.vcpu)?;
        Ok(())
    }
}
