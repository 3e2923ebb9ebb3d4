//! Files of other programs, planned from the addresses of the RAM and written from any source.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;

use page_reader::{HostMemory, NonzeroRuns, PageReader, RamLayout, Touched};
use sparse_file::{Progress, ProgressFn, RunSource, WriteError, WriteOptions, grow, write_runs};

use crate::elf::{self, ElfMachine};
use crate::error::{FileWriteError, PlanError};
use crate::lime;

/// The unit in which zeros are found.
const PAGE: u64 = 4096;

/// The contents of a file that is going to be written: its headers, and where the RAM is in it.
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use page_reader::RamLayout;
/// use vmm_files::{ElfMachine, FilePlan, WriteOptions};
///
/// let ram = vec![7; 8192];
/// let layout = RamLayout::new([(0, 4096), (4 << 30, 4096)])?;
/// let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[])?;
/// let file = tempfile::tempfile()?;
/// plan.write(&file, &ram, &WriteOptions::new(), true, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!(file.metadata()?.len(), plan.len());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FilePlan {
    headers: Vec<(u64, Vec<u8>)>,
    /// Ascending in the RAM, of which it has every byte.
    by_ram: Vec<Placed>,
    /// Ascending in the file.
    by_file: Vec<Placed>,
    len: u64,
}

/// A range of the RAM, and its position in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) ram: u64,
    pub(crate) file: u64,
    pub(crate) len: u64,
}

impl FilePlan {
    /// Plans an ELF core of guest-physical memory, as gdb, crash, drgn and Volatility read it.
    ///
    /// Each range of addresses is a segment, whose `p_paddr` and `p_vaddr` are its guest-physical
    /// address: gdb then reads guest-physical memory. `notes` are the bytes of the `PT_NOTE`
    /// segment, which may be empty. With the note `VMCOREINFO` of a Linux guest, which
    /// [`find_vmcoreinfo`](crate::find_vmcoreinfo) returns, crash and drgn find its kernel.
    ///
    /// # Errors
    /// Returns an error if no file can be that long.
    pub fn elf(layout: &RamLayout, machine: ElfMachine, notes: &[u8]) -> Result<Self, PlanError> {
        elf::plan(layout, machine, notes)
    }

    /// Plans a file in the format of LiME, as Volatility and Rekall read it.
    ///
    /// # Errors
    /// Returns an error if no file can be that long.
    pub fn lime(layout: &RamLayout) -> Result<Self, PlanError> {
        lime::plan(layout)
    }

    /// Plans a file of RAM alone whose ranges are in the given order, which may be another one than
    /// that of their addresses: the file `memory-ranges` of a [snapshot of Cloud
    /// Hypervisor](crate::CloudHypervisorSnapshot).
    ///
    /// # Errors
    /// Returns an error if the ranges are not the RAM of `layout`.
    pub fn flat(layout: &RamLayout, ranges: &[Range<u64>]) -> Result<Self, PlanError> {
        let sizes = ranges
            .iter()
            .map(|range| (range.start, range.end - range.start));
        let same = RamLayout::new(sizes).ok();
        let same = same.filter(|ranges| ranges.addresses().eq(layout.addresses()));
        let Some(same) = same else {
            let range = |range: &Range<u64>| format!("{:#x}..{:#x}", range.start, range.end);
            return Err(PlanError::OtherRanges {
                ram: layout.to_string(),
                file: ranges.iter().map(range).collect::<Vec<_>>().join(", "),
            });
        };
        let mut file = 0;
        let placed = ranges.iter().map(|range| {
            let placed = Placed {
                ram: same.offset_of(range.start).unwrap_or(0),
                file,
                len: range.end - range.start,
            };
            file += placed.len;
            placed
        });
        Self::new(Vec::new(), placed.collect())
    }

    /// Creates a plan of headers, each with its position, and of all ranges of the RAM.
    pub(crate) fn new(
        headers: Vec<(u64, Vec<u8>)>,
        placed: Vec<Placed>,
    ) -> Result<Self, PlanError> {
        let (mut by_ram, mut by_file) = (placed.clone(), placed);
        by_ram.sort_by_key(|placed| placed.ram);
        by_file.sort_by_key(|placed| placed.file);
        let last = by_file
            .last()
            .map_or(Some(0), |it| it.file.checked_add(it.len));
        match last.filter(|len| i64::try_from(*len).is_ok()) {
            Some(len) => Ok(Self {
                headers,
                by_ram,
                by_file,
                len,
            }),
            None => Err(PlanError::TooLarge),
        }
    }

