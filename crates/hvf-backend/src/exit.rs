//! Why a vCPU left its guest.

/// Why a vCPU left its guest. What comes of it is the monitor's to decide; write faults are the tracker's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Exit {
    /// Another thread asked for it.
    Canceled,
    /// The guest did something that needs the monitor.
    Exception(Exception),
    /// The virtual timer fired, and is masked until the monitor unmasks it.
    VtimerActivated,
    /// A reason that this version does not know, as the framework's number (`hv_exit_reason_t`).
    Unknown(u32),
}

/// A trap into the hypervisor: `hv_vcpu_exit_exception_t`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exception {
    /// ESR_EL2: the class in bits 31 to 26, what is special to it below.
    pub syndrome: u64,
    /// FAR_EL2: the guest-virtual address, where the class has one.
    pub virtual_address: u64,
    /// The guest-physical address of an access that stage 2 did not let through.
    pub physical_address: u64,
}
