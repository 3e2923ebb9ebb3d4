//! A virtual machine whose vCPUs run in threads of their own. Each keeps a ledger in its half of
//! the RAM.

mod running;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::anyhow;
use kvm_backend::{GuestRam, MsrList, RamSlots, Vcpu, VcpuState, Vcpus, long_mode};
use kvm_ioctls::{Kvm, VmFd};
use page_reader::RamLayout;

use super::{ARRIVED, Access, CHECK, CHECKED, PAGE_TABLES, PROGRAM, WORK, program, run, run_until};
use crate::ledger::{self, Layout, SEED, Verdict, Words, front};

pub use running::{Paused, Running};

/// The number of vCPUs.
pub const VCPUS: usize = 2;

/// A value for each vCPU.
pub type EachVcpu<T> = [T; VCPUS];

/// A virtual machine with two vCPUs.
#[derive(Debug)]
pub struct Smp {
    kvm: Kvm,
    vm: VmFd,
    vcpus: Vcpus,
    msrs: MsrList,
    /// Unmaps the RAM from the guest before the RAM is unmapped.
    _slots: Arc<RamSlots>,
    ram: Arc<GuestRam>,
    halves: EachVcpu<Half>,
}

/// A vCPU and its half of the RAM.
#[derive(Debug)]
struct Half {
    /// Held while the vCPU runs.
    vcpu: Mutex<Vcpu>,
    /// The offset of the half in the RAM.
    start: u64,
}

impl Half {
    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        // A panic in KVM_RUN leaves the vCPU as after an error.
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the layout of each vCPU's ledger in a machine with this much RAM.
#[must_use]
pub const fn layout(ram: u64) -> Layout {
    Layout::of(ram / VCPUS as u64)
}

/// Returns the first random number of a vCPU's ledger. The ledgers differ.
#[must_use]
pub const fn seed(vcpu: usize) -> u64 {
    SEED + vcpu as u64
}

impl Smp {
    /// Creates a machine with empty memory in the layout of x86: a hole of 1 GiB below 4 GiB.
    pub fn new(ram: u64) -> anyhow::Result<Self> {
        let kvm = kvm_backend::open_kvm()?;
        let vm = kvm_backend::create_vm(&kvm)?;
        let msrs = MsrList::query(&kvm)?;
        let ram = Arc::new(GuestRam::new(RamLayout::x86_with_gap(ram)?)?);
        let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
        let vcpus = Vcpus::new(&vm)?;
        let half = |number: u64| -> anyhow::Result<Half> {
            Ok(Half {
                vcpu: Mutex::new(vcpus.create(&vm, number)?),
                start: ram.layout().ram_size() / VCPUS as u64 * number,
            })
        };
        let halves = [half(0)?, half(1)?];
        Ok(Self {
            kvm,
            vm,
            vcpus,
            msrs,
            _slots: slots,
            ram,
            halves,
        })
    }

    /// Loads the program, and puts the vCPUs at its start.
    pub fn boot(&self) -> anyhow::Result<()> {
        self.ram.write(PROGRAM, program::bytes())?;
        for (number, half) in self.halves.iter().enumerate() {
            let mut front = self.front(half);
            ledger::prepare(&mut front, layout(self.ram.layout().ram_size()));
            front.store(front::RANDOM, seed(number));
            front.store(front::PLACE, half.start + Layout::LEDGER);
            front.store_gap(self.ram.layout());
            let address = self
                .ram
                .layout()
                .guest_address_of(half.start + Layout::FRONT);
            let address = address.ok_or_else(|| anyhow!("the front page is not in the RAM"))?;
            let start = long_mode::Start {
                entry: PROGRAM,
                stack: address,
                page_tables: PAGE_TABLES,
            };
            let vcpu = half.vcpu();
            long_mode::boot(&self.kvm, &self.ram, &vcpu, &start)?;
            let mut registers = vcpu.get_regs()?;
            registers.rbx = address;
            vcpu.set_regs(&registers)?;
        }
        Ok(())
    }

    /// Returns the RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn front(&self, half: &Half) -> Access<'_> {
        Access {
            ram: &self.ram,
            start: half.start,
        }
    }

    /// Returns the number of steps that each vCPU has done. The vCPUs may run.
    pub fn steps(&self) -> EachVcpu<u64> {
        let steps = |half| self.front(half).load(front::STEPS);
        self.halves.each_ref().map(steps)
    }

    /// Runs each vCPU until it has done so many steps.
    pub fn work_until(&self, steps: EachVcpu<u64>) -> anyhow::Result<()> {
        // A restored vCPU may first answer the command of the original's host.
        while self
            .steps()
            .iter()
            .zip(steps)
            .any(|(done, goal)| *done < goal)
        {
            self.command(WORK, steps, ARRIVED)?;
        }
        Ok(())
    }

    /// Makes each vCPU check its ledger.
    pub fn check(&self) -> anyhow::Result<EachVcpu<Verdict>> {
        self.command(CHECK, [0; VCPUS], CHECKED)?;
        let verdict = |half| {
            let mut front = self.front(half);
            front.store(front::ORDER, WORK);
            ledger::verdict(&front)
        };
        Ok(self.halves.each_ref().map(verdict))
    }

    /// Gives all vCPUs a command, and runs them until they have answered.
    fn command(&self, order: u64, until: EachVcpu<u64>, answer: u8) -> anyhow::Result<()> {
        thread::scope(|scope| {
            let threads = self.halves.each_ref().map(|half| {
                let until = until[usize::from(half.start > 0)];
                scope.spawn(move || {
                    let mut front = self.front(half);
                    front.store(front::ORDER, order);
                    front.store(front::UNTIL, until);
                    run_until(&mut half.vcpu(), answer)
                })
            });
            threads.into_iter().try_for_each(|thread| {
                let ran = thread.join();
                ran.unwrap_or_else(|_| Err(anyhow!("the thread of a vCPU panicked")))
            })
        })
    }

    /// Sets the vCPUs to the states that [`Paused::states`] returned for another machine.
    pub fn set_states(&self, states: &[u8]) -> anyhow::Result<()> {
        let states: EachVcpu<Vec<u8>> = postcard::from_bytes(states)?;
        for (half, state) in self.halves.iter().zip(states) {
            let state = VcpuState::from_bytes(&state)?;
            // The ledger reads no MSRs, since it runs at privilege level 3.
            let _ = state.restore(&self.vm, &half.vcpu())?;
        }
        Ok(())
    }
}
