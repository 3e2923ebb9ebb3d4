//! Which vCPUs run, which have I/O pending, and when all of them are paused.

mod pause_error;
mod run_states;

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

pub use pause_error::PauseError;
use run_states::{RunState, RunStates};

/// The vCPUs of a virtual machine, for the one moment when none of them may write memory.
///
/// Every vCPU of the machine is [created](Self::create) or [adopted](Self::adopt) here: one that is not is missed by
/// [`pause`](Self::pause). Clones are the same set.
///
/// # Order at a pause
/// KVM ends an `in`, an `ins` or a read of MMIO only when the vCPU is run again, and writes the guest's registers or its
/// *memory* then. A page harvested or copied before that lacks the bytes, and after it nobody looks at the log again. So:
///
/// 1. each vCPU leaves the guest, its exit is answered as always, and its thread calls [`Vcpu::complete_io`];
/// 2. [`pause`](Self::pause) succeeds, and keeps every vCPU out of the guest as long as its value lives;
/// 3. the vCPUs' state is captured by that value. KVM may write to the guest's memory on the way (the flag of a preempted vCPU,
///    for one);
/// 4. [`DirtyLog::harvest`](crate::DirtyLog::harvest) takes that value, and gives back what keeps the vCPUs out;
/// 5. the pages are copied, and that is dropped: the guest goes on.
///
/// # Examples
/// Each vCPU has a thread of the VMM's:
/// ```no_run
/// use std::sync::Barrier;
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// use kvm_backend::{DirtyLog, GuestRam, Vcpu, Vcpus};
/// use kvm_ioctls::VcpuExit;
///
/// fn answer(exit: VcpuExit<'_>) { /* devices */ }
/// fn commit() -> std::io::Result<()> { Ok(()) /* the file, durable */ }
///
/// /// The thread of a vCPU, until it is to pause: a signal makes `KVM_RUN` return.
/// fn vcpu_thread(vcpu: &mut Vcpu, to_pause: &AtomicBool, paused: &Barrier) -> std::io::Result<()> {
///     while !to_pause.load(Ordering::Acquire) {
///         match vcpu.run() {
///             Ok(exit) => answer(exit),
///             Err(error) => match std::io::Error::from(error) {
///                 error if error.kind() == std::io::ErrorKind::Interrupted => {}
///                 error => return Err(error),
///             },
///         }
///     }
///     vcpu.complete_io(answer)?;
///     paused.wait();
///     Ok(())
/// }
///
/// /// The thread that saves, once all have come to the barrier.
/// fn save(vcpus: &Vcpus, log: &DirtyLog, ram: &GuestRam) -> Result<(), Box<dyn std::error::Error>> {
///     let paused = vcpus.pause()?; // an error while a vCPU runs or has I/O pending
///     // ... the vCPUs' state ...
///     let harvest = log.harvest(paused)?;
///     let epoch = ram.dirty_bitmap().begin_epoch()?;
///     // ... copy the pages of `epoch.bitmap()` ...
///     drop(harvest); // from here on the vCPUs may run
///     epoch.release_after(commit)?; // if it fails, the marks are back
///     Ok(())
/// }
/// ```
/// Without the pause there is no harvest that could be the last one of an image:
/// ```compile_fail,E0308
/// # fn example(log: &kvm_backend::DirtyLog, vcpus: &kvm_backend::Vcpus) {
/// log.harvest(vcpus);
/// # }
/// ```
/// A vCPU that is not paused has no state to capture, and after the harvest it is too late:
#[cfg_attr(target_arch = "x86_64", doc = "```compile_fail,E0382")]
#[cfg_attr(not(target_arch = "x86_64"), doc = "```ignore")]
/// # fn example(log: &kvm_backend::DirtyLog, kvm: &kvm_ioctls::Kvm, vcpu: &kvm_backend::Vcpu, paused: kvm_backend::Paused) {
/// let harvest = log.harvest(paused);
/// let state = kvm_backend::VcpuState::capture(kvm, &paused, vcpu);
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Vcpus {
    vm: Arc<VmFd>,
    states: Arc<RunStates>,
}

/// A vCPU that [`Vcpus`] know of. It is run by this value only; all else is done through the descriptor to which it derefs.
///
/// # Dropping
/// The descriptor is closed. What a duplicate of it does is not seen here: KVM keeps the vCPU for as long as its machine, and
/// completes pending I/O when the vCPU is run by any descriptor, from any thread of a process that shares this memory. So a vCPU that
/// is dropped with I/O pending has every later [`Vcpus::pause`] refused. [Complete](Self::complete_io) its I/O before, or
/// [close](Self::close) it, which states that it has no other descriptor.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    /// Dropped after the descriptor is closed.
    state: RunState,
}

