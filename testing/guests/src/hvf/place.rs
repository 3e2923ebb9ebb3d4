//! The one virtual machine of this process, and whose guest is in it.
//!
//! The framework has one virtual machine for each process, and the demo has two guests: the
//! original, and the one restored from its snapshots. So a guest is its RAM and the state of its
//! processor, and takes the virtual machine when it is to work; the other one leaves it then.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use anyhow::Context;
use dirty_bitmap::{Policy, WriteProtection};
use hvf_backend::{GuestRam, ProtectError, Stage2, Stage2Tracker, Vm};

use super::start;

/// Who has the virtual machine. Held while its vCPU runs.
static SEAT: Mutex<Weak<Place>> = Mutex::new(Weak::new());

/// A guest's RAM, in the virtual machine or not.
pub(super) struct Place {
    pub(super) ram: Arc<GuestRam>,
    pub(super) tracker: OnceLock<Stage2Tracker<Stage>>,
    stage: Stage,
}

/// Stage 2 while the guest has the virtual machine. A guest without it writes nothing, and gets it
/// back with all its RAM protected.
#[derive(Clone, Debug, Default)]
pub(super) struct Stage(Arc<Mutex<Option<Stage2>>>);

/// The virtual machine, as long as it is this guest's.
pub(super) struct Seat {
    pub(super) vm: Vm,
    _taken: MutexGuard<'static, Weak<Place>>,
}

/// Whether a virtual machine can be made, or why not.
pub(super) fn available() -> anyhow::Result<()> {
    let seat = lock(&SEAT);
    if seat.upgrade().is_none() {
        Vm::new()?;
    }
    Ok(())
}

impl Place {
    pub(super) fn new(ram: GuestRam) -> Arc<Self> {
        Arc::new(Self {
            ram: Arc::new(ram),
            tracker: OnceLock::new(),
            stage: Stage::default(),
        })
    }

    /// Begins to track writes.
    pub(super) fn track(&self) -> anyhow::Result<()> {
        let layout = self.ram.layout().clone();
        let (bitmap, stage) = (self.ram.dirty_bitmap(), self.stage.clone());
        let tracker = Stage2Tracker::new(layout, bitmap, Policy::default(), stage)?;
        let first = self.tracker.set(tracker).is_ok();
        anyhow::ensure!(first, "a guest is tracked once");
        Ok(())
    }

    /// Takes the virtual machine, from another guest if need be.
    pub(super) fn take_seat(self: &Arc<Self>) -> anyhow::Result<Seat> {
        let mut taken = lock(&SEAT);
        let mut stage = lock(&self.stage.0);
        if let Some(stage) = &*stage {
            let vm = stage.vm().clone();
            return Ok(Seat { vm, _taken: taken });
        }
        if let Some(other) = taken.upgrade() {
            // Its vCPU lives only while it holds SEAT: with this, its machine ends.
            drop(lock(&other.stage.0).take());
        }
        *taken = Weak::new();
        let vm = self.machine()?;
        let stage2 = Stage2::map(&vm, &self.ram)?;
        if self.tracker.get().is_some() {
            // What is marked is protected too, and faults once more.
            stage2.protect(0..self.ram.layout().ram_size())?;
        }
        *stage = Some(stage2);
        *taken = Arc::downgrade(self);
        Ok(Seat { vm, _taken: taken })
    }

    /// Gives the virtual machine back, if this guest has it.
    pub(super) fn leave(&self) {
        // Waits for the thread that is taking it: otherwise it would find no guest in it, and the
        // machine still there.
        let _seat = lock(&SEAT);
        drop(lock(&self.stage.0).take());
    }

    /// A virtual machine with as many address bits as the RAM needs.
    fn machine(&self) -> anyhow::Result<Vm> {
        match start::address_bits(self.ram.layout()) {
            36 => Vm::new(),
            more => Vm::options().address_bits(more).create(),
        }
        .context("no virtual machine")
    }
}

impl WriteProtection for Stage {
    type Error = ProtectError;

    fn protect(&self, range: std::ops::Range<u64>) -> Result<(), ProtectError> {
        let stage = lock(&self.0);
        stage
            .as_ref()
            .map_or(Ok(()), |stage2| stage2.protect(range))
    }

    fn lift(&self, range: std::ops::Range<u64>) -> Result<(), ProtectError> {
        let stage = lock(&self.0);
        stage.as_ref().map_or(Ok(()), |stage2| stage2.lift(range))
    }
}

/// After a panic in another guest's work, what is behind the lock is whole: it is set in one piece.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
