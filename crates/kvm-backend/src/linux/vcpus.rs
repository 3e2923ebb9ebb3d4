//! Tracks which vCPUs run and which have I/O pending, and pauses all of them.

mod pause_error;
mod run_states;

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

pub use pause_error::PauseError;
use run_states::{RunState, RunStates};

use super::machine::Machine;

/// The vCPUs of a virtual machine, which can be paused so that none of them writes memory.
///
/// Every vCPU of the virtual machine must be [created](Self::create) or [adopted](Self::adopt)
/// here: [`pause`](Self::pause) does not detect others. Clones are the same set.
///
/// # Order at a pause
/// KVM completes an `in`, an `ins` or a read of MMIO only when the vCPU is run again, and writes
/// the guest's registers or its *memory* then. A page that is harvested or copied before that lacks
/// these bytes, and no later harvest of this image finds them. The order is therefore:
///
/// 1. Each vCPU leaves the guest. The VMM handles the exit as usual, and its thread calls
///    [`Vcpu::complete_io`].
/// 2. [`pause`](Self::pause) succeeds. The returned value keeps every vCPU out of the guest.
/// 3. The state of the vCPUs is captured with that value. The capture may make KVM write to guest
///    memory (for example the flag of a preempted vCPU).
/// 4. [`DirtyLog::harvest`](crate::DirtyLog::harvest) takes that value, and returns another that
///    keeps the vCPUs out of the guest.
/// 5. [`PausedHarvest::begin_epoch`](crate::PausedHarvest::begin_epoch) takes the marks. The pages
///    are copied, and the value of the harvest is dropped: the vCPUs may run.
///
/// If a step is skipped:
/// - **Complete I/O**: KVM writes the bytes after the pages were copied, and the image lacks them.
///   `pause` therefore fails.
/// - **Capture**: the image has no vCPU state. A capture after the harvest may let KVM write a page
///   that the image then lacks. The harvest therefore consumes the pause that the capture needs.
/// - **Harvest**: the pages that were written since the last harvest are still in KVM's log. An
///   image without them would mix two moments. Therefore only a harvest begins an epoch.
/// - **Copy**: releasing the epoch discards the marks of pages that are in no image. All later
///   diffs lack these pages too, until the guest writes them again.
///
/// # Examples
/// Each vCPU has its own thread:
/// ```no_run
/// use std::sync::Barrier;
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// use kvm_backend::{DirtyLog, Vcpu, Vcpus};
/// use kvm_ioctls::VcpuExit;
///
/// fn handle(exit: VcpuExit<'_>) { /* devices */ }
/// fn commit() -> std::io::Result<()> { Ok(()) /* makes the file durable */ }
///
/// /// Runs a vCPU until a pause is requested: a signal makes `KVM_RUN` return.
/// fn vcpu_thread(
///     vcpu: &mut Vcpu,
///     to_pause: &AtomicBool,
///     paused: &Barrier,
/// ) -> std::io::Result<()> {
///     while !to_pause.load(Ordering::Acquire) {
///         match vcpu.run() {
///             Ok(exit) => handle(exit),
///             Err(error) => match std::io::Error::from(error) {
///                 error if error.kind() == std::io::ErrorKind::Interrupted => {}
///                 error => return Err(error),
///             },
///         }
///     }
///     vcpu.complete_io(handle)?;
///     paused.wait();
///     Ok(())
/// }
///
/// /// Saves the guest, after all vCPU threads have reached the barrier.
/// fn save(vcpus: &Vcpus, log: &DirtyLog) -> Result<(), Box<dyn std::error::Error>> {
///     let paused = vcpus.pause()?; // an error while a vCPU runs or has I/O pending
///     // ... capture the vCPUs' state ...
///     let harvest = log.harvest(paused)?;
///     let epoch = harvest.begin_epoch()?;
///     // ... copy the pages of `epoch.bitmap()` ...
///     drop(harvest); // the vCPUs may run
///     epoch.release_after(commit)?; // restores the marks if `commit` fails
///     Ok(())
/// }
/// ```
/// The last harvest of an image requires a pause:
/// ```compile_fail,E0308
/// # fn example(log: &kvm_backend::DirtyLog, vcpus: &kvm_backend::Vcpus) {
/// log.harvest(vcpus);
/// # }
/// ```
/// The state can't be captured after the harvest, which consumes the pause:
#[cfg_attr(target_arch = "x86_64", doc = "```compile_fail,E0382")]
#[cfg_attr(not(target_arch = "x86_64"), doc = "```ignore")]
/// # fn example(
/// #     log: &kvm_backend::DirtyLog,
/// #     msrs: &kvm_backend::MsrList,
/// #     vcpu: &kvm_backend::Vcpu,
/// #     paused: kvm_backend::Paused,
/// # ) {
/// let harvest = log.harvest(paused);
/// let state = kvm_backend::VcpuState::capture(msrs, &paused, vcpu);
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Vcpus {
    machine: Arc<Machine>,
    states: Arc<RunStates>,
}

/// A vCPU of a set of [`Vcpus`]. Only this value runs it. It derefs to its descriptor for
/// everything else.
///
/// # Dropping
/// Dropping the value closes its descriptor. Uses of a duplicate of the descriptor are not tracked:
/// KVM keeps the vCPU as long as its virtual machine exists, and completes pending I/O when the
/// vCPU is run through any descriptor, from any thread of a process that shares this memory. After
/// a vCPU is dropped with I/O pending, every [`Vcpus::pause`] therefore fails.
/// [Complete](Self::complete_io) its I/O first, or [close](Self::close) it, which states that it
/// has no other descriptor.
#[derive(Debug)]
#[must_use = "the vCPU is closed when this is dropped"]
pub struct Vcpu {
    fd: VcpuFd,
    /// Dropped after the descriptor is closed.
    state: RunState,
}

