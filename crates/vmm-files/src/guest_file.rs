//! The memory of a guest in a file of a VMM, as a source of pages.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page_reader::{PageReader, PopulatedRanges, RamLayout};

use crate::error::OpenError;
use crate::format::Format;
use crate::machine::Machine;
use crate::mapped_pages::MappedPages;
use crate::source::Source;
use crate::{cloud_hypervisor, elf, qemu, vmware};

/// The memory of a guest in a file of another VMM.
///
/// It is a [`PageReader`], whose [layout](PageReader::ram_layout) has the guest-physical addresses
/// of the RAM. Bytes that the file does not store are zeros, and
/// [`populated`](PageReader::populated) leaves them out. So are the holes of the file, where the
/// file system reports them reliably.
///
/// Every length and offset in the file is checked before it is used, and memory use does not grow
/// with what a file claims. The state of devices and vCPUs in the file is not read.
///
/// The file must not change while it is open: see [`check_source`](PageReader::check_source).
///
/// # Examples
/// ```no_run
/// use page_reader::PageReader;
/// use vmm_files::{Format, GuestFile};
///
/// let guest = GuestFile::open("guest.elf", Format::Elf)?;
/// println!("RAM at {}", guest.layout());
/// let offset = guest.layout().offset_of(0x10_0000).ok_or("not RAM")?;
/// let mut page = [0; 4096];
/// guest.read_at(offset, &mut page)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestFile {
    format: Format,
    contents: Contents,
}

/// What a parser has found in its files.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) sources: Vec<Source>,
    pub(crate) layout: RamLayout,
    /// The parts of the RAM that are stored, ascending and without overlaps.
    pub(crate) parts: Vec<Part>,
}

/// A part of the RAM that is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// The offset in the RAM.
    pub(crate) start: u64,
    /// At least 1.
    pub(crate) len: u64,
    /// The number of the file.
    pub(crate) source: usize,
    pub(crate) stored: Stored,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored {
    /// All bytes, from a position in the file.
    Bytes(u64),
    /// Some pages.
    Pages(MappedPages),
}

/// Options of a [`GuestFile`], created by [`GuestFile::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `open`"]
pub struct GuestFileOptions {
    pub(crate) layout: Option<RamLayout>,
    pub(crate) machine: Option<Machine>,
    pub(crate) blocks: Vec<String>,
    pub(crate) state: Option<PathBuf>,
}

impl GuestFileOptions {
    /// Sets the addresses of the RAM of a file that does not record them: those of
    /// [QEMU](Format::Qemu) and [libvirt](Format::Libvirt). The default is the layout of the
    /// [machine](Self::machine). The other formats ignore it.
    pub fn layout(mut self, layout: RamLayout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Sets the machine whose layout a file has that does not record it. The default is the machine
    /// type in the file.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = Some(machine);
        self
    }

    /// Adds a RAM block, by its name in a file of QEMU or libvirt. The RAM of the guest is all
    /// blocks that are added, in this order. The default is the block of the machine, such as
    /// `pc.ram`. A guest whose RAM is a memory backend has a block of the name of the backend.
    pub fn block(mut self, name: impl Into<String>) -> Self {
        self.blocks.push(name.into());
        self
    }

    /// Sets the `.vmsn` or `.vmss` file of a `.vmem` file. The default is the file with the same
    /// name beside it.
    pub fn state_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.state = Some(path.into());
        self
    }

    /// Opens a file.
    ///
    /// # Errors
    /// Returns an [`OpenError`], which names the file and the position of what is wrong.
    pub fn open(&self, path: impl AsRef<Path>, format: Format) -> Result<GuestFile, OpenError> {
        let path = path.as_ref();
        let contents = match format {
            Format::Elf => elf::read(path)?,
            Format::Qemu => qemu::read(path, self)?,
            Format::Libvirt => qemu::read_libvirt(path, self)?,
            Format::CloudHypervisor => cloud_hypervisor::read(path)?,
            Format::Vmware => vmware::read(path, self)?,
        };
        Ok(GuestFile { format, contents })
    }
}

