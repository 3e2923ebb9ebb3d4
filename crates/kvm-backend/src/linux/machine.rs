//! A virtual machine, by a descriptor of this crate, and the memory slots that this process uses.
//!
//! There is one [`Machine`] for a virtual machine, whichever of its descriptors is passed. Two
//! values are of one virtual machine if they share it, and it holds the slots that are in use.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VmFd};

use super::sys;

/// The virtual machines in use. The lock also serializes the comparison of descriptors.
static MACHINES: Mutex<Vec<Weak<Machine>>> = Mutex::new(Vec::new());

/// A virtual machine. The descriptor keeps it alive.
#[derive(Debug)]
pub(crate) struct Machine {
    fd: OwnedFd,
    /// The memory slots of all [`Slots`] of this virtual machine.
    slots: Mutex<BTreeSet<u32>>,
}

impl Machine {
    /// Returns the value of this virtual machine, which is new if none is in use.
    pub(crate) fn of(vm: &VmFd) -> io::Result<Arc<Self>> {
        let mut machines = lock(&MACHINES);
        machines.retain(|machine| machine.strong_count() > 0);
        for machine in machines.iter().filter_map(Weak::upgrade) {
            if machine.has(vm)? {
                return Ok(machine);
            }
        }
        let machine = Arc::new(Self {
            fd: sys::vm_descriptor(vm).try_clone_to_owned()?,
            slots: Mutex::default(),
        });
        machines.push(Arc::downgrade(&machine));
        Ok(machine)
    }

    /// Returns whether `vm` is this virtual machine.
    pub(crate) fn is(&self, vm: &VmFd) -> io::Result<bool> {
        let _serialized = lock(&MACHINES);
        self.has(vm)
    }

    /// Does what [`is`](Self::is) does, with the lock held.
    fn has(&self, vm: &VmFd) -> io::Result<bool> {
        sys::same_open_file(self.fd.as_fd(), sys::vm_descriptor(vm))
    }

    /// Takes memory slots for one owner, or returns the first that another owner has, or that is
    /// listed twice.
    pub(crate) fn take_slots(self: &Arc<Self>, numbers: &[u32]) -> Result<Slots, u32> {
        let mut slots = Slots {
            machine: Arc::clone(self),
            numbers: Vec::with_capacity(numbers.len()),
        };
        for number in numbers {
            if !lock(&self.slots).insert(*number) {
                return Err(*number);
            }
            slots.numbers.push(*number);
        }
        Ok(slots)
    }

    /// Returns the value of `KVM_CHECK_EXTENSION`: 0 if this KVM lacks the capability.
    pub(crate) fn check_extension(&self, capability: Cap) -> i32 {
        self.check_extension_raw(capability as u32)
    }

    /// Returns the value of `KVM_CHECK_EXTENSION` for a capability that `kvm-ioctls` does not name.
    pub(crate) fn check_extension_raw(&self, capability: u32) -> i32 {
        sys::check_extension(self.fd.as_fd(), capability).unwrap_or(0)
    }

    /// Enables a capability with one argument (`KVM_ENABLE_CAP`).
    pub(crate) fn enable_cap(&self, capability: u32, argument: u64) -> io::Result<()> {
        Ok(sys::enable_cap(self.fd.as_fd(), capability, argument)?)
    }

    /// Returns KVM's log of a slot of `pages` pages, one bit for each (`KVM_GET_DIRTY_LOG`).
    pub(crate) fn dirty_log(&self, slot: u32, pages: u64) -> io::Result<Vec<u64>> {
        Ok(sys::dirty_log(self.fd.as_fd(), slot, pages)?)
    }

    /// Clears pages of KVM's log of a slot, as [`sys::clear_dirty_log`] does.
    pub(crate) fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        num_pages: u32,
        words: &[u64],
    ) -> io::Result<()> {
        let fd = self.fd.as_fd();
        Ok(sys::clear_dirty_log(
            fd, slot, first_page, num_pages, words,
        )?)
    }

    /// Creates, changes or deletes a memory slot (`KVM_SET_USER_MEMORY_REGION`).
    ///
    /// # Safety
    /// The memory is mapped, may be written by a guest, and stays mapped until the slot is deleted.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn set_slot(&self, memory: &kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the caller upholds the same contract.
        Ok(unsafe { sys::set_user_memory_region(self.fd.as_fd(), memory) }?)
    }
}

/// Memory slots of a virtual machine that have one owner in this process, until this is dropped.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) machine: Arc<Machine>,
    /// The slot numbers, in the order in which they were taken.
    pub(crate) numbers: Vec<u32>,
}

impl Drop for Slots {
    fn drop(&mut self) {
        let mut taken = lock(&self.machine.slots);
        for number in &self.numbers {
            taken.remove(number);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one insertion or removal: a panic under the lock leaves none half-made.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::fs::File;

    use test_machine::needs;

    use super::*;

    #[test]
    fn descriptors_are_compared_by_their_open_file() {
        let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let duplicate = file.try_clone().unwrap();
        for compare in [sys::same_open_file, sys::same_open_file_by_flag] {
            let same = |a: &File, b: &File| compare(a.as_fd(), b.as_fd()).unwrap();
            assert!(same(&file, &file) && same(&file, &duplicate) && same(&duplicate, &file));
            assert!(!same(&file, &other) && !same(&other, &duplicate));
        }
    }

    #[test]
    fn machine_is_shared_and_ends_with_its_last_user() {
        needs!(Kvm);
        let kvm = crate::open_kvm().unwrap();
        let (vm, other) = (
            crate::create_vm(&kvm).unwrap(),
            crate::create_vm(&kvm).unwrap(),
        );
        let machine = Machine::of(&vm).unwrap();
        assert!(Arc::ptr_eq(&machine, &Machine::of(&vm).unwrap()));
        assert!(!Arc::ptr_eq(&machine, &Machine::of(&other).unwrap()));
        assert!(machine.is(&vm).unwrap() && !machine.is(&other).unwrap());
        assert!(sys::same_open_file_by_flag(machine.fd.as_fd(), sys::vm_descriptor(&vm)).unwrap());

        let taken = machine.take_slots(&[1, 2]).unwrap();
        assert_eq!(machine.take_slots(&[0, 2]).unwrap_err(), 2);
        assert_eq!(machine.take_slots(&[0, 0]).unwrap_err(), 0);
        drop(machine.take_slots(&[0]).unwrap());
        drop(taken);
        drop(machine.take_slots(&[2, 1]).unwrap());
    }
}
