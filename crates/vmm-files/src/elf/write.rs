//! Plans an ELF core.

use page_reader::RamLayout;

use super::{ET_CORE, ElfMachine, HEADER, PN_XNUM, PT_LOAD, PT_NOTE, SECTION, SEGMENT};
use crate::error::PlanError;
use crate::file_plan::{FilePlan, Placed};

/// Memory begins at a multiple of this, so that it is written and mapped in whole pages.
const ALIGNMENT: u64 = 4096;

/// Plans a core with one segment for each range of addresses, and `notes`, which may be empty.
///
/// `p_vaddr` is the guest-physical address too: gdb reads memory by it. Each segment stores all of
/// its bytes, so that readers that know no zeros after them (gdb) read all memory. Zeros are holes
/// of the file.
pub(crate) fn plan(
    layout: &RamLayout,
    machine: ElfMachine,
    notes: &[u8],
) -> Result<FilePlan, PlanError> {
    let ranges: Vec<_> = layout.addresses().collect();
    let count = ranges.len() as u64 + 1;
    let is_extended = count >= u64::from(PN_XNUM);
    let first = HEADER + if is_extended { SECTION } else { 0 };
    let notes_at = first + count * SEGMENT;
    let data_at = (notes_at + notes.len() as u64).next_multiple_of(ALIGNMENT);

    let mut bytes = Vec::with_capacity((notes_at as usize).saturating_add(notes.len()));
    bytes.extend_from_slice(b"\x7fELF");
    // 64 bits, little-endian, version 1, System V.
    bytes.extend_from_slice(&[2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    put(&mut bytes, &[ET_CORE, machine.number()]);
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    // No entry point.
    put(
        &mut bytes,
        &[0_u64, first, if is_extended { HEADER } else { 0 }],
    );
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    let phnum = if is_extended { PN_XNUM } else { count as u16 };
    let sections = if is_extended {
        [SECTION as u16, 1]
    } else {
        [0, 0]
    };
    put(&mut bytes, &[HEADER as u16, SEGMENT as u16, phnum]);
    put(&mut bytes, &[sections[0], sections[1], 0]);
    if is_extended {
        let info = bytes.len() + 44;
        bytes.resize((HEADER + SECTION) as usize, 0);
        bytes[info..info + 4].copy_from_slice(&(count as u32).to_le_bytes());
    }

    segment(&mut bytes, PT_NOTE, notes_at, 0, notes.len() as u64, 4);
    let mut placed = Vec::with_capacity(ranges.len());
    let mut ram = 0;
    for range in ranges {
        let (file, len) = (data_at + ram, range.end - range.start);
        segment(&mut bytes, PT_LOAD, file, range.start, len, ALIGNMENT);
        placed.push(Placed { ram, file, len });
        ram += len;
    }
    bytes.extend_from_slice(notes);
    FilePlan::new(vec![(0, bytes)], placed)
}

/// Appends a program header: readable, writable and executable memory, or notes.
fn segment(bytes: &mut Vec<u8>, kind: u32, position: u64, address: u64, len: u64, align: u64) {
    let flags: u32 = if kind == PT_LOAD { 7 } else { 4 };
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    let size = if kind == PT_LOAD { len } else { 0 };
    put(bytes, &[position, address, address, len, size, align]);
}

/// Appends little-endian numbers.
fn put<N: Copy + Into<u64>>(bytes: &mut Vec<u8>, numbers: &[N]) {
    for number in numbers {
        let number: u64 = (*number).into();
        bytes.extend_from_slice(&number.to_le_bytes()[..size_of::<N>()]);
    }
}
