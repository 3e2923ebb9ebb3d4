//! Restoring into existing RAM.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::Context;
use memory_image::{Chain, RamTarget};
use page_reader::{FileReader, PageReader, SecretBuffer, is_zeros};
#[cfg(target_os = "linux")]
use sparse_file::punch_hole;
use sparse_file::{Engine, WriteOptions, zero_range};

use crate::failure::Failure;
use crate::interrupt::Critical;
use crate::session::Session;
#[cfg(target_os = "linux")]
use crate::sys::Mapping;
#[cfg(target_os = "linux")]
use crate::verbs::restore::huge_pages;
#[cfg(target_os = "linux")]
use crate::verbs::restore::reserve::{self, Plan};
use crate::verbs::restore::writable;
#[cfg(target_os = "linux")]
use crate::zeros;
use crate::{device, stderr, target, words};

/// Bytes read, or zeros written, at a time.
const CHUNK: usize = 1 << 20;

/// The parts of the RAM to write.
#[cfg(not(target_os = "linux"))]
pub(super) struct Plan {
    runs: Vec<Range<u64>>,
}

#[cfg(not(target_os = "linux"))]
impl Plan {
    /// Does nothing, as nothing is reserved.
    pub(super) fn leave_reserved(self) {}
}

/// Partly restored RAM. No guest must start with it, so it is emptied if a panic drops this.
pub(super) struct Begun<'t, 's> {
    pub(super) target: &'t mut InPlace<'s>,
    critical: Option<Critical>,
}

impl<'t, 's> Begun<'t, 's> {
    pub(super) fn now(target: &'t mut InPlace<'s>) -> Self {
        let critical = Some(target.session.overwrite(target.path));
        Self { target, critical }
    }

    /// Marks the RAM as whole, and not yet on its disk.
    pub(super) fn written(&self) {
        if let Some(critical) = &self.critical {
            critical.written();
        }
    }

    /// Marks the RAM as completely restored. The caller drops the returned value once it has
    /// reported that.
    pub(super) fn end(mut self) -> Option<Critical> {
        let critical = self.critical.take();
        if let Some(critical) = &critical {
            critical.done();
        }
        critical
    }

    /// Empties the RAM, and adds to `error` whether it is empty.
    pub(super) fn give_up(mut self, error: anyhow::Error) -> anyhow::Error {
        if let Some(critical) = &self.critical {
            critical.emptying();
        }
        let emptied = self.target.empty();
        self.critical = None;
        let path = self.target.path;
        if let Err(why) = emptied {
            let why = words::text(&why);
            return error.context(format!(
                "{path:?} holds a part of the RAM and cannot be emptied ({why}): start no guest with it"
            ));
        }
        match self.target.session.check("the output was emptied") {
            Ok(()) => error.context(format!("{path:?} was emptied")),
            Err(interrupted) => interrupted.into(),
        }
    }
}

impl Drop for Begun<'_, '_> {
    fn drop(&mut self) {
        if self.critical.is_none() {
            return;
        }
        let path = self.target.path;
        stderr::line(&match self.target.empty() {
            Ok(()) => format!("{path:?} was emptied"),
            Err(why) => format!(
                "{path:?} holds a part of the RAM and cannot be emptied ({}): start no guest with it",
                words::text(&why)
            ),
        });
    }
}

/// Existing RAM, which does not change before [`empty`](Self::empty).
pub(super) struct InPlace<'s> {
    session: &'s Session,
    path: &'s Path,
    /// Locked: other restores and readers of the RAM are refused.
    pub(super) file: File,
    /// `Some` if the file has no `write(2)`.
    #[cfg(target_os = "linux")]
    mapping: Option<Mapping>,
    /// Whether it is a block device, which has no holes and all of its room.
    on_device: bool,
    size: u64,
}

impl<'s> InPlace<'s> {
    pub(super) fn open(
        session: &'s Session,
        path: &'s Path,
        chain: &Chain,
        force: bool,
        ignored: &[u32],
    ) -> anyhow::Result<Self> {
        let file = target::open_and_lock(path, force, ignored)?;
        let looking = || format!("cannot look at {path:?}");
        let size = device::size(&file).with_context(looking)?;
        let on_device = !file.metadata().with_context(looking)?.is_file();
        if size != chain.ram_size() {
            return Err(Failure::TargetSize {
                path: path.to_owned(),
                image: chain.ram_size(),
                target: size,
            }
            .into());
        }
        Ok(Self {
            session,
            path,
            #[cfg(target_os = "linux")]
            mapping: huge_pages::map(path, &file, size)?,
            file,
            on_device,
            size,
        })
    }

