//! The conformance suite over every write protection that this system offers.
#![cfg(unix)]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
mod threads;

/// Threads of this process, with `mprotect`.
type Mprotected = threads::Threads<write_faults::Mprotect>;
write_tracking::conformance!(mprotect, Mprotected);

/// Threads of this process, with userfaultfd.
#[cfg(target_os = "linux")]
type Userfaulted = threads::Threads<write_faults::Userfaultfd>;
#[cfg(target_os = "linux")]
write_tracking::conformance!(userfaultfd, Userfaulted);

// KVM vCPUs, with userfaultfd.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
write_tracking::conformance!(kvm_userfaultfd, kvm::UserfaultedVm);

// A KVM vCPU, with read-only memory slots, which can't change while it runs.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
write_tracking::conformance!(kvm_read_only, kvm::ReadOnlyVm, stopped);
