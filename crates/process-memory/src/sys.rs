//! System calls about other processes.

pub(crate) mod mapped_file;
pub(crate) mod ptrace;
