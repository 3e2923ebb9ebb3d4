//! Snapshots and suspended guests of VMware: a `.vmem` file with a `.vmsn` or `.vmss` file.
//!
//! The `.vmem` file has the RAM without gaps. The other one has groups of tags. The group `memory`
//! lists the regions: `regionPPN` is the first page of a region in the guest-physical addresses,
//! `regionPageNum` its first page in the `.vmem` file, and `regionSize` its number of pages. A
//! guest without regions has one, from address 0.
//!
//! The file begins with a magic number, of whose first byte the lower half is the version, an
//! unknown number, and the number of groups (32 bits each, little-endian). A group is a name of 64
//! bytes, and the position and length of its tags (64 bits each). A tag is a byte of flags, a byte
//! with the length of the name, the name, and one index of 32 bits for each of the number in the
//! upper two bits of the flags. The lower six bits are the length of the value, or 62 or 63: then
//! follow the stored and the full length of the value (32 bits each in version 0, otherwise 64),
//! two bytes, and the value. A tag of two zero bytes is the last one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use page_reader::RamLayout;

use crate::error::OpenError;
use crate::format::Format;
use crate::guest_file::{Contents, GuestFileOptions, Part, Stored};
use crate::source::{Source, le};

const MAGIC: [[u8; 4]; 4] = [
    [0xd0, 0xbe, 0xd2, 0xbe],
    [0xd1, 0xba, 0xd1, 0xba],
    [0xd2, 0xbe, 0xd2, 0xbe],
    [0xd3, 0xbe, 0xd3, 0xbe],
];
const HEADER: u64 = 12;
const GROUP: u64 = 80;
const PAGE: u64 = 4096;
/// More groups, tags and regions than any file has.
const MAX_GROUPS: u64 = 4096;
const MAX_TAGS: u64 = 1 << 20;
const MAX_REGIONS: u64 = 4096;
/// The longest tag without its value: flags, lengths, a name, three indices, two lengths, padding.
const MAX_TAG: usize = 2 + 255 + 12 + 16 + 2;

/// Returns whether a `.vmsn` or `.vmss` file begins with these bytes.
pub(crate) fn is_magic(first: &[u8]) -> bool {
    MAGIC.iter().any(|magic| first.starts_with(magic))
}

/// The fields of a region that were found, in pages.
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    address: Option<u64>,
    position: Option<u64>,
    size: Option<u64>,
}

pub(crate) fn read(path: &Path, options: &GuestFileOptions) -> Result<Contents, OpenError> {
    let (memory, state) = paths(path, options)?;
    let memory = Source::open(&memory, Format::Vmware)?;
    let state = Source::open(&state, Format::Vmware)?;
    let (group, regions) = regions(&state)?;
    let mut found = Vec::new();
    for (number, region) in &regions {
        let (Some(address), Some(position), Some(size)) =
            (region.address, region.position, region.size)
        else {
            let problem =
                format!("the region {number} of the memory is incomplete: copy the file again");
            return Err(state.invalid(group, problem));
        };
        let bytes = |pages: u64| pages.checked_mul(PAGE);
        let (Some(address), Some(position), Some(size)) =
            (bytes(address), bytes(position), bytes(size))
        else {
            let problem =
                format!("the region {number} ends past the address space: the file is damaged");
            return Err(state.invalid(group, problem));
        };
        match position.checked_add(size) {
            Some(end) if end <= memory.len => {}
            _ => {
                let problem = format!(
                    "it has {} bytes and lacks the region at {address:#x}: it is cut short or of another snapshot",
                    memory.len
                );
                return Err(memory.invalid(memory.len, problem));
            }
        }
        found.push((address, position, size));
    }
    if found.is_empty() {
        found.push((0, 0, memory.len));
    }
    found.sort_unstable();
    let layout = RamLayout::new(found.iter().map(|(address, _, size)| (*address, *size)));
    let layout = layout.map_err(|source| OpenError::Layout {
        path: state.path.clone(),
        source,
    })?;
    let mut start = 0;
    let parts = found.iter().map(|(_, position, size)| {
        let part = Part {
            start,
            len: *size,
            source: 0,
            stored: Stored::Bytes(*position),
        };
        start += size;
        part
    });
    Ok(Contents {
        parts: parts.collect(),
        layout,
        sources: vec![memory, state],
    })
}

/// Returns the path of the memory and that of the state, of which one is given.
fn paths(path: &Path, options: &GuestFileOptions) -> Result<(PathBuf, PathBuf), OpenError> {
    if let Some(state) = &options.state {
        return Ok((path.to_owned(), state.clone()));
    }
    if path
        .extension()
        .is_some_and(|it| it == "vmsn" || it == "vmss")
    {
        return Ok((path.with_extension("vmem"), path.to_owned()));
    }
    let states = ["vmsn", "vmss"].map(|extension| path.with_extension(extension));
    match states.into_iter().find(|state| state.is_file()) {
        Some(state) => Ok((path.to_owned(), state)),
        None => {
            let source = Source::open(path, Format::Vmware)?;
            let problem = "no .vmsn or .vmss file of the same name is beside it, which has the addresses of the \
                           RAM: put it there, or name it";
            Err(source.invalid(0, problem))
        }
    }
}

