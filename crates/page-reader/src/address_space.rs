//! Detection of written pages by their addresses in a process.

mod backing;

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Seek};
use std::iter;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use crate::mappings::{self, ListError, SELF};
use crate::populated::{PopulatedRanges, unknown};
use crate::sys::{Scan, Userfaultfd, data_of};
use backing::{Backing, Mapping, file_behind};

/// The files that describe the memory of a process. Open files stay bound to the program that ran
/// at the time of opening: once it is gone, reads fail.
#[derive(Debug)]
pub struct MemoryFiles {
    /// The directory in `/proc`.
    process: String,
    /// Locked while it is read, because reading moves its position.
    smaps: Mutex<File>,
    pagemap: Arc<File>,
}

impl MemoryFiles {
    /// Opens the files of process `pid`.
    ///
    /// # Errors
    /// Returns the error of `open(2)`: the process does not exist, or this process may not examine
    /// it.
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::in_directory(format!("/proc/{pid}"))
    }

    fn in_directory(process: String) -> io::Result<Self> {
        Ok(Self {
            smaps: Mutex::new(File::open(format!("{process}/smaps"))?),
            pagemap: Arc::new(File::open(format!("{process}/pagemap"))?),
            process,
        })
    }

    fn mappings(&self) -> io::Result<Mappings> {
        let smaps = self.smaps.lock().unwrap_or_else(PoisonError::into_inner);
        (&*smaps).rewind()?;
        let list = mappings::smaps(mappings::buffered(&*smaps)).map_err(failed)?;
        Ok(Mappings {
            process: self.process.clone(),
            list: list.into_iter().map(Mapping::with_flags).collect(),
            pagemap: Some(Arc::clone(&self.pagemap)),
        })
    }
}

/// The addresses of a process that may hold nonzero bytes, by its mappings at the time of the
/// query.
///
/// [`PageReader::populated`](crate::PageReader::populated) describes what the kernel reports, and
/// where everything may be populated.
///
/// The type is neither `Send` nor `Sync`. [`MemoryFiles`] is both: create one address space for
/// each thread.
///
/// # Examples
/// ```
/// use page_reader::{AddressSpace, MemoryFiles};
///
/// let space = AddressSpace::of(&MemoryFiles::open(std::process::id())?);
/// let written = vec![7_u8; 4096];
/// let address = written.as_ptr() as u64;
/// assert!(space.populated(address..address + 4096).next().is_some());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct AddressSpace {
    /// The mappings of this process without flags, valid for mappings that no userfaultfd fills.
    quick: Option<(Userfaultfd, Rc<Mappings>)>,
    /// The mappings with flags. For this process, they are listed when they are needed.
    thorough: OnceCell<Rc<Mappings>>,
}

#[derive(Debug, Default)]
struct Mappings {
    process: String,
    /// Ascending by address.
    list: Vec<Mapping>,
    pagemap: Option<Arc<File>>,
}

impl AddressSpace {
    /// Returns the mappings of this process, or an address space without information if `/proc` is
    /// missing.
    ///
    /// Nothing is kept open or cached between queries: a child after `fork` would get the state of
    /// its parent.
    pub(crate) fn of_this_process() -> Self {
        let quick = || {
            let userfaultfd = Userfaultfd::probe()?;
            Some((userfaultfd, Mappings::quick().ok()?))
        };
        Self {
            quick: quick(),
            thorough: OnceCell::new(),
        }
    }

    /// Returns the mappings of another process, or an address space without information if the
    /// process has ended or executed another program.
    #[must_use]
    pub fn of(files: &MemoryFiles) -> Self {
        Self::with(files.mappings().unwrap_or_default())
    }

    /// Returns an address space without information: all addresses may hold nonzero bytes.
    #[must_use]
    pub fn unknown() -> Self {
        Self::with(Mappings::default())
    }

    fn with(mappings: Mappings) -> Self {
        Self {
            quick: None,
            thorough: OnceCell::from(Rc::new(mappings)),
        }
    }

