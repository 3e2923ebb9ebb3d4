//! RAM that is to be captured.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use image_format::Footer;
use nix::fcntl::OFlag;
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{FileReader, PageReader};

use crate::failure::Failure;

/// A guest's RAM in a file or memfd, whose size must stay.
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
        Ok(Some(Self { path, file, size }))
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn reader(&self) -> impl PageReader {
        FileReader::range(&self.file, 0, self.size)
    }

    /// Whether it is as large as it was: what was cut off reads as if it had never been touched.
    pub fn check_size(&self) -> anyhow::Result<()> {
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
