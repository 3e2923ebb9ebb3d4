//! The reasons for which a vCPU leaves its guest.

/// The reason for which a vCPU left its guest.
///
/// The tracker handles write faults. The VMM handles all other exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Exit {
    /// Another thread requested the exit.
    Canceled,
    /// The guest caused an exception that the hypervisor handles.
    Exception(Exception),
    /// The virtual timer fired. It stays masked until the VMM unmasks it.
    VtimerActivated,
    /// A reason unknown to this version of the crate, as the framework's number
    /// (`hv_exit_reason_t`).
    Unknown(u32),
}

/// An exception taken to the hypervisor (`hv_vcpu_exit_exception_t`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exception {
    /// ESR_EL2: the exception class in bits 31 to 26, and class-specific information below.
    pub syndrome: u64,
    /// FAR_EL2: the guest-virtual address, if the class has one.
    pub virtual_address: u64,
    /// The guest-physical address of an access that stage 2 denied.
    pub physical_address: u64,
}