/// A pause: until the value is dropped, no vCPU is in the guest, none has I/O pending, and none
/// enters.
#[derive(Debug)]
#[must_use = "the vCPUs may run when this is dropped"]
pub struct Paused(Vcpus);

impl Vcpus {
    /// Creates an empty set of vCPUs of `vm`.
    ///
    /// The value has a descriptor of its own for the virtual machine, which therefore exists at
    /// least as long as the value. The VMM keeps its `VmFd` in any way.
    ///
    /// # Errors
    /// Returns an error if the descriptor can't be duplicated.
    pub fn new(vm: &VmFd) -> io::Result<Self> {
        Ok(Self {
            machine: Machine::of(vm)?,
            states: Arc::new(RunStates::new()),
        })
    }

    /// Creates the vCPU with this number of `vm`, the virtual machine of the set.
    ///
    /// # Errors
    /// Returns any error of `KVM_CREATE_VCPU`, and [`InvalidInput`](io::ErrorKind::InvalidInput) if
    /// `vm` is another virtual machine.
    pub fn create(&self, vm: &VmFd, id: u64) -> io::Result<Vcpu> {
        if !self.machine.is(vm)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the set is of the vCPUs of another virtual machine: pass the VmFd that was passed \
                 to Vcpus::new",
            ));
        }
        let fd = vm.create_vcpu(id)?;
        let state = self.states.add_new();
        Ok(Vcpu { fd, state })
    }

    /// Adds a vCPU of this virtual machine that was created elsewhere and may have run.
    ///
    /// <div class="warning">
    ///
    /// A vCPU of another virtual machine is not detected. Linux does not report which virtual
    /// machine the descriptor of a vCPU belongs to: its name in `/proc/self/fd` is `kvm-vcpu` and
    /// the number of the vCPU, its `fdinfo` and `kcmp` say nothing of the virtual machine, and its
    /// statistics (`KVM_GET_STATS_FD`) name the process only. Adopt only vCPUs that the `VmFd` of
    /// [`new`](Self::new) has created, and all of them. The vCPUs of that `VmFd` that are not in
    /// the set run on during a pause, and the image then lacks what they write.
    ///
    /// </div>
    pub fn adopt(&self, fd: VcpuFd) -> Vcpu {
        let state = self.states.add_adopted();
        Vcpu { fd, state }
    }

    /// Keeps all vCPUs out of the guest. It does not make them leave: the VMM does, by signals to
    /// their threads or by `immediate_exit`.
    ///
    /// # Errors
    /// Returns a [`PauseError`]: a vCPU runs, has I/O pending, or was dropped with I/O pending.
    pub fn pause(&self) -> Result<Paused, PauseError> {
        self.states.pause()?;
        Ok(Paused(self.clone()))
    }
}

impl Vcpu {
    /// Runs the guest until it exits to the VMM (`KVM_RUN`). Waits while the vCPUs are
    /// [paused](Vcpus::pause).
    ///
    /// # Errors
    /// Returns the error of `KVM_RUN`, such as `EINTR` after a signal.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        let _in_guest = self.state.enter();
        self.fd.run()
    }

    /// Completes the instruction for which the vCPU last left the guest, without running another.
    ///
    /// KVM completes an `in`, an `out` or an access to MMIO only when the vCPU is run again. Before
    /// that, the instruction pointer still points to the instruction, and the result of an `in` or
    /// a read is not in the registers or not in *memory*. So capture, harvest and copy nothing
    /// before: see [the order](Vcpus#order-at-a-pause). Handle the exit first, as usual, then call
    /// this.
    ///
    /// One instruction may need several exits (`rep outsb`, MMIO across a page border): `handle`
    /// gets the exits after the first. It is not called if the instruction has one exit or nothing
    /// is pending.
    ///
    /// # Errors
    /// Returns any error of `KVM_RUN`, other than the `EINTR` that ends the call. The I/O then
    /// stays pending, as it does when `handle` panics: call this again.
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

    /// Closes a vCPU without completing its I/O. It can't run again.
    ///
    /// The caller states that no other descriptor of the vCPU is open, in this process or another,
    /// except [adopted](Vcpus::adopt) ones. Then nothing can run the vCPU any more, and its pending
    /// I/O is never completed: an instruction that was to store its input does not.
    pub fn close(mut self) {
        self.state.completed();
    }

    /// Returns the memory that KVM shares with the VMM for this vCPU: the details of an exit.
    pub fn get_kvm_run(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// Sets whether the next `KVM_RUN` returns at once. Other threads send a signal instead.
    pub fn set_kvm_immediate_exit(&mut self, immediate: u8) {
        self.fd.set_kvm_immediate_exit(immediate);
    }

    /// Returns whether this vCPU is one of the paused ones.
    pub(crate) fn is_of(&self, paused: &Paused) -> bool {
        self.state.is_of(&paused.0.states)
    }
}

/// Makes `KVM_RUN` return at once until it is dropped, even if an exit handler panics.
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
    /// Returns the virtual machine.
    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.0.machine
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.states.resume();
    }
}
