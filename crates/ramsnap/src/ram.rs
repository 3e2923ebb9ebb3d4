//! The RAM of a guest, as the source of a snapshot.

mod contents;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use image_format::RAW_UNIT;
use memory_writer::SnapshotError;
use nix::fcntl::OFlag;
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{FileReader, PageReader};

use crate::device;
use crate::failure::Failure;
#[cfg(target_os = "linux")]
use crate::process::{self, ProcessRam, Region};
use crate::ram_lock;
use crate::session::Session;

/// A guest's RAM.
pub enum Ram {
    File(RamFile),
    #[cfg(target_os = "linux")]
    Process(Box<ProcessRam>),
}

impl Ram {
    pub fn size(&self) -> u64 {
        match self {
            Self::File(ram) => ram.size,
            #[cfg(target_os = "linux")]
            Self::Process(ram) => ram.size(),
        }
    }

    /// Returns the error for an old state that has `old` bytes of RAM, and not as many as this. For
    /// a larger mapping, which may begin with the RAM, it names the part to give.
    pub fn other_size(&self, old: u64) -> Failure {
        let new = self.size();
        #[cfg(target_os = "linux")]
        if let Self::Process(ram) = self
            && let Some((pid, range)) = ram.only_region().filter(|_| new > old)
        {
            let proposed = range.start..range.start + old;
            let [region, proposed] = [range, proposed].map(|it| Region::Range(it).to_string());
            return Failure::LargerRegion {
                pid,
                region,
                proposed,
                old,
                new,
            };
        }
        Failure::OtherGuest { old, new }
    }

    pub fn reader(&self) -> Box<dyn PageReader + Sync + '_> {
        match self {
            Self::File(ram) => Box::new(FileReader::range(&ram.file, 0, ram.size)),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => Box::new(ram.reader()),
        }
    }

    /// Stops the process, unless its guest is paused, until this is dropped.
    ///
    /// Called last before the RAM is read: steps that may fail or take time must not run while a
    /// guest is stopped.
    #[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
    pub fn hold(&mut self, session: &Session) -> anyhow::Result<()> {
        match self {
            Self::File(_) => Ok(()),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => ram.hold(session),
        }
    }

    /// Refuses an output that a process has mapped as its RAM.
    #[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
    pub fn check_output(&self, output: &Path) -> Result<(), Failure> {
        match self {
            // A named file was compared by its name.
            Self::File(_) => Ok(()),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => match ram.is_mapped_from(output) {
                true => Err(Failure::OutputIsInput {
                    path: output.to_owned(),
                }),
                false => Ok(()),
            },
        }
    }

    /// Checks that all of the RAM still exists. Missing RAM would have been read as untouched.
    pub fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::File(ram) => ram.check(),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => ram.check(),
        }
    }

    /// Returns the reason why the RAM could not be saved. For a resized file, the reason is the
    /// change of its size, not the early end that `error` reports.
    pub fn explain(&self, error: SnapshotError) -> anyhow::Error {
        match self {
            Self::File(ram) => ram.check().err().unwrap_or_else(|| error.into()),
            #[cfg(target_os = "linux")]
            Self::Process(_) => error.into(),
        }
    }
}

/// RAM in a file or memfd, whose size must not change.
#[derive(Debug)]
pub struct RamFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl RamFile {
    /// Opens the file. The guest writes its contents, so they decide nothing: only the size can
    /// show that the file is not RAM. A warning is printed if it looks like another file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        // O_NONBLOCK: opening a FIFO must not wait for its writer.
        let file = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .with_context(|| format!("cannot open the RAM {path:?}"))?;
        let metadata = file.metadata();
        let metadata = metadata.with_context(|| format!("cannot look at the RAM {path:?}"))?;
        let path = path.to_owned();
        if !device::can_hold_ram(&metadata) {
            return Err(Failure::NotRam { path }.into());
        }
        let looking = || format!("cannot look at the RAM {path:?}");
        let size = device::size(&file).with_context(looking)?;
        if size == 0 {
            return Err(Failure::NoBytes { path }.into());
        }
        if !size.is_multiple_of(RAW_UNIT) {
            return Err(Failure::RamIsImage { path, size }.into());
        }
        ram_lock::check_not_restored(&file, &format!("{path:?}"))?;
        let ram = Self { path, file, size };
        ram.check_filled(true)?;
        contents::warn_if_known(&ram.path, &ram.file);
        Ok(ram)
    }

    fn check(&self) -> anyhow::Result<()> {
        let now = device::size(&self.file);
        let now = now.with_context(|| format!("cannot look at the RAM {:?}", self.path))?;
        if now != self.size {
            return Err(Failure::RamResized {
                path: self.path.clone(),
                before: self.size,
                now,
            }
            .into());
        }
        // Filling may have begun after the file was opened.
        self.check_filled(false)
    }

    /// Refuses RAM that a process is still filling by userfaultfd: missing pages are read as zeros.
    #[cfg(target_os = "linux")]
    fn check_filled(&self, warn: bool) -> anyhow::Result<()> {
        let path = &self.path;
        let unexamined = process_memory::check_lazy_fill(&self.file)
            .with_context(|| format!("cannot capture the RAM {path:?}"))?;
        if warn {
            process::warn_of_unexamined(&format!("{path:?}"), &unexamined);
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    fn check_filled(&self, _warn: bool) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Returns the page size of this host in bytes.
pub fn host_page() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.map_or(4096, |page| page as u64)
}

#[cfg(all(test, target_os = "linux"))]
#[path = "../tests/support/missing.rs"]
#[allow(unsafe_code)]
mod missing;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use test_machine::needs;

    use super::*;

    #[test]
    fn filling_that_begins_after_the_file_was_opened_is_found() {
        needs!(Userfaultfd, Root);
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let ram = RamFile::open(file.path()).unwrap();
        ram.check().unwrap();
        let fault = missing::register(file.as_file(), 1 << 20);
        let error = ram.check().unwrap_err();
        let found = error.downcast_ref::<process_memory::LazyFillError>();
        assert!(
            matches!(found, Some(process_memory::LazyFillError::InProgress { pid, .. }) if *pid == std::process::id()),
            "{error:?}"
        );
        drop(fault);
        ram.check().unwrap();
    }
}
