//! The implementation on Linux, the only system with KVM.

pub(crate) mod dirty_log;
mod machine;
mod memory;
pub(crate) mod open;
pub(crate) mod precopy;
pub(crate) mod ram;
pub(crate) mod slots;
mod sys;
pub(crate) mod vcpus;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
