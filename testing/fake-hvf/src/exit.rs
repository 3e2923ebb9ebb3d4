//! The exits of a vCPU.

/// `hv_vcpu_exit_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuExit {
    /// `hv_exit_reason_t`
    pub reason: u32,
    pub exception: ExitException,
}

/// `hv_vcpu_exit_exception_t`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitException {
    pub syndrome: u64,
    pub virtual_address: u64,
    pub physical_address: u64,
}

/// The reasons of `hv_exit_reason_t`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Exit {
    Canceled,
    Exception(ExitException),
    VtimerActivated,
}