/// No vCPU is in the guest, none has I/O pending, and none comes in until this is dropped.
#[derive(Debug)]
#[must_use = "dropped, it lets the vCPUs run"]
pub struct Paused(Vcpus);

impl Vcpus {
    /// No vCPU of `vm` so far.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>) -> Self {
        Self {
            vm: Arc::clone(vm),
            states: Arc::new(RunStates::new()),
        }
    }

    /// Creates a vCPU of this number.
    ///
    /// # Errors
    /// Whatever `KVM_CREATE_VCPU` says.
    pub fn create(&self, id: u64) -> io::Result<Vcpu> {
        let fd = self.vm.create_vcpu(id)?;
        let state = self.states.add_new();
        Ok(Vcpu { fd, state })
    }

    /// Takes a vCPU of this virtual machine that was created elsewhere, and may have run.
    #[must_use]
    pub fn adopt(&self, fd: VcpuFd) -> Vcpu {
        let state = self.states.add_adopted();
        Vcpu { fd, state }
    }

    /// Keeps all vCPUs out of the guest, where they are. It does not make them leave: that is the VMM's work, by signals to
    /// their threads or by `immediate_exit`.
    ///
    /// # Errors
    /// [`PauseError`]: a vCPU runs, has I/O pending, or was dropped with I/O pending.
    pub fn pause(&self) -> Result<Paused, PauseError> {
        self.states.pause()?;
        Ok(Paused(self.clone()))
    }

    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }
}

impl Vcpu {
    /// Runs the guest until it needs the VMM (`KVM_RUN`). Waits while the vCPUs are [paused](Vcpus::pause).
    ///
    /// # Errors
    /// Whatever `KVM_RUN` says: `EINTR` after a signal.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        let _in_guest = self.state.enter();
        self.fd.run()
    }

    /// Completes the instruction for which the vCPU last left the guest, without running any other.
    ///
    /// KVM ends an `in`, an `out` or an access to MMIO only when the vCPU is run again. Before that, the instruction pointer is
    /// still on it, and what an `in` or a read was answered with is not in the registers or not in *memory*. So nothing is
    /// captured, harvested or copied before: see [the order](Vcpus#order-at-a-pause). Answer the exit first, as always; then
    /// this call.
    ///
    /// One instruction may need several exits (`rep outsb`, MMIO across a page border): `handle` gets those that follow. It is not
    /// called for an instruction of one exit, nor where nothing is pending.
    ///
    /// # Errors
    /// Whatever `KVM_RUN` says, other than the `EINTR` that ends this. The I/O stays pending, as it
    /// does when `handle` panics: call this again.
    pub fn complete_io(&mut self, mut handle: impl FnMut(VcpuExit<'_>)) -> io::Result<()> {
        if !self.state.begin_completion() {
            return Ok(());
        }
        let immediate = ImmediateExit::set(&mut self.fd);
        loop {
            match immediate.0.run().map_err(io::Error::from) {
                Ok(exit) => handle(exit),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => break,
                Err(error) => return Err(error),
            }
        }
        drop(immediate);
        self.state.completed();
        Ok(())
    }

    /// Closes a vCPU that is not to run again, without completing its I/O.
    ///
    /// The caller knows that no other descriptor of the vCPU is open, in this process or elsewhere, but those that were
    /// [adopted](Vcpus::adopt): then nothing can run the vCPU any more, and pending I/O is never completed. An instruction that was to
    /// store what it read does not.
    pub fn close(mut self) {
        self.state.completed();
    }

    /// What KVM shares with the VMM of this vCPU: the details of an exit.
    pub fn get_kvm_run(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// Has the next `KVM_RUN` return at once, or not. For other threads this is a signal's work.
    pub fn set_kvm_immediate_exit(&mut self, immediate: u8) {
        self.fd.set_kvm_immediate_exit(immediate);
    }

    /// Whether it is one of these.
    pub(crate) fn is_of(&self, paused: &Paused) -> bool {
        self.state.is_of(&paused.0.states)
    }
}

/// Has `KVM_RUN` return at once, until this is dropped: also where an exit's handler panics.
struct ImmediateExit<'a>(&'a mut VcpuFd);

impl<'a> ImmediateExit<'a> {
    fn set(fd: &'a mut VcpuFd) -> Self {
        fd.set_kvm_immediate_exit(1);
        Self(fd)
    }
}

impl Drop for ImmediateExit<'_> {
    fn drop(&mut self) {
        self.0.set_kvm_immediate_exit(0);
    }
}

impl Deref for Vcpu {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl Paused {
    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        self.0.vm()
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.states.resume();
    }
}
