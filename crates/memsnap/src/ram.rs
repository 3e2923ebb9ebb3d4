//! RAM that is to be captured.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use image_format::Footer;
use memory_writer::SnapshotError;
use nix::fcntl::OFlag;
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{FileReader, PageReader};

use crate::failure::Failure;
#[cfg(target_os = "linux")]
use crate::process::ProcessRam;

/// A guest's RAM.
pub enum Ram {
    File(RamFile),
    #[cfg(target_os = "linux")]
    Process(ProcessRam),
}

impl Ram {
    pub fn size(&self) -> u64 {
        match self {
            Self::File(ram) => ram.size,
            #[cfg(target_os = "linux")]
            Self::Process(ram) => ram.size(),
        }
    }

    pub fn reader(&self) -> Box<dyn PageReader + Sync + '_> {
        match self {
            Self::File(ram) => Box::new(FileReader::range(&ram.file, 0, ram.size)),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => Box::new(ram.reader()),
        }
    }

    /// Whether it is still all there: what is gone would have been taken for untouched.
    pub fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::File(ram) => ram.check(),
            #[cfg(target_os = "linux")]
            Self::Process(ram) => ram.check(),
        }
    }

    /// Why it could not be saved: of a file that was resized that tells more than that it ends too early.
    pub fn explain(&self, error: SnapshotError) -> anyhow::Error {
        match self {
            Self::File(ram) => ram.check().err().unwrap_or_else(|| error.into()),
            #[cfg(target_os = "linux")]
            Self::Process(_) => error.into(),
        }
    }
}

/// RAM in a file or memfd, whose size must stay.
#[derive(Debug)]
pub struct RamFile {
    path: PathBuf,
    file: File,
    size: u64,
}

impl RamFile {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let path = path.to_owned();
        Self::find(&path)?.ok_or(Failure::RamIsImage { path }.into())
    }

    /// `None` where it is a sealed image.
    pub fn find(path: &Path) -> anyhow::Result<Option<Self>> {
        // O_NONBLOCK: opening a FIFO must not wait for its writer.
        let file = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .with_context(|| format!("cannot open the RAM {path:?}"))?;
        let metadata = file.metadata()?;
        let path = path.to_owned();
        if !metadata.is_file() {
            return Err(Failure::NotRam { path }.into());
        }
        // A damaged footer is one.
        if !matches!(Footer::find(&file), Ok(None)) {
            return Ok(None);
        }
        let size = metadata.len();
        if size == 0 {
            return Err(Failure::NoBytes { path }.into());
        }
        Ok(Some(Self { path, file, size }))
    }

    fn check(&self) -> anyhow::Result<()> {
        let now = self.file.metadata()?.len();
        if now == self.size {
            return Ok(());
        }
        Err(Failure::RamResized {
            path: self.path.clone(),
            before: self.size,
            now,
        }
        .into())
    }
}

/// The page of this host in bytes.
pub fn host_page() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.map_or(4096, |page| page as u64)
}