impl GuestFile {
    /// Opens a file with the default [`GuestFileOptions`].
    ///
    /// # Errors
    /// Returns an [`OpenError`].
    pub fn open(path: impl AsRef<Path>, format: Format) -> Result<Self, OpenError> {
        Self::options().open(path, format)
    }

    /// Opens a file whose format is [detected](Format::detect).
    ///
    /// # Errors
    /// Returns [`OpenError::Unrecognized`] for a file of no known format, or another [`OpenError`].
    pub fn detect(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        match Format::detect(path) {
            Ok(Some(format)) => Self::open(path, format),
            Ok(None) => Err(OpenError::Unrecognized {
                path: path.to_owned(),
            }),
            Err(source) => Err(OpenError::Io {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Returns a builder for the properties that a file does not record.
    pub fn options() -> GuestFileOptions {
        GuestFileOptions::default()
    }

    /// Returns the format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the addresses of the RAM.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.contents.layout
    }

    /// Returns the files that are read, at least one.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.contents.sources.iter().map(|source| &*source.path)
    }

    /// Returns the parts that overlap a range of the RAM, each cut to it.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, &Part)> {
        let parts = &self.contents.parts;
        let first = parts.partition_point(|part| part.start + part.len <= range.start);
        let parts = parts[first..].iter();
        let parts = parts.take_while(move |part| part.start < range.end);
        parts.map(move |part| {
            let start = part.start.max(range.start);
            (start..(part.start + part.len).min(range.end), part)
        })
    }
}

impl PageReader for GuestFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let ram_size = self.layout().ram_size();
        let end = offset.checked_add(buf.len() as u64);
        let Some(end) = end.filter(|end| *end <= ram_size) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let mut at = offset;
        for (range, part) in self.parts(offset..end) {
            let into = (range.start - offset) as usize..(range.end - offset) as usize;
            buf[(at - offset) as usize..into.start].fill(0);
            let (file, inside) = (
                &self.contents.sources[part.source].file,
                range.start - part.start,
            );
            match part.stored {
                Stored::Bytes(start) => file.read_exact_at(&mut buf[into], start + inside)?,
                Stored::Pages(pages) => pages.read(file, inside, &mut buf[into])?,
            }
            at = range.end;
        }
        buf[(at - offset) as usize..].fill(0);
        Ok(())
    }

    /// Returns the parts of the RAM that the file stores, without the holes of the file, and the
    /// part of `range` past the end of the RAM.
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let ram_size = self.layout().ram_size();
        let past = range.start.max(ram_size)..range.end;
        let stored = self.parts(range.start..range.end.min(ram_size));
        let stored = stored.flat_map(|(range, part)| {
            let source = &self.contents.sources[part.source];
            let (inside, len) = (range.start - part.start, range.end - range.start);
            let found: PopulatedRanges<'_> = match part.stored {
                Stored::Bytes(start) => {
                    let at = start + inside;
                    let data = source.reader.populated(at..at + len);
                    let offset_of = move |position: u64| range.start + (position - at);
                    Box::new(data.map(move |it| offset_of(it.start)..offset_of(it.end)))
                }
                Stored::Pages(pages) => {
                    let part_start = part.start;
                    let runs = pages.stored(&source.file, inside..inside + len);
                    // What cannot be read may hold data: the read reports the error.
                    let runs = runs.map(move |run| run.unwrap_or(inside..inside + len));
                    let mut last = 0;
                    let runs = runs.filter_map(move |run| {
                        let run = run.start.max(last)..run.end;
                        last = last.max(run.end);
                        Some(run).filter(|run| !run.is_empty())
                    });
                    Box::new(runs.map(move |run| part_start + run.start..part_start + run.end))
                }
            };
            found
        });
        let past = Some(past).filter(|past| !past.is_empty());
        Box::new(stored.chain(past))
    }

    /// Fails if a file was written to or resized since it was opened, by its size and time of
    /// modification.
    fn check_source(&self) -> io::Result<()> {
        let sources = &self.contents.sources;
        sources.iter().try_for_each(Source::check_unchanged)
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(self.layout())
    }
}
