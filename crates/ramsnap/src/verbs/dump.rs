//! `ramsnap dump`: a full image of a guest's RAM.

use std::path::PathBuf;

use clap::Args;
use memory_writer::{Layout, Seal};

use crate::args::{self, Extras, InProcess, Output, kept_seal, layouts};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::ram::{self, Ram, RamFile};
use crate::save;
use crate::session::Session;

/// Take a full image of a guest's RAM
///
/// The RAM is a file that the guest maps shared (QEMU: -object memory-backend-file,share=on; a file
/// in /dev/shm), a block device, or a memfd of a running VMM, as /proc/PID/fd/N; or, on Linux,
/// mappings of a process. Pause the guest during the dump: bytes that it changes are saved as they
/// are when each is read. RAM that is zero or was never touched takes no space. RAM that a `ramsnap
/// restore` is writing to is refused; a VMM's own locks of the file do not matter.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap dump /dev/shm/guest -o full.mem\n  \
    ramsnap dump /proc/4242/fd/17 -o full.mem --layout sealed --metadata vcpus.bin\n  \
    ramsnap dump --pid 4242 --region /memfd:ram -o full.mem")]
pub struct Dump {
    /// The file or memfd that contains the guest's RAM
    #[arg(value_name = "RAMFILE")]
    ram: Option<PathBuf>,
    #[command(flatten)]
    process: InProcess,
    #[command(flatten)]
    output: Output,
    /// The layout of the image
    #[arg(long, default_value = "packed", value_parser = layouts())]
    layout: Layout,
    /// The page size of the image; by default that of the host
    #[arg(long, value_name = "SIZE", value_parser = crate::numbers::page_size)]
    page_size: Option<u64>,
    /// Write zeros and untouched RAM too
    #[arg(long)]
    keep_zeros: bool,
    #[command(flatten)]
    extras: Extras,
}

impl Dump {
    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let files = self.ram.iter().chain([&self.output.path]).cloned();
        self.extras.and_inputs(files)
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let session = &self.process.session(session);
        let inputs = self.extras.and_inputs(self.ram.clone());
        save::check_output(&self.output, &inputs)?;
        let more = !self.extras.is_empty();
        args::check_records(self.layout, more, &self.output.path)?;
        let mut ram = self.open()?;
        ram.check_output(&self.output.path)?;
        let page_size = self.page_size.unwrap_or_else(ram::host_page);
        let seal = self.extras.add_to(Seal::new(), ram.size())?;
        let options = session
            .options("saving")
            .layout(self.layout)
            .seal(kept_seal(self.layout, seal))
            .skip_zeros(!self.keep_zeros)
            .skip_untouched(!self.keep_zeros);
        let mut writer = save::stage(session, &self.output, options, ram.size(), page_size)?;
        ram.hold(session)?;
        let written = writer.write_full(&ram.reader());
        written.map_err(|error| ram.explain(error))?;
        ram.check()?;
        // A stopped process resumes.
        drop(ram);
        save::commit(session, writer)?;
        Ok(ExitStatus::Success)
    }

    fn open(&self) -> anyhow::Result<Ram> {
        match (&self.ram, self.process.is_given()) {
            (Some(path), false) => Ok(Ram::File(RamFile::open(path)?)),
            (None, _) => self.process.find()?.ok_or(Failure::NoRam.into()),
            _ => Err(Failure::NoRam.into()),
        }
    }
}
