//! A virtual machine that is saved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use guests::guest::{Guest, Ram, Tracker};

use super::saved_guest::{SavedGuest, Stop};

/// A virtual machine that keeps the demo's ledger.
pub(super) struct Ledger {
    guest: Box<dyn Guest>,
    tracker: Arc<dyn Tracker>,
}

/// Steps of the ledger in one go, and how long the machine then idles: other guests want the
/// processors too.
const SPELL: u64 = 48;
const IDLE: Duration = Duration::from_micros(300);

impl Ledger {
    /// Boots `guest`, and begins to track its writes.
    pub(super) fn new(mut guest: Box<dyn Guest>) -> anyhow::Result<Self> {
        guest.boot()?;
        let tracker = guest.track()?;
        Ok(Self { guest, tracker })
    }
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
