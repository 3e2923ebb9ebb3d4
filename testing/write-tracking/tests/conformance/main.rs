//! The conformance suites over every write protection and dirty log that this system offers.
#![cfg(unix)]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm_log;
mod soft;
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

/// Threads of this process that log their writes.
type LoggedBySoftware = soft::Soft<soft::None>;
write_tracking::log_conformance!(software_log, LoggedBySoftware);

// KVM's dirty log, with each time at which it protects pages again.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
write_tracking::log_conformance!(kvm_log_when_read, kvm_log::WhenRead);
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
write_tracking::log_conformance!(kvm_log_when_marked, kvm_log::WhenMarked);
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
write_tracking::log_conformance!(kvm_log_atomic_marks, kvm_log::AtomicMarks);