    /// Returns whether the RAM holds any data. Ranges that are known to be untouched are not read.
    /// If the file system does not report them reliably, all of the RAM is read.
    pub(super) fn holds_anything(&self) -> anyhow::Result<bool> {
        let reader = FileReader::new(&self.file);
        let mut buffer = SecretBuffer::new();
        for range in reader.populated(0..self.size) {
            for offset in range.clone().step_by(CHUNK) {
                self.session.check("the output was not written to")?;
                let len = (range.end - offset).min(CHUNK as u64);
                let bytes = buffer.sized(len as usize);
                let read = reader.read_at(offset, bytes);
                read.with_context(|| format!("cannot read {:?}", self.path))?;
                if !is_zeros(bytes) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Refuses images for which there cannot be enough room, before they are read. Nothing of the
    /// file changes.
    #[cfg(target_os = "linux")]
    pub(super) fn check_room(&self, chain: &Chain, holds: bool) -> anyhow::Result<()> {
        match self.mapping {
            Some(_) => Ok(()),
            None if self.on_device => Ok(()),
            None => reserve::check_room(self.session, self.path, &self.file, chain, holds),
        }
    }

    /// Checks nothing, as room is not reserved on other systems.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn check_room(&self, _: &Chain, _: bool) -> anyhow::Result<()> {
        Ok(())
    }

    /// Reserves the room for the stored pages, or refuses. Huge pages were reserved before.
    #[cfg(target_os = "linux")]
    pub(super) fn reserve(&self, chain: &Chain, holds: bool) -> anyhow::Result<Plan> {
        match self.mapping {
            Some(_) => Ok(Plan::to_empty(chain)),
            None if self.on_device => Ok(Plan::without_reserve(chain)),
            None => reserve::reserve(self.session, self.path, &self.file, chain, holds),
        }
    }

    /// Plans without reserving room, which other systems do not support.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn reserve(&self, chain: &Chain, _: bool) -> anyhow::Result<Plan> {
        Ok(Plan {
            runs: chain.stored_runs().collect(),
        })
    }

    /// Makes zeros of all ranges that will not be written, and returns the ranges to write. The old
    /// RAM is lost from here on.
    #[cfg(target_os = "linux")]
    pub(super) fn begin(&self, plan: Plan) -> anyhow::Result<Vec<Range<u64>>> {
        if let Some(reserved) = plan.reserved {
            reserved.keep();
        }
        if plan.empty_first {
            self.empty()?;
            return Ok(plan.runs);
        }
        let starts = std::iter::once(0).chain(plan.runs.iter().map(|run| run.end));
        let ends = plan.runs.iter().map(|run| run.start);
        let gaps = starts
            .zip(ends.chain([self.size]))
            .map(|(start, end)| start..end);
        for gap in gaps.filter(|gap| !gap.is_empty()) {
            self.make_zeros(gap)
                .with_context(|| format!("cannot make zeros of {:?}", self.path))?;
        }
        Ok(plan.runs)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn begin(&self, plan: Plan) -> anyhow::Result<Vec<Range<u64>>> {
        self.empty()?;
        Ok(plan.runs)
    }

    /// Refuses a file that the system never lets this process write in full. Nothing of it changes.
    pub(super) fn check_writable(&self) -> Result<(), Failure> {
        writable::check(self.path, &self.file, self.size)
    }

    /// Checks that old RAM can be overwritten, by writing its last byte as it is. This detects a
    /// file system that fails every write before any data is lost.
    ///
    /// A guest's own write of that byte may be undone, so this is the first step of critical the
    /// RAM: if it succeeds, the RAM is lost in the next moment.
    pub(super) fn try_writing(&self) -> Result<(), Failure> {
        let at = self.size - 1;
        let rewrite = || {
            let mut byte = [0];
            self.file.read_exact_at(&mut byte, at)?;
            self.write(&byte, at)
        };
        match rewrite() {
            // The space of the file itself may be enough for the RAM.
            Err(source) if source.kind() != io::ErrorKind::StorageFull => {
                Err(Failure::TargetNotWritable {
                    path: self.path.to_owned(),
                    source,
                })
            }
            _ => Ok(()),
        }
    }

    /// Returns whether the path still leads to this file, and its size is unchanged.
    pub(super) fn check_in_place(&self) -> Result<(), Failure> {
        let identity = |it: Metadata| (it.dev(), it.ino(), it.len());
        let found = self.path.metadata().ok().map(identity);
        let size = device::size(&self.file).ok();
        match (found, self.file.metadata().ok().map(identity)) {
            (found @ Some(_), file) if found == file && size == Some(self.size) => Ok(()),
            _ => Err(Failure::TargetReplaced {
                path: self.path.to_owned(),
            }),
        }
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if let Some(mapping) = &self.mapping {
            return mapping.write_at(bytes, offset);
        }
        self.file.write_all_at(bytes, offset)
    }

    /// Makes all of the RAM zeros.
    pub(super) fn empty(&self) -> anyhow::Result<()> {
        self.write_zeros()
            .with_context(|| format!("cannot make zeros of {:?}", self.path))
    }

    fn write_zeros(&self) -> anyhow::Result<()> {
        let all = 0..self.size;
        #[cfg(target_os = "linux")]
        if let Some(mapping) = &self.mapping {
            // A hole would free the pages, and another process could take them.
            let zeros = vec![0; CHUNK];
            for range in FileReader::new(&self.file).populated(all) {
                for at in range.clone().step_by(CHUNK) {
                    let len = (range.end - at).min(CHUNK as u64) as usize;
                    mapping.write_at(&zeros[..len], at)?;
                }
            }
            return Ok(());
        }
        self.make_zeros(all)
    }

    /// Makes a hole, or writes zeros if the file system does not support holes.
    fn make_zeros(&self, range: Range<u64>) -> anyhow::Result<()> {
        if self.on_device {
            let zeros = vec![0; CHUNK];
            for at in range.clone().step_by(CHUNK) {
                let len = (range.end - at).min(CHUNK as u64) as usize;
                self.file.write_all_at(&zeros[..len], at)?;
            }
            return Ok(());
        }
        // The other engines allocate more than is set aside for this.
        let options = WriteOptions::new().engine(Engine::Pwrite);
        Ok(zero_range(&self.file, range, &options)?)
    }

    /// Writes bytes of the RAM to an emptied or reserved range. Long runs of zeros become holes.
    #[cfg(target_os = "linux")]
    fn write_sparse(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.mapping.is_some() {
            return match is_zeros(bytes) {
                // Already zeros since the file was emptied.
                true => Ok(()),
                false => self.write(bytes, offset),
            };
        }
        if self.on_device {
            return self.write(bytes, offset);
        }
        let mut blocks = zeros::blocks(offset, bytes).peekable();
        while let Some(first) = blocks.next() {
            let mut range = first.range;
            while let Some(next) = blocks.next_if(|next| next.is_zero == first.is_zero) {
                range.end = next.range.end;
            }
            let is_hole = first.is_zero
                && range.end - range.start >= page_reader::MIN_ZEROS
                && punch_hole(&self.file, range.clone()).is_ok();
            if !is_hole {
                let piece = (range.start - offset) as usize..(range.end - offset) as usize;
                self.write(&bytes[piece], range.start)?;
            }
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    fn write_sparse(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(bytes, offset)
    }
}

impl RamTarget for InPlace<'_> {
    fn ram_size(&self) -> u64 {
        self.size
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_sparse(offset, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn ram_is_emptied_by_a_panic_while_it_is_restored() {
        let session = Session::begin(true, false).unwrap();
        let ram = tempfile::NamedTempFile::new().unwrap();
        ram.as_file().write_all_at(&[7; 8192], 0).unwrap();
        let mut target = InPlace {
            session: &session,
            path: ram.path(),
            file: ram.reopen().unwrap(),
            #[cfg(target_os = "linux")]
            mapping: None,
            on_device: false,
            size: 8192,
        };
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _begun = Begun::now(&mut target);
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert_eq!(std::fs::read(ram.path()).unwrap(), [0; 8192]);
    }
}
