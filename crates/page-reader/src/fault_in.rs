//! Mapping pages before they are loaded.

use std::io;

use host_memory::HostMemory;

/// Maps the pages of `memory`, as a load of each page would.
///
/// A load of a page that cannot be provided raises `SIGBUS`, which ends the process: on a full
/// tmpfs, without a free huge page, past the end of a truncated file, or in memory with a hardware
/// error. This function returns an error instead. Later changes to the pages, such as a punched
/// hole or a truncation, are not covered.
///
/// Memory that is filled by userfaultfd is waited for, unless the userfaultfd serves user-mode
/// faults only; such memory is left unchanged. On systems other than Linux, and before Linux 5.14,
/// the function does nothing.
///
/// # Errors
/// Returns `EFAULT` if a load would raise `SIGBUS`, `EHWPOISON` for memory with a hardware error,
/// and `ENOMEM` if memory or the mapping is missing.
///
/// # Examples
/// ```
/// use page_reader::{HostMemory, fault_in};
///
/// let ram = vec![7; 4096];
/// fault_in(HostMemory::from(&ram[..]))?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn fault_in(memory: HostMemory<'_>) -> io::Result<()> {
    if memory.is_empty() {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    return crate::sys::fault_in(memory);
    #[cfg(not(target_os = "linux"))]
    Ok(())
}
