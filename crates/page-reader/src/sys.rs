//! What Linux knows of pages that were never written. Where it doesn't tell, all of them may have been.

mod file;
mod mappings;
mod pagemap;
mod userfaultfd;

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

pub(crate) use file::data;

use crate::populated::{PopulatedRanges, unknown};
use file::{DataRanges, own_file};
use mappings::{Area, Backing};
use nix::unistd::{SysconfVar, sysconf};
use pagemap::Scan;
use userfaultfd::Userfaultfd;

/// The mappings of this process, as they were when it was asked.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    /// Right for mappings that userfaultfd leaves alone.
    quick: Option<(Userfaultfd, Rc<Known>)>,
    thorough: OnceCell<Rc<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Ascending.
    areas: Vec<Area>,
    pagemap: Option<Rc<File>>,
}

impl AddressSpace {
    /// One of which nothing is known where `/proc` is not to be had.
    ///
    /// Nothing is kept open or remembered from one question to the next: a child after `fork` would be told of its parent.
    pub(crate) fn of_this_process() -> Self {
        let quick = || {
            let userfaultfd = Userfaultfd::that_tells()?;
            Some((userfaultfd, Known::by(mappings::without_flags).ok()?))
        };
        Self {
            quick: quick(),
            thorough: OnceCell::new(),
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
                .get_or_init(|| Known::by(mappings::with_flags).unwrap_or_default()),
        };
        Rc::clone(known).populated(range)
    }
}

impl Known {
    fn by(mappings: fn() -> io::Result<Vec<Area>>) -> io::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            pagemap: Some(Rc::new(File::open("/proc/self/pagemap")?)),
            areas: mappings()?,
        }))
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
            (Backing::Anonymous, Some(pagemap)) => Box::new(Scan::new(Rc::clone(pagemap), part)),
            (Backing::SharedFile { offset }, _) => match own_file(area) {
                Some(file) => {
                    // A mapping starts at a page of its file, and both are below 2^63.
                    let (address, offset) = (area.addresses.start, offset);
                    let position = |at: u64| at - address + offset;
                    let found = DataRanges::new(file, position(part.start)..position(part.end));
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
