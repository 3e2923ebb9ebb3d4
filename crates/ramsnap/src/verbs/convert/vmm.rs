//! Conversions from and to the files of other VMMs.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use memory_image::{Chain, Image, Layout, NotFullError};
use memory_writer::Seal;
use page_reader::{PageReader, RamLayout};
use vmm_files::{
    CloudHypervisorSnapshot, ElfMachine, FilePlan, FileWriteError, GuestFile, Machine,
    WriteOptions, find_vmcoreinfo,
};

use super::Convert;
use crate::args::{ReadExtras, To, kept_seal};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::print::{self, size};
use crate::session::Session;
use crate::staged_dir::StagedDir;
use crate::{input, save};

impl Convert {
    /// Converts a file of another VMM.
    pub(super) fn convert_guest(
        &self,
        session: &Session,
        format: vmm_files::Format,
        extras: ReadExtras,
    ) -> anyhow::Result<ExitStatus> {
        let guest = self.open_guest(format)?;
        let paths: Vec<_> = guest.paths().map(Path::to_owned).collect();
        save::check_is_no_input(&self.output.path, &paths)?;
        if let Some(to) = self.vmm.to {
            return self.export(session, to, &guest, Some(guest.layout()));
        }
        let ram_size = guest.layout().ram_size();
        let layout = self.layout.unwrap_or(Layout::Packed);
        self.check_records(layout)?;
        let seal = extras.add_to(Seal::new(), ram_size)?;
        let options = session
            .options("converting")
            .layout(layout)
            .seal(kept_seal(layout, seal))
            .skip_untouched(true)
            .skip_zeros(!self.keep_zeros);
        let page_size = self.page_size.unwrap_or(input::RAW_PAGE);
        let mut writer = save::stage(session, &self.output, options, ram_size, page_size)?;
        writer.write_full(&guest)?;
        save::commit(session, writer)?;
        Ok(ExitStatus::Success)
    }

    fn open_guest(&self, format: vmm_files::Format) -> anyhow::Result<GuestFile> {
        let mut options = GuestFile::options();
        if let Some(machine) = self.extras.guest {
            options = options.machine(machine);
        }
        if !self.extras.region_at.is_empty() {
            options = options.layout(layout_of(&self.extras.region_at)?);
        }
        let blocks = self.vmm.ram_block.iter();
        let options = blocks.fold(options, |options, name| options.block(name));
        Ok(options.open(&self.input.path, format)?)
    }

    /// Writes a full image as a file of another program.
    pub(super) fn export_chain(
        &self,
        session: &Session,
        to: To,
        chain: &Chain,
    ) -> anyhow::Result<ExitStatus> {
        if !chain.is_full() {
            return Err(NotFullError::new(self.input.path.clone()).into());
        }
        if !self.no_verify {
            input::check_sums(session, chain.images())?;
        }
        let known = chain.images().find_map(Image::ram_layout);
        self.export(session, to, chain, known.as_ref())
    }

    /// Writes RAM as a file of another program. `known` are the addresses that the input records.
    fn export<R: PageReader>(
        &self,
        session: &Session,
        to: To,
        source: &R,
        known: Option<&RamLayout>,
    ) -> anyhow::Result<ExitStatus> {
        let ram_size = source
            .known_size()
            .context("the size of the RAM is not known")?;
        let recorded: Vec<_> = known.map_or_else(Vec::new, |it| it.addresses().collect());
        // An image of RAM whose addresses were not given records those from 0 on.
        if !recorded.is_empty() && recorded != [0..ram_size] {
            self.extras.check_regions(Some(&recorded))?;
        }
        let given = self.extras.regions_of(ram_size)?;
        let layout = match (given.is_empty(), known) {
            (false, _) => layout_of(&given)?,
            (true, Some(known)) => known.clone(),
            (true, None) if to == To::Firecracker => Machine::Firecracker.layout(ram_size)?,
            (true, None) => {
                let path = self.input.path.clone();
                return Err(Failure::AddressesUnknown { path }.into());
            }
        };
        let plan = match to {
            To::Elf => {
                let progress = &mut session.progress("looking for the kernel");
                session.hold();
                let note = find_vmcoreinfo(source, ram_size, progress);
                session.check("nothing was written")?;
                let note = note.with_context(|| format!("cannot read {:?}", self.input.path))?;
                FilePlan::elf(&layout, self.elf_machine()?, &note.unwrap_or_default())?
            }
            To::Lime => FilePlan::lime(&layout)?,
            To::Firecracker => {
                check_firecracker(&layout)?;
                let ranges: Vec<_> = layout.addresses().collect();
                FilePlan::flat(&layout, &ranges)?
            }
            To::CloudHypervisor => {
                let dir = self.vmm.snapshot.as_deref().unwrap_or(Path::new(""));
                let snapshot = CloudHypervisorSnapshot::open(dir)?;
                let plan = FilePlan::flat(&layout, snapshot.ranges())?;
                return self.write_directory(session, &snapshot, &plan, source);
            }
        };
        let staged = save::stage_early(session, &self.output)?;
        let written = self.write_plan(session, &plan, staged.file(), source)?;
        save::put_in_place(session, staged, || {
            self.report(session, to, ram_size, written)
        })?;
        Ok(ExitStatus::Success)
    }

