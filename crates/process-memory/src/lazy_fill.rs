//! Detection of shared memory that a userfaultfd still fills.

mod unexamined;
mod visibility;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::makedev;
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::geteuid;
use page_reader::{FlaggedRegion, MappingsError, PageReader, ProcessRegion, printable};

use crate::proc_error::is_not_found;
use crate::sys::mapped_file::MappedFile;

pub use unexamined::{HiddenProcesses, Unexamined, UnexaminedProcess};
pub use visibility::hidden_processes;

/// Checks that no process fills the shared memory `file` page by page as it is accessed.
///
/// While a guest is restored by userfaultfd into a memfd or a file on tmpfs, only mappings that are
/// registered with the userfaultfd wait for missing pages. Everywhere else missing pages are zeros:
/// in a read of the file, and in any other mapping of it. Call this function before *and after* a
/// copy of the memory, and discard the copy if either call fails. The first call avoids useless
/// work. The second one finds a process that started to fill the memory during the copy.
///
/// The function searches the `smaps` of all processes for mappings of the same file. Only files on
/// tmpfs, hugetlbfs and overlayfs can be filled by userfaultfd, so files on other file systems are
/// not searched for. Neither are files on overlayfs that are
/// [known to be stored on disk](sparse_file::is_on_disk); other files on overlayfs must be open for
/// reading. The cost grows with the number of processes: about 0.1 ms each, and more for those that
/// map the file.
///
/// Returns the processes that may be filling the file and were not examined. These are processes
/// that run as the owner of the file and that this process may not examine. With `CAP_SYS_PTRACE`
/// there are none, except for processes with privileges that this process lacks. `/proc` may also
/// hide processes ([`HiddenProcesses`]): in a PID namespace other than the initial one, as in most
/// containers, and by the mount option `hidepid`. Callers that need certainty treat a value that is
/// not [empty](Unexamined::is_empty) as a failure.
///
/// # Errors
/// Returns [`LazyFillError::InProgress`] for a process whose mapping is being filled. The other
/// errors mean that the check failed.
///
/// # What is not detected
/// - A process that `/proc` hides. The returned value says that there may be some.
/// - A process of a user other than the file's owner that this process may not examine (without
///   `CAP_SYS_PTRACE`).
/// - On overlayfs, a process that has opened the file by another path than `file`: one in the
///   merged directory, the other in the upper directory. Newer kernels (Linux 6.18 is one) list
///   their mappings as those of two files.
/// - A fill that started and ended between the two calls.
/// - An abandoned fill: a process that ended, or closed its userfaultfd, before all pages were
///   filled. Its missing pages cannot be distinguished from memory that was never used.
///
/// # Examples
/// ```
/// let ram = tempfile::tempfile()?;
/// let unexamined = process_memory::check_lazy_fill(&ram)?;
/// if !unexamined.is_empty() {
///     eprintln!("warning: not examined: {unexamined}; these may still fill the memory");
/// }
/// // Copy the memory here.
/// process_memory::check_lazy_fill(&ram)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn check_lazy_fill(file: &File) -> Result<Unexamined, LazyFillError> {
    let metadata = file.metadata().map_err(LazyFillError::File)?;
    if !metadata.is_file() {
        return Ok(Unexamined::default());
    }
    let owner = metadata.uid();
    let backing = match file_system(file)? {
        // A layer that a userfaultfd cannot fill.
        OVERLAYFS_SUPER_MAGIC if sparse_file::is_on_disk(file).map_err(LazyFillError::File)? => {
            return Ok(Unexamined::default());
        }
        OVERLAYFS_SUPER_MAGIC => Backing::as_mapped(file, owner)?,
        TMPFS_MAGIC | HUGETLBFS_MAGIC => Backing {
            device: metadata.dev(),
            inode: metadata.ino(),
            owner,
        },
        _ => return Ok(Unexamined::default()),
    };
    backing.check()
}