    /// Returns `true` if the mappings of this process were listed with their flags.
    #[cfg(test)]
    pub(crate) fn has_flags(&self) -> bool {
        self.thorough.get().is_some()
    }

    /// Returns the addresses in `range` that may hold nonzero bytes.
    pub fn populated(&self, range: Range<u64>) -> PopulatedRanges<'static> {
        let mappings = match &self.quick {
            Some((userfaultfd, mappings))
                if mappings
                    .mappings_in(&range)
                    .all(|mapping| userfaultfd.is_unregistered(mapping.addresses.start)) =>
            {
                mappings
            }
            _ => self
                .thorough
                .get_or_init(|| Rc::new(Mappings::thorough().unwrap_or_default())),
        };
        Rc::clone(mappings).populated(range)
    }
}

impl Mappings {
    fn quick() -> io::Result<Rc<Self>> {
        let list = File::open(format!("{SELF}/maps"))?;
        let list = mappings::maps(mappings::buffered(list)).map_err(failed)?;
        Ok(Rc::new(Self {
            process: SELF.into(),
            pagemap: Some(Arc::new(File::open(format!("{SELF}/pagemap"))?)),
            list: list.into_iter().map(Mapping::without_flags).collect(),
        }))
    }

    fn thorough() -> io::Result<Self> {
        MemoryFiles::in_directory(SELF.into())?.mappings()
    }

    fn mappings_in(&self, range: &Range<u64>) -> impl Iterator<Item = &Mapping> {
        let end = range.end;
        self.list[self.first_after(range.start)..]
            .iter()
            .take_while(move |mapping| mapping.addresses.start < end)
    }

    /// Returns the index of the first mapping that ends after `address`.
    fn first_after(&self, address: u64) -> usize {
        self.list
            .partition_point(|mapping| mapping.addresses.end <= address)
    }

    fn populated(self: Rc<Self>, range: Range<u64>) -> PopulatedRanges<'static> {
        let mut left = range;
        let mut next = self.first_after(left.start);
        Box::new(
            iter::from_fn(move || {
                if left.is_empty() {
                    return None;
                }
                let mapping = self.list.get(next);
                let mapping = mapping.filter(|mapping| mapping.addresses.start < left.end);
                // Nothing is mapped up to the next mapping, so a read reports the error.
                let (end, inside) = match mapping {
                    Some(mapping) if mapping.addresses.start <= left.start => {
                        next += 1;
                        (mapping.addresses.end.min(left.end), Some(mapping))
                    }
                    Some(mapping) => (mapping.addresses.start, None),
                    None => (left.end, None),
                };
                let part = left.start..end;
                left.start = end;
                Some(self.populated_in(inside, part))
            })
            .flatten(),
        )
    }

    /// Returns the populated parts of `part`, which must be within `mapping`, or outside of all
    /// mappings.
    fn populated_in(
        &self,
        mapping: Option<&Mapping>,
        part: Range<u64>,
    ) -> PopulatedRanges<'static> {
        let Some(mapping) = mapping else {
            return Box::new(unknown(part));
        };
        match (mapping.backing, &self.pagemap) {
            (Backing::Anonymous, Some(pagemap)) => Box::new(Scan::new(Arc::clone(pagemap), part)),
            (Backing::SharedFile { offset }, _) => match file_behind(mapping, &self.process) {
                Some(file) => {
                    // A mapping starts at a page of its file. Both are below 2^63.
                    let (address, offset) = (mapping.addresses.start, offset);
                    let position = |at: u64| at - address + offset;
                    let found = data_of(file, position(part.start)..position(part.end));
                    let address_of = move |position: u64| position - offset + address;
                    Box::new(found.map(move |data| address_of(data.start)..address_of(data.end)))
                }
                None => Box::new(unknown(part)),
            },
            _ => Box::new(unknown(part)),
        }
    }
}

fn failed(error: ListError) -> io::Error {
    match error {
        ListError::Read(error) => error,
        ListError::Line { .. } => io::ErrorKind::InvalidData.into(),
    }
}
