//! `ramsnap restore`: restores the RAM of a chain for a guest.

#[cfg(target_os = "linux")]
mod huge_pages;
mod in_place;
#[cfg(target_os = "linux")]
mod reserve;
mod writable;
mod written_ram;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::Chain;

use crate::args::{Formats, FromDir, ImageFile, Output, RawImages};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::memory_reserve::{self, MemoryReserve};
use crate::print::{self, size};
use crate::session::Session;
use crate::{input, save};
#[cfg(not(target_os = "linux"))]
use in_place::Plan;
use in_place::{Begun, InPlace};
#[cfg(target_os = "linux")]
use reserve::Plan;

/// Restore the RAM: into a new file, or into existing RAM
///
/// A new file appears when it is complete, and is sparse where the RAM is zero. An existing file, a
/// block device or a memfd (/proc/PID/fd/N) is written in place, where a VMM may have mapped it. It
/// must be as large as the RAM, and must be empty unless --force is given. No byte of it changes
/// before all checks have passed: the checksums are right, the file can be written, and space is
/// reserved, on ext4, XFS, tmpfs and hugetlbfs. Other file systems (btrfs) cannot reserve space: as
/// much as the RAM needs must be free, and a warning is printed; quotas are not compared. If
/// writing fails afterwards or is interrupted, the file is left empty, or if that fails (btrfs,
/// where a quota is used up), the message states that it holds a part of the RAM.
///
/// Start the guest after ramsnap has ended. RAM that is not empty at the last check is refused, so
/// the RAM of a guest that was started during the earlier checks is unchanged. A guest that first
/// writes to its RAM after the last check is not noticed, and its RAM is overwritten. RAM that
/// ramsnap is reading is refused, and ramsnap refuses to read RAM that is being restored. A VMM's
/// own locks of the file do not matter. Give the path by which the VMM has opened the file: on
/// overlayfs, the file in a layer is another file, as is one behind FUSE, and nothing is noticed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap restore full.mem d1.mem -o /dev/shm/guest\n  \
    ramsnap restore --chain snapshots d2.mem -o /dev/shm/guest\n  \
    ramsnap restore full.mem -o /proc/4242/fd/17 --force\n  \
    ramsnap restore raw:full.raw d1.mem -o /dev/shm/guest")]
pub struct Restore {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// The file or memfd to write the RAM to
    #[arg(short, long, value_name = "RAMFILE")]
    output: PathBuf,
    /// Overwrite RAM that is not empty
    #[arg(long)]
    force: bool,
    /// Restore though this process holds the lock of a ramsnap that reads the RAM; repeat it for
    /// several
    ///
    /// Any process that may read the RAM can take this lock, and the error names those that have.
    /// Give only those that are not a ramsnap: an image that a ramsnap reads meanwhile would have
    /// bytes of both states. Processes that are not given still prevent the restore, and so does a
    /// lock whose holder cannot be found: root, outside of containers, finds all.
    #[cfg(target_os = "linux")]
    #[arg(long, value_name = "PID")]
    ignore_lock: Vec<u32>,
    /// Refuse raw images, which have no checksums
    #[arg(long, conflicts_with = "no_verify")]
    verify: bool,
    /// Do not compare the images with their checksums first
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Restore {
    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let files = input::paths(&self.files).into_iter();
        files.chain([self.output.clone()]).collect()
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        save::check_is_no_stream(&self.output)?;
        save::check_is_no_input(&self.output, &input::paths(&self.files))?;
        let in_place = self.output.exists();
        match in_place {
            true => memory_reserve::check_in_place(&self.output)?,
            false => memory_reserve::check_new(&self.output)?,
        }
        let chain = self.from.open(0, &self.files, |files| {
            input::full_chain(session, files, self.formats, &self.raw)
        })?;
        if self.verify
            && let Some(raw) = chain.images().find(|image| image.footer().is_none())
        {
            let path = raw.path().to_owned();
            return Err(Failure::NothingToVerify { path }.into());
        }
        if in_place {
            self.in_place(session, &chain)?;
        } else {
            self.new_file(session, &chain)?;
        }
        Ok(ExitStatus::Success)
    }

    /// Returns the processes that may hold the lock of the RAM.
    #[cfg(target_os = "linux")]
    fn ignored(&self) -> &[u32] {
        &self.ignore_lock
    }

    #[cfg(not(target_os = "linux"))]
    fn ignored(&self) -> &[u32] {
        &[]
    }

    /// Compares the images with their checksums: once there is a place for the RAM, and before it
    /// is written.
    fn check(&self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        match self.no_verify {
            true => Ok(()),
            false => input::check_sums(session, chain.images()),
        }
    }

    fn new_file(&self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        let output = Output {
            path: self.output.clone(),
            force: false,
        };
        let options = session.options("restoring");
        let options = options.skip_untouched(true).skip_zeros(true);
        let page_size = save::page_size(chain)?;
        let mut writer = save::stage(session, &output, options, chain.ram_size(), page_size)?;
        save::check_room_but_zeros(session, &writer, chain)?;
        self.check(session, chain)?;
        save::write_chain(&mut writer, chain)?;
        save::commit(session, writer)
    }

    /// The RAM does not change before its last check. A guest that begins to write after that check
    /// cannot be noticed: no system call compares a file and writes to it in one step.
    fn in_place(&self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        let path = &self.output;
        let target = InPlace::open(session, path, chain, self.force, self.ignored())?;
        target.check_writable()?;
        let holds = target.holds_anything()?;
        let refused = || Failure::TargetInUse { path: path.clone() };
        if holds && !self.force {
            return Err(refused().into());
        }
        // A signal gives back what is reserved.
        session.hold();
        target.check_room(chain, holds)?;
        self.check(session, chain)?;
        session.check("the output was not written to")?;
        let memory = MemoryReserve::in_place(path)?;
        let plan = target.reserve(chain, holds)?;
        // A guest may have been started with the file during the checks.
        if !self.force && target.holds_anything()? {
            plan.leave_reserved();
            return Err(refused().into());
        }
        session.check("the output was not written to")?;
        if holds {
            target.try_writing()?;
        }
        self.overwrite(session, chain, target, plan, memory)
    }

    fn overwrite(
        &self,
        session: &Session,
        chain: &Chain,
        mut target: InPlace<'_>,
        plan: Plan,
        memory: MemoryReserve,
    ) -> anyhow::Result<()> {
        let path = &self.output;
        let begun = Begun::now(&mut target);
        memory.give_back();
        let restored = begun.target.begin(plan).and_then(|runs| {
            let progress = &mut session.progress("restoring");
            chain.restore_runs(&mut *begun.target, || runs.iter().cloned(), progress)?;
            chain.check_unchanged()?;
            begun.written();
            let synced = begun.target.file.sync_all();
            synced.with_context(|| format!("cannot bring {path:?} to its disk"))?;
            begun.target.check_in_place()?;
            written_ram::check(session, path, &begun.target.file, chain, &runs)
        });
        let _until_reported = match restored {
            Ok(()) => begun.end(),
            Err(error) => return Err(begun.give_up(error)),
        };
        let ram = size(chain.ram_size());
        Ok(session.report(&format!("{}: {ram} of RAM", print::path(path)))?)
    }
}