    /// Returns the length of the file in bytes. Zeros may be holes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no plan is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.by_ram
            .last()
            .map_or(0, |placed| placed.ram + placed.len)
    }

    /// Writes the file from a source with all of the RAM. `file` is empty. RAM that the source
    /// knows to be untouched becomes holes without being read. If `skip_zeros` is set, so do pages
    /// of zeros, in runs of 32 KiB and more. Returns the number of bytes of RAM that were written.
    ///
    /// `progress` gets the written and the skipped bytes of the RAM, and may cancel the write.
    ///
    /// # Errors
    /// Returns an error after which the file is incomplete.
    pub fn write<R: PageReader + ?Sized>(
        &self,
        file: &File,
        reader: &R,
        options: &WriteOptions,
        skip_zeros: bool,
        progress: &mut ProgressFn<'_>,
    ) -> Result<u64, FileWriteError> {
        let len = self.len;
        grow(file, len).map_err(|source| FileWriteError::Grow { len, source })?;
        for (offset, bytes) in &self.headers {
            let written = file.write_all_at(bytes, *offset);
            written.map_err(|source| FileWriteError::Header {
                offset: *offset,
                len: bytes.len(),
                source,
            })?;
        }
        let ram_size = self.ram_size();
        let touched = Touched::new(reader, ram_size);
        let counts = Counts {
            progress: RefCell::new(progress),
            ram_size,
            written: Cell::new(0),
            skipped: Cell::new(0),
            cancelled: Cell::new(false),
        };
        let runs = NonzeroRuns::new(&touched, ram_size, PAGE)
            .find_zeros(skip_zeros)
            .on_skip(|bytes| counts.skip(bytes));
        let runs = runs.flat_map(|run| self.placed(run));
        let source = PlacedReader {
            plan: self,
            reader: &touched,
        };
        let written = write_runs(file, runs, &source, options, &mut |bytes| {
            counts.write(bytes)
        });
        if counts.cancelled.get() {
            return Err(FileWriteError::Cancelled);
        }
        let written = written.map_err(|error| self.at_ram_offset(error))?;
        let checked = reader.check_source();
        checked.map_err(|source| FileWriteError::Source { source })?;
        Ok(written)
    }

    /// Returns the ranges of the file that hold a range of the RAM.
    fn placed(&self, ram: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let first = self
            .by_ram
            .partition_point(|it| it.ram + it.len <= ram.start);
        let parts = self.by_ram[first..].iter();
        parts.map_while(move |it| {
            let (start, end) = (ram.start.max(it.ram), ram.end.min(it.ram + it.len));
            (start < end).then(|| it.file + (start - it.ram)..it.file + (end - it.ram))
        })
    }

    /// Returns the offset in the RAM of a byte of the file, and the number of bytes that follow it
    /// in both.
    fn ram_at(&self, file: u64) -> Option<(u64, u64)> {
        let after = self.by_file.partition_point(|it| it.file <= file);
        let placed = self.by_file[..after].last()?;
        let inside = file - placed.file;
        (inside < placed.len).then(|| (placed.ram + inside, placed.len - inside))
    }

    /// Changes the offset of a source that could not be read from that in the file to that in the
    /// RAM.
    fn at_ram_offset(&self, mut error: WriteError) -> WriteError {
        if let WriteError::Source { offset, .. } = &mut error
            && let Some((ram, _)) = self.ram_at(*offset)
        {
            *offset = ram;
        }
        error
    }
}

/// Counts and reports the bytes of the RAM, on one thread.
struct Counts<'p, 'f> {
    progress: RefCell<&'p mut ProgressFn<'f>>,
    ram_size: u64,
    written: Cell<u64>,
    skipped: Cell<u64>,
    cancelled: Cell<bool>,
}

impl Counts<'_, '_> {
    fn write(&self, bytes: u64) -> ControlFlow<()> {
        self.written.set(bytes);
        self.report()
    }

    fn skip(&self, bytes: u64) -> ControlFlow<()> {
        self.skipped.set(self.skipped.get() + bytes);
        self.report()
    }

    fn report(&self) -> ControlFlow<()> {
        let done = self.written.get() + self.skipped.get();
        let flow = (self.progress.borrow_mut())(Progress::new(done, self.ram_size));
        if flow.is_break() {
            self.cancelled.set(true);
        }
        flow
    }
}

/// RAM that is read by its position in the file.
struct PlacedReader<'p, R: ?Sized> {
    plan: &'p FilePlan,
    reader: &'p R,
}

impl<R: PageReader + ?Sized> RunSource for PlacedReader<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let placed = self.plan.ram_at(offset);
            let (ram, left) = placed.ok_or_else(|| io::Error::other("no RAM is at this offset"))?;
            let len = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            let (now, later) = buf.split_at_mut(len);
            self.reader.read_at(ram, now)?;
            (offset, buf) = (offset + len as u64, later);
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let (ram, left) = self.plan.ram_at(offset)?;
        let len = usize::try_from(left).map_or(len, |left| left.min(len));
        self.reader.host_memory(ram, len)
    }
}
