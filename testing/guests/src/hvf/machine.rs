//! A guest: its RAM, the state of its processor, and their operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use dirty_bitmap::TakenBitmap;
use hvf_backend::{Canceller, Exit, ExitAction, GuestRam, HvError, Stage2Tracker, Vcpu, VcpuState};
use page_reader::PageReader;

use super::shared_vm::{OptionalStage, SharedVmGuest};
use super::{ARRIVED, CHECKED, program, start};
use crate::guest::{Dirty, Epoch, Guest, Ram, Tracker};
use crate::ledger::{self, Layout, Verdict, Words, front};

/// The commands of the host.
const WORK: u64 = 0;
const CHECK: u64 = 1;

/// The exception class (ESR_EL2.EC) of `hvc` in AArch64. Its operand is in the lower 16 bits of the
/// syndrome.
const HVC: u64 = 0x16;

/// The number of steps after which a guest that is to be paused stops by itself: ten times as many
/// as it does until the interrupt.
const PAUSE_WITHIN: u64 = 400;

/// The interval between two interrupts. A single one may arrive just before the vCPU runs, without
/// effect.
const INTERVAL: Duration = Duration::from_micros(50);

/// A guest, which takes the virtual machine of this process when it runs.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<SharedVmGuest>,
    /// The state of the vCPU when it last left the guest. Each run restores it into a new vCPU.
    processor: VcpuState,
    layout: Layout,
}

/// The reason why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopReason {
    /// The guest rang its doorbell with this value.
    Doorbell(u16),
    /// The vCPU was interrupted.
    Interrupted,
}

/// The host's access to the RAM: every store is marked dirty.
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

impl Machine {
    /// Creates a machine with empty memory.
    pub fn new(layout: Layout) -> anyhow::Result<Self> {
        super::available()?;
        let regions = start::regions(layout.ram)?;
        Ok(Self {
            processor: start::state(&regions),
            shared: SharedVmGuest::new(GuestRam::new(regions)?),
            layout,
        })
    }

    fn front(&self) -> Access<'_> {
        Access(&self.shared.ram)
    }

    /// Runs the guest until it rings its doorbell or is interrupted.
    fn run(&mut self, interrupt_after: Option<Duration>) -> anyhow::Result<StopReason> {
        let lease = self.shared.lease_vm()?;
        let mut vcpu = lease.vm.create_vcpu()?;
        let offset = self.processor.vtimer.resuming_offset();
        // Registers that differ do not matter: the ledger does not use them. If it did, its digest
        // would be wrong.
        let _ = self.processor.restore(&vcpu, offset)?;
        let stop = match interrupt_after {
            Some(after) => interrupted(&vcpu.canceller(), after, || run(&self.shared, &mut vcpu))?,
            None => run(&self.shared, &mut vcpu),
        };
        self.processor = VcpuState::capture(&vcpu)?;
        stop
    }

    /// Runs the guest until it rings its doorbell with `expected`.
    fn run_until(&mut self, expected: u16) -> anyhow::Result<()> {
        loop {
            match self.run(None)? {
                StopReason::Doorbell(value) if value == expected => return Ok(()),
                StopReason::Doorbell(value) => {
                    bail!("the guest rang its doorbell with {value}, not {expected}")
                }
                StopReason::Interrupted => {}
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.release_vm();
    }
}

/// Runs the vCPU and handles its write faults, until it stops for another reason.
fn run(shared: &SharedVmGuest, vcpu: &mut Vcpu) -> anyhow::Result<StopReason> {
    let tracker = shared.tracker.get();
    loop {
        let run_guard = tracker.map(|tracker| (tracker, tracker.enter()));
        let exit = vcpu.run()?;
        if let Some((tracker, run_guard)) = &run_guard
            && tracker.handle_exit(run_guard, &exit)? == ExitAction::Resume
        {
            continue;
        }
        drop(run_guard);
        return match exit {
            Exit::Exception(exception) if exception.syndrome >> 26 & 0x3f == HVC => {
                Ok(StopReason::Doorbell(exception.syndrome as u16))
            }
            Exit::Canceled => Ok(StopReason::Interrupted),
            exit => bail!("the guest stopped with an unexpected exit: {exit:x?}"),
        };
    }
}

/// Calls `work` on this thread, and interrupts its vCPU from `after` on until `work` returns.
fn interrupted<T>(
    vcpu: &Canceller,
    after: Duration,
    work: impl FnOnce() -> T,
) -> Result<T, HvError> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let interrupter = scope.spawn(|| {
            thread::sleep(after);
            while !done.load(Ordering::Acquire) {
                vcpu.cancel()?;
                thread::sleep(INTERVAL);
            }
            Ok(())
        });
        let result = work();
        done.store(true, Ordering::Release);
        // The interrupting thread does not panic.
        interrupter.join().unwrap_or(Ok(())).map(|()| result)
    })
}

/// A tracker by the guest's stage-2 protection.
struct StageTracker(Arc<SharedVmGuest>);

impl StageTracker {
    fn tracker(&self) -> anyhow::Result<&Stage2Tracker<OptionalStage>> {
        self.0.tracker.get().context("the guest is not tracked")
    }
}

impl Tracker for StageTracker {
    fn dirty(&self) -> Dirty<'_> {
        Dirty::Tracked(self.0.ram.dirty_bitmap())
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        Ok(Epoch::Tracked(self.tracker()?.checkpoint_live()?))
    }

    fn extend<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap> {
        let more = self.tracker()?.checkpoint_incremental(epoch.tracked()?)?;
        Ok(more.bitmap())
    }
}

impl Guest for Machine {
    fn boot(&mut self) -> anyhow::Result<()> {
        let regions = self.shared.ram.layout().clone();
        let mut front = self.front();
        ledger::prepare(&mut front, self.layout);
        if let [low, high, ..] = regions.regions() {
            front.store(front::GAP_START, low.offset_end());
            front.store(front::GAP_SIZE, high.guest_start - low.guest_end());
        }
        self.shared.ram.write_at(start::PROGRAM, program::bytes())?;
        self.shared
            .ram
            .write_at(start::PAGE_TABLE, &hvf_backend::el1::page_table())?;
        self.processor = start::state(&regions);
        Ok(())
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
        match self.run(Some(after))? {
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
        Ram::new(Arc::clone(&self.shared.ram))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.shared.ram.write_at(offset, bytes)?)
    }

    fn gap(&self) -> Option<u64> {
        let regions = self.shared.ram.layout().regions();
        regions.get(1).map(|high| high.offset)
    }

    fn track(&mut self) -> anyhow::Result<Arc<dyn Tracker>> {
        self.shared.track()?;
        Ok(Arc::new(StageTracker(Arc::clone(&self.shared))))
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        Ok(postcard::to_stdvec(&self.processor)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        self.processor = postcard::from_bytes(state).context("not the state of a vCPU")?;
        Ok(())
    }
}