/// An error of checking whether shared memory can be read: pages may be missing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyFillError {
    /// A process has the memory mapped, and a userfaultfd fills it page by page.
    #[error(
        "the memory is still being filled: in process {pid} ({command}) a userfaultfd fills \
         {region} as pages are accessed, and missing pages would be read as zeros: wait until the \
         restore has finished"
    )]
    InProgress {
        /// The process whose mapping is filled. Another process may fill it.
        pid: u32,
        /// The name of its program, control characters escaped.
        command: String,
        /// The mapping.
        region: Box<ProcessRegion>,
    },
    /// The file cannot be examined.
    #[error(
        "failed to check whether the memory is still being filled: its file cannot be examined: \
         {0}"
    )]
    File(#[source] io::Error),
    /// The processes cannot be listed.
    #[error(
        "failed to check whether the memory is still being filled: the processes cannot be listed: \
         mount /proc: {0}"
    )]
    Processes(#[source] io::Error),
    /// The mappings of a process have an unknown format, or those of this process cannot be read.
    #[error(
        "failed to check whether the memory is still being filled: the mappings of a process \
         cannot be listed: {0}"
    )]
    Mappings(#[from] MappingsError),
}

/// Checks that no process fills the files behind the host memory of `reader` page by page as they
/// are accessed, from offset 0 to the first offset without host memory.
///
/// Private anonymous memory passes: reads wait for the pages that a userfaultfd fills. Shared
/// memory of this process may be filled by any other process, so the limits are those of
/// [`check_lazy_fill`], which also says why to call it before and after a copy.
///
/// # Errors
/// Returns the errors of [`check_lazy_fill`].
pub fn check_lazy_fill_of_memory(
    reader: &(impl PageReader + ?Sized),
) -> Result<Unexamined, LazyFillError> {
    let regions = ProcessRegion::of_this_process()?;
    let (mut offset, mut unexamined) = (0, Unexamined::default());
    while let Some(memory) = reader.host_memory(offset, usize::MAX) {
        let start = memory.as_ptr().addr() as u64;
        let end = start + memory.len() as u64;
        let inside =
            |region: &&ProcessRegion| region.addresses.start < end && start < region.addresses.end;
        for region in regions.iter().filter(inside) {
            unexamined.merge(check_lazy_fill_of_region(region)?);
        }
        offset += memory.len() as u64;
    }
    Ok(unexamined)
}

/// Checks that no process fills the file behind the mapping `region` page by page as it is
/// accessed.
///
/// A mapping without a file passes. See [`check_lazy_fill`] for the limits of the check, and why to
/// call it before and after a copy. A process that cannot be examined is returned if it runs as the
/// same user as the caller.
///
/// # Errors
/// Returns the errors of [`check_lazy_fill`].
pub fn check_lazy_fill_of_region(region: &ProcessRegion) -> Result<Unexamined, LazyFillError> {
    if region.inode == 0 {
        return Ok(Unexamined::default());
    }
    Backing {
        device: device_of(region),
        inode: region.inode,
        owner: geteuid().as_raw(),
    }
    .check()
}

fn file_system(file: &File) -> Result<FsType, LazyFillError> {
    let file_system = fstatfs(file).map_err(|errno| LazyFillError::File(errno.into()))?;
    Ok(file_system.filesystem_type())
}

/// The file behind shared memory.
struct Backing {
    device: u64,
    inode: u64,
    owner: u32,
}

impl Backing {
    /// Determines the device and inode under which mappings of the file are listed. A file on
    /// overlayfs may be a file on tmpfs, and `fstat` returns the device and inode of neither.
    fn as_mapped(file: &File, owner: u32) -> Result<Self, LazyFillError> {
        let mapped = MappedFile::new(file).map_err(|errno| LazyFillError::File(errno.into()))?;
        let regions = ProcessRegion::of_this_process()?.into_iter();
        let mut behind = regions.filter(|region| region.addresses.contains(&mapped.address()));
        // The procfs of this process is not mounted at /proc.
        let region = behind
            .next()
            .ok_or_else(|| LazyFillError::Processes(io::ErrorKind::NotFound.into()))?;
        Ok(Self {
            device: device_of(&region),
            inode: region.inode,
            owner,
        })
    }

