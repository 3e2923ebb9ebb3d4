//! Why the vCPUs are not paused.

use thiserror::Error;

/// The vCPUs are not paused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PauseError {
    /// Some are in the guest.
    #[error(
        "{running} vCPUs are in the guest: make them leave by a signal to their threads, then complete their I/O"
    )]
    Running {
        /// How many.
        running: usize,
    },
    /// Some have left the guest, and KVM may still have to write what their exits were answered
    /// with.
    #[error(
        "{pending} vCPUs may have I/O pending, which writes guest memory when it is completed: call Vcpu::complete_io on each"
    )]
    IoPending {
        /// How many.
        pending: usize,
    },
    /// Some were dropped with I/O pending. A duplicate of their descriptor may live on, and
    /// completes it.
    #[error(
        "{abandoned} vCPUs were dropped with I/O pending, which another descriptor of them would complete unseen: call \
         Vcpu::complete_io before a vCPU is dropped, or Vcpu::close where there is no other descriptor"
    )]
    Abandoned {
        /// How many.
        abandoned: usize,
    },
    /// None was created or adopted here: those of the machine are not known, and may run.
    #[error("these Vcpus have no vCPU: create the machine's vCPUs by them, or have them adopted")]
    NoVcpu,
    /// They are paused already.
    #[error("the vCPUs are paused already, by another thread: drop that Paused first")]
    AlreadyPaused,
}
