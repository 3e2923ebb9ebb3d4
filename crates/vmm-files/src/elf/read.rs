//! Reads the segments of an ELF core.

use std::path::Path;

use page_reader::RamLayout;

use super::{ET_CORE, HEADER, PN_XNUM, PT_LOAD, SECTION, SEGMENT};
use crate::error::OpenError;
use crate::format::Format;
use crate::guest_file::{Contents, Part, Stored};
use crate::source::{Source, le};

/// More segments than any guest has regions of RAM. Their list takes 32 MiB.
const MAX_SEGMENTS: u64 = 1 << 20;
/// Program headers that are read at a time.
const STEP: u64 = 1024;

/// A `PT_LOAD` segment, and the position of its header.
#[derive(Clone, Copy)]
struct Segment {
    header: u64,
    address: u64,
    /// At least 1. The bytes after the stored ones are zeros.
    size: u64,
    position: u64,
    stored: u64,
}

pub(crate) fn read(path: &Path) -> Result<Contents, OpenError> {
    let source = Source::open(path, Format::Elf)?;
    let (first, count) = program_headers(&source)?;
    let mut segments = loads(&source, first, count)?;
    segments.sort_by_key(|segment| (segment.address, segment.position));
    let segments = without_repetitions(&source, segments)?;
    let regions = segments.iter().map(|it| (it.address, it.size));
    let layout = RamLayout::new(regions).map_err(|source| OpenError::Layout {
        path: path.to_owned(),
        source,
    })?;
    let mut start = 0;
    let parts = segments.iter().filter_map(|segment| {
        let part = Part {
            start,
            len: segment.stored,
            source: 0,
            stored: Stored::Bytes(segment.position),
        };
        start += segment.size;
        (segment.stored > 0).then_some(part)
    });
    Ok(Contents {
        parts: parts.collect(),
        layout,
        sources: vec![source],
    })
}

/// Returns the position and the number of the program headers.
fn program_headers(source: &Source) -> Result<(u64, u64), OpenError> {
    let header: [u8; HEADER as usize] = source.bytes(0)?;
    if !header.starts_with(b"\x7fELF") {
        return Err(source.invalid(
            0,
            "it does not begin with the magic number of ELF: name its format",
        ));
    }
    if header[4] != 2 {
        return Err(source.invalid(4, "it is not of 64 bits: dump the guest as a 64-bit core"));
    }
    if header[5] != 1 {
        return Err(source.invalid(
            5,
            "it is big-endian, and only little-endian guests are supported",
        ));
    }
    if le::<2>(&header, 16) != u64::from(ET_CORE) {
        let problem = "it is a program or library, and not a core: name the dump of a guest";
        return Err(source.invalid(16, problem));
    }
    let (first, entry) = (le::<8>(&header, 32), le::<2>(&header, 54));
    let mut count = le::<2>(&header, 56);
    if count == u64::from(PN_XNUM) {
        let section = le::<8>(&header, 40);
        source.check_range(section, SECTION, 40)?;
        count = le::<4>(&source.bytes::<4>(section + 44)?, 0);
    }
    if entry != SEGMENT {
        let problem =
            format!("its program headers have {entry} bytes and not {SEGMENT}: it is damaged");
        return Err(source.invalid(54, problem));
    }
    if count > MAX_SEGMENTS {
        let problem =
            format!("it has {count} segments, and more than {MAX_SEGMENTS} are not supported");
        return Err(source.invalid(56, problem));
    }
    source.check_range(first, count * SEGMENT, 32)?;
    Ok((first, count))
}

/// Returns the segments that are loaded and not empty.
fn loads(source: &Source, first: u64, count: u64) -> Result<Vec<Segment>, OpenError> {
    let mut segments = Vec::new();
    let mut buffer = Vec::new();
    for step in (0..count).step_by(STEP as usize) {
        let at = first + step * SEGMENT;
        buffer.resize((STEP.min(count - step) * SEGMENT) as usize, 0);
        source.read(at, &mut buffer)?;
        for (number, bytes) in buffer.chunks_exact(SEGMENT as usize).enumerate() {
            let header = at + number as u64 * SEGMENT;
            let segment = Segment {
                header,
                position: le::<8>(bytes, 8),
                address: le::<8>(bytes, 24),
                stored: le::<8>(bytes, 32),
                size: le::<8>(bytes, 40),
            };
            if le::<4>(bytes, 0) != u64::from(PT_LOAD) || segment.size == 0 {
                continue;
            }
            if segment.stored > segment.size {
                let problem = "the segment stores more bytes than it has: the file is damaged";
                return Err(source.invalid(header + 32, problem));
            }
            source.check_range(segment.position, segment.stored, header + 8)?;
            if segment.address.checked_add(segment.size).is_none() {
                let problem = "the segment ends past the address space: the file is damaged";
                return Err(source.invalid(header + 24, problem));
            }
            segments.push(segment);
        }
    }
    if segments.is_empty() {
        return Err(source.invalid(
            56,
            "it has no segment with memory: dump the guest with its memory",
        ));
    }
    Ok(segments)
}

/// Joins segments that have the same bytes at the same addresses: a dump with paging has a segment
/// for each mapping of a page. Refuses all others that overlap. The segments ascend.
fn without_repetitions(source: &Source, segments: Vec<Segment>) -> Result<Vec<Segment>, OpenError> {
    let mut kept = Vec::<Segment>::with_capacity(segments.len());
    for next in segments {
        let Some(last) = kept.last_mut() else {
            kept.push(next);
            continue;
        };
        let last_end = last.address + last.size;
        if last_end <= next.address {
            kept.push(next);
            continue;
        }
        let same_place = last.position.checked_add(next.address - last.address);
        let all_stored = last.stored == last.size && next.stored == next.size;
        if !all_stored || same_place != Some(next.position) {
            let problem = format!(
                "the segment at {:#x} overlaps the one at {:#x}, with other bytes: if this is the core of a \
                 process, it has no guest-physical memory; if it is of a guest, dump it without paging",
                next.address, last.address
            );
            return Err(source.invalid(next.header + 24, problem));
        }
        let end = last_end.max(next.address + next.size);
        last.size = end - last.address;
        last.stored = last.size;
    }
    Ok(kept)
}