    fn check(&self) -> Result<Unexamined, LazyFillError> {
        let processes = fs::read_dir("/proc").map_err(LazyFillError::Processes)?;
        let (mut seen, mut unexamined) = (false, Vec::new());
        for entry in processes {
            let entry = entry.map_err(LazyFillError::Processes)?;
            let name = entry.file_name();
            if let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) {
                seen = true;
                unexamined.extend(self.check_process(pid)?);
            }
        }
        if !seen {
            // procfs is not mounted at /proc.
            return Err(LazyFillError::Processes(io::ErrorKind::NotFound.into()));
        }
        let hidden = hidden_processes().map_err(LazyFillError::Processes)?;
        Ok(Unexamined {
            processes: unexamined,
            hidden,
        })
    }

    fn check_process(&self, pid: u32) -> Result<Option<UnexaminedProcess>, LazyFillError> {
        let process = format!("/proc/{pid}");
        // The memory of a process whose first thread has ended is listed for its other threads
        // only.
        let found = match self.mapping_in(&process, pid) {
            Ok(None) => self.mapping_in_threads(&process, pid),
            found => found,
        };
        match found {
            Ok(Some(FillState::NotFilled) | None) | Err(MappingsError::Gone { .. }) => Ok(None),
            Ok(Some(FillState::Filled(region))) => Err(LazyFillError::InProgress {
                pid,
                command: command(&process),
                region,
            }),
            Err(MappingsError::Read { .. }) => {
                let unexamined = || UnexaminedProcess {
                    pid,
                    command: command(&process),
                };
                Ok(self.may_be_mapped_by(&process).then(unexamined))
            }
            Err(other) => Err(other.into()),
        }
    }

    /// Returns whether `process` fills a mapping of the file, or `None` if it has no memory.
    fn mapping_in(&self, process: &str, pid: u32) -> Result<Option<FillState>, MappingsError> {
        let regions = match ProcessRegion::list(process, pid) {
            Ok(regions) => regions,
            Err(MappingsError::Gone { .. }) => return Ok(None),
            Err(other) => return Err(other),
        };
        // smaps takes the kernel far longer to list.
        if !regions.iter().any(|region| self.is_behind(region)) {
            return Ok(Some(FillState::NotFilled));
        }
        let is_filled = |mapping: &FlaggedRegion| {
            mapping.flags.is_some_and(|flags| flags.filled_on_fault)
                && self.is_behind(&mapping.region)
        };
        let mappings = match FlaggedRegion::list(process, pid) {
            Ok(mappings) => mappings,
            // The thread has ended since. Others of the process may have the memory.
            Err(MappingsError::Gone { .. }) => return Ok(None),
            Err(other) => return Err(other),
        };
        let filled = mappings.into_iter().find(is_filled);
        Ok(Some(filled.map_or(FillState::NotFilled, |mapping| {
            FillState::Filled(Box::new(mapping.region))
        })))
    }

    fn mapping_in_threads(
        &self,
        process: &str,
        pid: u32,
    ) -> Result<Option<FillState>, MappingsError> {
        let Ok(threads) = fs::read_dir(format!("{process}/task")) else {
            return Ok(None);
        };
        for thread in threads.flatten() {
            let found = thread
                .path()
                .to_str()
                .map(|path| self.mapping_in(path, pid));
            if let Some(found) = found.transpose()?.flatten() {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Returns `true` if `region` is a shared mapping of the file. Filling a private mapping does
    /// not change the file.
    fn is_behind(&self, region: &ProcessRegion) -> bool {
        let identity = (device_of(region), region.inode);
        region.permissions.shared && identity == (self.device, self.inode)
    }

    /// Returns `true` if a process that cannot be examined may run as the owner of the file.
    fn may_be_mapped_by(&self, process: &str) -> bool {
        // The owner of the directory is root if the process is not dumpable, so its user ids are
        // read.
        match fs::read_to_string(format!("{process}/status")) {
            Ok(status) => {
                let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
                let mut ids = line.unwrap_or_default().split_ascii_whitespace();
                ids.any(|id| id.parse() == Ok(self.owner))
            }
            Err(error) => !is_not_found(&error),
        }
    }
}

fn device_of(region: &ProcessRegion) -> u64 {
    let (major, minor) = region.device;
    makedev(major.into(), minor.into())
}

enum FillState {
    NotFilled,
    Filled(Box<ProcessRegion>),
}

fn command(process: &str) -> String {
    let name = fs::read(format!("{process}/comm")).unwrap_or_default();
    printable(name.strip_suffix(b"\n").unwrap_or(&name))
}