/// Returns the regions by their number, and the position of the group that lists them.
fn regions(source: &Source) -> Result<(u64, BTreeMap<u64, Region>), OpenError> {
    let header: [u8; HEADER as usize] = source.bytes(0)?;
    if !is_magic(&header) {
        let problem =
            "it does not begin with the magic number of a .vmsn or .vmss file: name such a file";
        return Err(source.invalid(0, problem));
    }
    let long_lengths = header[0] & 0x0f != 0;
    let count = le::<4>(&header, 8);
    if count > MAX_GROUPS {
        let problem =
            format!("it has {count} groups, and more than {MAX_GROUPS} are not supported");
        return Err(source.invalid(8, problem));
    }
    for number in 0..count {
        let at = HEADER + number * GROUP;
        let group: [u8; GROUP as usize] = source.bytes(at)?;
        let name = group[..64].split(|byte| *byte == 0).next();
        if name == Some(b"memory") {
            let tags = Tags {
                source,
                at: le::<8>(&group, 64),
                long_lengths,
            };
            return Ok((at, tags.regions()?));
        }
    }
    Err(source.invalid(
        HEADER,
        "it has no group memory, which lists the regions: name the state of the memory",
    ))
}

/// The tags of a group.
struct Tags<'s> {
    source: &'s Source,
    at: u64,
    long_lengths: bool,
}

/// A tag whose value is a number, unless it is longer than one.
struct Tag {
    name: Vec<u8>,
    indices: Vec<u64>,
    value: Option<u64>,
}

impl Tags<'_> {
    fn regions(mut self) -> Result<BTreeMap<u64, Region>, OpenError> {
        let mut regions = BTreeMap::<u64, Region>::new();
        let mut count = None;
        for _ in 0..MAX_TAGS {
            let at = self.at;
            let Some(tag) = self.next()? else {
                let expected = count.unwrap_or(regions.len() as u64);
                let is_complete = (0..expected).all(|number| regions.contains_key(&number));
                if regions.len() as u64 != expected || !is_complete {
                    let problem = format!(
                        "it has {} regions and not {expected}: the file is damaged",
                        regions.len()
                    );
                    return Err(self.source.invalid(at, problem));
                }
                return Ok(regions);
            };
            let (Some(value), index) = (tag.value, tag.indices.first().copied()) else {
                continue;
            };
            if index.is_some_and(|index| index >= MAX_REGIONS) {
                let problem = format!("more than {MAX_REGIONS} regions are not supported");
                return Err(self.source.invalid(at, problem));
            }
            match (&tag.name[..], index) {
                (b"regionsCount", None) => count = Some(value),
                (b"regionPPN", Some(it)) => regions.entry(it).or_default().address = Some(value),
                (b"regionPageNum", Some(it)) => {
                    regions.entry(it).or_default().position = Some(value)
                }
                (b"regionSize", Some(it)) => regions.entry(it).or_default().size = Some(value),
                _ => {}
            }
        }
        let problem = format!("it has more than {MAX_TAGS} tags in a group: the file is damaged");
        Err(self.source.invalid(self.at, problem))
    }

    /// Returns the next tag, or `None` after the last one.
    fn next(&mut self) -> Result<Option<Tag>, OpenError> {
        let at = self.at;
        let bytes = self.source.up_to(at, MAX_TAG)?;
        let cut = || {
            self.source.invalid(
                at,
                "the file ends in a tag: it is cut short, so copy it again",
            )
        };
        let (flags, name_len) = match bytes[..] {
            [0, 0, ..] => return Ok(None),
            [flags, name_len, ..] => (flags, usize::from(name_len)),
            _ => return Err(cut()),
        };
        let index_count = usize::from(flags >> 6);
        let indices_at = 2 + name_len;
        let value_at = indices_at + 4 * index_count;
        let name = bytes.get(2..indices_at).ok_or_else(cut)?.to_vec();
        let indices = bytes.get(indices_at..value_at).ok_or_else(cut)?;
        let indices = indices.chunks_exact(4).map(|index| le::<4>(index, 0));
        let value = bytes.get(value_at..).ok_or_else(cut)?;
        let (number, next) = match flags & 0x3f {
            62 | 63 => {
                let (stored, lengths) = match self.long_lengths {
                    true if value.len() >= 16 => (le::<8>(value, 0), 16),
                    false if value.len() >= 8 => (le::<4>(value, 0), 8),
                    _ => return Err(cut()),
                };
                let value_at = at + value_at as u64 + lengths + 2;
                self.source.check_range(value_at, stored, at)?;
                (None, value_at + stored)
            }
            len => {
                let value = value.get(..usize::from(len)).ok_or_else(cut)?;
                let mut number = [0; 8];
                let short = value.len().min(8);
                number[..short].copy_from_slice(&value[..short]);
                let number = (value.len() <= 8).then(|| u64::from_le_bytes(number));
                (number, at + value_at as u64 + u64::from(len))
            }
        };
        let tag = Tag {
            name,
            indices: indices.collect(),
            value: number,
        };
        self.at = next;
        Ok(Some(tag))
    }
}