    fn elf_machine(&self) -> Result<ElfMachine, Failure> {
        let of_guest = self.extras.guest.map(|guest| match guest.is_x86() {
            true => ElfMachine::X86_64,
            false => ElfMachine::Aarch64,
        });
        let machine = self.vmm.machine.or(of_guest).or(ElfMachine::of_host());
        machine.ok_or(Failure::NoElfMachine)
    }

    /// Writes the file of a plan. Returns the number of bytes of RAM that were written.
    fn write_plan<R: PageReader>(
        &self,
        session: &Session,
        plan: &FilePlan,
        file: &File,
        source: &R,
    ) -> anyhow::Result<u64> {
        let progress = &mut session.progress("converting");
        let (options, skip_zeros) = (WriteOptions::new(), !self.keep_zeros);
        match plan.write(file, source, &options, skip_zeros, progress) {
            Err(FileWriteError::Cancelled) => {
                session.check("nothing was written")?;
                Err(FileWriteError::Cancelled.into())
            }
            written => written.with_context(|| format!("cannot write {:?}", self.output.path)),
        }
    }

    /// Writes a snapshot directory under another name, and renames it when it is complete and
    /// durable.
    fn write_directory<R: PageReader>(
        &self,
        session: &Session,
        snapshot: &CloudHypervisorSnapshot,
        plan: &FilePlan,
        source: &R,
    ) -> anyhow::Result<ExitStatus> {
        let path = &self.output.path;
        if path.symlink_metadata().is_ok() {
            let path = path.clone();
            return Err(Failure::DirectoryExists { path }.into());
        }
        let failed = || format!("cannot write the directory {path:?}");
        let parent = save::dir_of(path);
        session.hold();
        let staged = StagedDir::beside(path).with_context(failed)?;
        for name in CloudHypervisorSnapshot::OTHERS {
            let from = snapshot.dir().join(name);
            let copied = fs::copy(&from, staged.path().join(name));
            copied.with_context(|| format!("cannot copy {from:?}"))?;
        }
        let memory = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(staged.path().join(CloudHypervisorSnapshot::MEMORY))
            .with_context(failed)?;
        let written = self.write_plan(session, plan, &memory, source)?;
        let names = CloudHypervisorSnapshot::OTHERS;
        for name in names
            .into_iter()
            .chain([CloudHypervisorSnapshot::MEMORY, "."])
        {
            let synced = File::open(staged.path().join(name)).and_then(|file| file.sync_all());
            synced.with_context(failed)?;
        }
        session.check("nothing was written")?;
        let critical = session.commit(path);
        staged.rename(path).with_context(failed)?;
        let synced = File::open(parent).and_then(|dir| dir.sync_all());
        synced
            .with_context(|| format!("{path:?} is in place, but may not survive a power loss"))?;
        critical.done();
        self.report(session, To::CloudHypervisor, plan.ram_size(), written)?;
        Ok(ExitStatus::Success)
    }

    fn report(&self, session: &Session, to: To, ram_size: u64, written: u64) -> anyhow::Result<()> {
        let (path, noun) = (print::path(&self.output.path), to.noun());
        let (ram_size, written) = (size(ram_size), size(written));
        let text = format!("{path}: {noun} of {ram_size} of RAM, {written} present");
        Ok(session.report(&text)?)
    }
}

fn layout_of(regions: &[Range<u64>]) -> anyhow::Result<RamLayout> {
    let regions = regions
        .iter()
        .map(|region| (region.start, region.end - region.start));
    Ok(RamLayout::new(regions)?)
}

/// Refuses RAM at other addresses than Firecracker restores it at.
fn check_firecracker(layout: &RamLayout) -> Result<(), Failure> {
    let is_of = |machine: Machine| {
        let expected = machine.layout(layout.ram_size());
        expected.is_ok_and(|it| it.addresses().eq(layout.addresses()))
    };
    match is_of(Machine::Firecracker) || is_of(Machine::FirecrackerArm64) {
        true => Ok(()),
        false => Err(Failure::NotOfFirecracker {
            regions: layout.to_string(),
        }),
    }
}
