//! The error of a pause.

use thiserror::Error;

/// An error of pausing the vCPUs.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PauseError {
    /// Some vCPUs are in the guest.
    #[error(
        "vCPUs are in the guest ({running}): make them leave by a signal to their threads, then \
         complete their I/O"
    )]
    Running {
        /// The number of these vCPUs.
        running: usize,
    },
    /// Some vCPUs have left the guest, and KVM may still have to write the results of their exits.
    #[error(
        "vCPUs may have I/O pending ({pending}), whose completion writes guest memory: call \
         Vcpu::complete_io on each"
    )]
    IoPending {
        /// The number of these vCPUs.
        pending: usize,
    },
    /// Some vCPUs were dropped with I/O pending. A duplicate of their descriptor may still be open
    /// and complete it.
    #[error(
        "vCPUs were dropped with I/O pending ({abandoned}), which another descriptor of them could \
         complete unnoticed: call Vcpu::complete_io before a vCPU is dropped, or Vcpu::close if it \
         has no other descriptor"
    )]
    Abandoned {
        /// The number of these vCPUs.
        abandoned: usize,
    },
    /// No vCPU was created or adopted here. Those of the virtual machine are unknown, and may run.
    #[error(
        "no vCPU was created or adopted through these Vcpus: create the vCPUs with \
         Vcpus::create, or pass them to Vcpus::adopt"
    )]
    NoVcpu,
    /// The vCPUs are paused already.
    #[error("the vCPUs are paused already: drop the existing Paused or PausedHarvest first")]
    AlreadyPaused,
}
