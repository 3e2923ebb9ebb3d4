//! Shares the one virtual machine of this process between guests.
//!
//! The framework has one virtual machine for each process, and the demo has two guests: the
//! original, and the one restored from its snapshots. A guest is therefore its RAM and the state of
//! its processor. It takes the virtual machine when it runs, and the other guest then leaves it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use anyhow::Context;
use dirty_bitmap::{Policy, WriteProtection};
use hvf_backend::{GuestRam, ProtectError, Stage2, Stage2Tracker, Vm};

use super::start;

/// The guest that has the virtual machine. The lock is held while its vCPU runs.
static VM_HOLDER: Mutex<Weak<SharedVmGuest>> = Mutex::new(Weak::new());

/// The RAM of a guest, mapped into the virtual machine or not, and its tracker.
#[derive(Debug)]
pub(super) struct SharedVmGuest {
    pub(super) ram: Arc<GuestRam>,
    pub(super) tracker: OnceLock<Stage2Tracker<OptionalStage>>,
    stage: OptionalStage,
}

/// The stage-2 mapping while the guest has the virtual machine. A guest without it writes nothing,
/// and all its RAM is protected when the guest gets it back.
#[derive(Clone, Debug, Default)]
pub(super) struct OptionalStage(Arc<Mutex<Option<Stage2>>>);

/// The virtual machine while this guest has it.
pub(super) struct VmLease {
    pub(super) vm: Vm,
    _holder: MutexGuard<'static, Weak<SharedVmGuest>>,
}

/// Checks that a virtual machine can be created.
pub(super) fn available() -> anyhow::Result<()> {
    let holder = lock(&VM_HOLDER);
    if holder.upgrade().is_none() {
        drop(Vm::new()?);
    }
    Ok(())
}

impl SharedVmGuest {
    pub(super) fn new(ram: GuestRam) -> Arc<Self> {
        Arc::new(Self {
            ram: Arc::new(ram),
            tracker: OnceLock::new(),
            stage: OptionalStage::default(),
        })
    }

    /// Starts tracking writes.
    pub(super) fn track(&self) -> anyhow::Result<()> {
        let layout = self.ram.layout().clone();
        let (bitmap, stage) = (self.ram.dirty_bitmap(), self.stage.clone());
        let tracker = Stage2Tracker::new(layout, bitmap, Policy::default(), stage)?;
        let first = self.tracker.set(tracker).is_ok();
        anyhow::ensure!(first, "the guest is tracked already");
        Ok(())
    }

    /// Takes the virtual machine, if necessary from another guest.
    pub(super) fn lease_vm(self: &Arc<Self>) -> anyhow::Result<VmLease> {
        let mut holder = lock(&VM_HOLDER);
        let mut stage = lock(&self.stage.0);
        if let Some(stage) = &*stage {
            let vm = stage.vm().clone();
            return Ok(VmLease {
                vm,
                _holder: holder,
            });
        }
        if let Some(other) = holder.upgrade() {
            // The vCPU of the other guest exists only while that guest holds the lock, so this ends
            // its virtual machine.
            drop(lock(&other.stage.0).take());
        }
        *holder = Weak::new();
        let vm = self.machine()?;
        let stage2 = Stage2::map(&vm, &self.ram)?;
        if self.tracker.get().is_some() {
            // Marked pages are protected too, and fault once more.
            stage2.protect(0..self.ram.layout().ram_size())?;
        }
        *stage = Some(stage2);
        *holder = Arc::downgrade(self);
        Ok(VmLease {
            vm,
            _holder: holder,
        })
    }

    /// Releases the virtual machine, if this guest has it.
    pub(super) fn release_vm(&self) {
        // Wait for a thread that is taking the virtual machine: otherwise it would find no guest in
        // it, but the virtual machine still there.
        let _holder = lock(&VM_HOLDER);
        drop(lock(&self.stage.0).take());
    }

    /// Creates a virtual machine with as many address bits as the RAM needs.
    fn machine(&self) -> anyhow::Result<Vm> {
        match start::address_bits(self.ram.layout()) {
            36 => Vm::new(),
            more => Vm::options().address_bits(more).create(),
        }
        .context("failed to create a virtual machine")
    }
}

impl WriteProtection for OptionalStage {
    type Error = ProtectError;

    fn protect(&self, range: std::ops::Range<u64>) -> Result<(), ProtectError> {
        let stage = lock(&self.0);
        stage
            .as_ref()
            .map_or(Ok(()), |stage2| stage2.protect(range))
    }

    fn unprotect(&self, range: std::ops::Range<u64>) -> Result<(), ProtectError> {
        let stage = lock(&self.0);
        stage
            .as_ref()
            .map_or(Ok(()), |stage2| stage2.unprotect(range))
    }
}

/// Locks despite a panic while another guest ran: the value behind the lock is replaced in one
/// piece.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
