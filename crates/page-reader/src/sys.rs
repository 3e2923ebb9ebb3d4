//! What Linux knows of pages that were never written. Where it doesn't tell, all of them may have been.

mod file;
mod huge_pages;
pub(crate) mod mapped_file;
mod mappings;
mod pagemap;
mod populate;
pub(crate) mod ptrace;
mod userfaultfd;

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use file::data;
pub(crate) use populate::fault_in;

use crate::populated::{PopulatedRanges, unknown};
use file::{data_of, file_behind};
use mappings::{Area, Backing};
use nix::unistd::{SysconfVar, sysconf};
use pagemap::Scan;
use userfaultfd::Userfaultfd;

/// The files in which the kernel tells of a process's memory. Once open they're of the program that ran then, never of another:
/// when that's gone, they have nothing more to tell.
#[derive(Debug)]
pub(crate) struct MemoryFiles {
    /// `/proc/<pid>`
    process: String,
    /// One reader at a time: its position is moved.
    smaps: Mutex<File>,
    pagemap: Arc<File>,
}

impl MemoryFiles {
    /// Of `process`, a directory in `/proc`.
    pub(crate) fn open(process: String) -> io::Result<Self> {
        Ok(Self {
            smaps: Mutex::new(File::open(format!("{process}/smaps"))?),
            pagemap: Arc::new(File::open(format!("{process}/pagemap"))?),
            process,
        })
    }

    fn known(&self) -> io::Result<Known> {
        let smaps = self.smaps.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Known {
            process: self.process.clone(),
            areas: mappings::with_flags(&smaps)?,
            pagemap: Some(Arc::clone(&self.pagemap)),
        })
    }
}

const SELF: &str = "/proc/self";

/// The mappings of a process, as they were when it was asked.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    /// Of this process, and right for mappings that userfaultfd leaves alone.
    quick: Option<(Userfaultfd, Rc<Known>)>,
    /// Made when it is needed, for this process.
    thorough: OnceCell<Rc<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    process: String,
    /// Ascending.
    areas: Vec<Area>,
    pagemap: Option<Arc<File>>,
}

impl AddressSpace {
    /// One of which nothing is known where `/proc` is not to be had.
    ///
    /// Nothing is kept open or remembered from one question to the next: a child after `fork` would be told of its parent.
    pub(crate) fn of_this_process() -> Self {
        let quick = || {
            let userfaultfd = Userfaultfd::that_tells()?;
            Some((userfaultfd, Known::quick().ok()?))
        };
        Self {
            quick: quick(),
            thorough: OnceCell::new(),
        }
    }

    /// One of which nothing is known where the process has ended or runs another program.
    pub(crate) fn of(files: &MemoryFiles) -> Self {
        Self::with(files.known().unwrap_or_default())
    }

    /// One of which nothing is known.
    pub(crate) fn unknown() -> Self {
        Self::with(Known::default())
    }

    fn with(known: Known) -> Self {
        Self {
            quick: None,
            thorough: OnceCell::from(Rc::new(known)),
        }
    }

    /// The addresses in `range` that may hold anything but zeros.
    pub(crate) fn populated(&self, range: Range<u64>) -> PopulatedRanges<'static> {
        let known = match &self.quick {
            Some((userfaultfd, known))
                if known
                    .areas_in(&range)
                    .all(|area| userfaultfd.leaves_alone(area.addresses.start)) =>
            {
                known
            }
            _ => self
                .thorough
                .get_or_init(|| Rc::new(Known::thorough().unwrap_or_default())),
        };
        Rc::clone(known).populated(range)
    }
}

impl Known {
    fn quick() -> io::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            process: SELF.into(),
            pagemap: Some(Arc::new(File::open(format!("{SELF}/pagemap"))?)),
            areas: mappings::without_flags()?,
        }))
    }

    fn thorough() -> io::Result<Self> {
        MemoryFiles::open(SELF.into())?.known()
    }

    fn areas_in(&self, range: &Range<u64>) -> impl Iterator<Item = &Area> {
        let end = range.end;
        self.areas[self.first_after(range.start)..]
            .iter()
            .take_while(move |area| area.addresses.start < end)
    }

    /// The first mapping that doesn't end at `address` or before.
    fn first_after(&self, address: u64) -> usize {
        self.areas
            .partition_point(|area| area.addresses.end <= address)
    }

    fn populated(self: Rc<Self>, range: Range<u64>) -> PopulatedRanges<'static> {
        let mut left = range;
        let mut next = self.first_after(left.start);
        Box::new(
            iter::from_fn(move || {
                if left.is_empty() {
                    return None;
                }
                let area = self.areas.get(next);
                let area = area.filter(|area| area.addresses.start < left.end);
                // Up to the next mapping there is nothing that can be read, which a read will tell.
                let (end, inside) = match area {
                    Some(area) if area.addresses.start <= left.start => {
                        next += 1;
                        (area.addresses.end.min(left.end), Some(area))
                    }
                    Some(area) => (area.addresses.start, None),
                    None => (left.end, None),
                };
                let part = left.start..end;
                left.start = end;
                Some(self.populated_in(inside, part))
            })
            .flatten(),
        )
    }

    /// `part` is within `area`, or of no mapping.
    fn populated_in(&self, area: Option<&Area>, part: Range<u64>) -> PopulatedRanges<'static> {
        let Some(area) = area else {
            return Box::new(unknown(part));
        };
        match (area.backing, &self.pagemap) {
            (Backing::Anonymous, Some(pagemap)) => Box::new(Scan::new(Arc::clone(pagemap), part)),
            (Backing::SharedFile { offset }, _) => match file_behind(area, &self.process) {
                Some(file) => {
                    // A mapping starts at a page of its file, and both are below 2^63.
                    let (address, offset) = (area.addresses.start, offset);
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

/// Whether `file` is what the mapping says it maps.
fn is_behind(file: &File, area: &Area) -> bool {
    file.metadata().is_ok_and(|metadata| {
        metadata.is_file() && (metadata.dev(), metadata.ino()) == (area.device, area.inode)
    })
}

fn page_size() -> u64 {
    match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => size as u64,
        other => unreachable!("POSIX has PAGE_SIZE on every system, not {other:?}"),
    }
}
