//! The guest: RAM, the state of a processor, and the way they work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use dirty_bitmap::TakenBitmap;
use hvf_backend::{Answer, Canceller, Exit, GuestRam, HvError, Vcpu, VcpuState};
use page_reader::PageReader;

use super::place::Place;
use super::{ARRIVED, CHECKED, program, start};
use crate::guest::{Dirty, Epoch, Guest, Ram, Tracker};
use crate::ledger::{self, Layout, Verdict, Words, front};

/// What the host may order.
const WORK: u64 = 0;
const CHECK: u64 = 1;

/// Exception classes (ESR_EL2.EC): `hvc` in AArch64, whose number is in the lower 16 bits of the
/// syndrome.
const HVC: u64 = 0x16;

/// Steps after which a guest that is to be paused waits of its own accord: ten times what it does
/// until the nudge.
const PAUSE_WITHIN: u64 = 400;

/// Between two nudges. One alone may come just before the vCPU is made to run, and change nothing.
const AGAIN: Duration = Duration::from_micros(50);

/// A guest: in the virtual machine of this process when it works.
pub struct Machine {
    place: Arc<Place>,
    /// What the vCPU held when it last left; each order is given to a new one.
    processor: VcpuState,
    layout: Layout,
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The guest rang its bell.
    Bell(u16),
    /// It was nudged.
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

impl Machine {
    /// A machine with empty memory.
    pub fn new(layout: Layout) -> anyhow::Result<Self> {
        super::available()?;
        let regions = start::regions(layout.ram)?;
        Ok(Self {
            processor: start::state(&regions),
            place: Place::new(GuestRam::new(regions)?),
            layout,
        })
    }

    fn front(&self) -> Access<'_> {
        Access(&self.place.ram)
    }

    /// Lets the guest run until it rings its bell, or is nudged.
    fn run(&mut self, nudge_after: Option<Duration>) -> anyhow::Result<Stop> {
        let seat = self.place.take_seat()?;
        let mut vcpu = seat.vm.create_vcpu()?;
        let offset = self.processor.vtimer.resuming_offset();
        // A register that is not as it was is none that the ledger uses: it would not reach its
        // digest.
        let _ = self.processor.restore(&vcpu, offset)?;
        let stop = match nudge_after {
            Some(after) => nudged(&vcpu.canceller(), after, || run(&self.place, &mut vcpu))?,
            None => run(&self.place, &mut vcpu),
        };
        self.processor = VcpuState::capture(&vcpu)?;
        stop
    }

    /// Lets the guest run until it rings its bell for `expected`.
    fn run_until(&mut self, expected: u16) -> anyhow::Result<()> {
        loop {
            match self.run(None)? {
                Stop::Bell(bell) if bell == expected => return Ok(()),
                Stop::Bell(bell) => bail!("the guest rings {bell} for {expected}"),
                Stop::Nudge => {}
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.place.leave();
    }
}

/// Runs the vCPU, and answers its write faults, until it stops for another reason.
fn run(place: &Place, vcpu: &mut Vcpu) -> anyhow::Result<Stop> {
    let tracker = place.tracker.get();
    loop {
        let in_guest = tracker.map(|tracker| (tracker, tracker.enter()));
        let exit = vcpu.run()?;
        if let Some((tracker, in_guest)) = &in_guest
            && tracker.handle_exit(in_guest, &exit)? == Answer::Handled
        {
            continue;
        }
        drop(in_guest);
        return match exit {
            Exit::Exception(exception) if exception.syndrome >> 26 & 0x3f == HVC => {
                Ok(Stop::Bell(exception.syndrome as u16))
            }
            Exit::Canceled => Ok(Stop::Nudge),
            exit => bail!("the guest stopped by {exit:x?}"),
        };
    }
}

/// Does `work` on this thread, whose vCPU is made to leave its guest from `after` on until `work`
/// returns.
fn nudged<T>(vcpu: &Canceller, after: Duration, work: impl FnOnce() -> T) -> Result<T, HvError> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let nudger = scope.spawn(|| {
            thread::sleep(after);
            while !done.load(Ordering::Acquire) {
                vcpu.cancel()?;
                thread::sleep(AGAIN);
            }
            Ok(())
        });
        let result = work();
        done.store(true, Ordering::Release);
        // The nudger does not panic.
        nudger.join().unwrap_or(Ok(())).map(|()| result)
    })
}

/// The place is the tracker's other end.
struct Watch(Arc<Place>);

impl Watch {
    fn tracker(&self) -> anyhow::Result<&hvf_backend::Stage2Tracker<super::place::Stage>> {
        self.0.tracker.get().context("the guest is not tracked")
    }
}

impl Tracker for Watch {
    fn dirty(&self) -> Dirty<'_> {
        Dirty::Tracked(self.0.ram.dirty_bitmap())
    }

    fn begin(&self) -> anyhow::Result<Epoch> {
        Ok(Epoch::Tracked(self.tracker()?.arm_running()?))
    }

    fn take_more<'e>(&self, epoch: &'e mut Epoch) -> anyhow::Result<&'e TakenBitmap> {
        Ok(self.tracker()?.arm_more(epoch.tracked()?)?)
    }
}

impl Guest for Machine {
    fn boot(&mut self) -> anyhow::Result<()> {
        let regions = self.place.ram.layout().clone();
        let mut front = self.front();
        ledger::prepare(&mut front, self.layout);
        if let [low, high, ..] = regions.regions() {
            front.store(front::GAP_START, low.offset_end());
            front.store(front::GAP_SIZE, high.guest_start - low.guest_end());
        }
        self.place.ram.write_at(start::PROGRAM, program::bytes())?;
        self.place
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
        // Anywhere in the next steps, a different place each time.
        let after = Duration::from_micros(20 + steps % 64);
        match self.run(Some(after))? {
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
        Ram::new(Arc::clone(&self.place.ram))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.place.ram.write_at(offset, bytes)?)
    }

    fn gap(&self) -> Option<u64> {
        let regions = self.place.ram.layout().regions();
        regions.get(1).map(|high| high.offset)
    }

    fn track(&mut self) -> anyhow::Result<Arc<dyn Tracker>> {
        self.place.track()?;
        Ok(Arc::new(Watch(Arc::clone(&self.place))))
    }

    fn processor(&mut self) -> anyhow::Result<Vec<u8>> {
        Ok(postcard::to_stdvec(&self.processor)?)
    }

    fn set_processor(&mut self, state: &[u8]) -> anyhow::Result<()> {
        self.processor = postcard::from_bytes(state).context("not the state of a vCPU")?;
        Ok(())
    }
}
