//! LiME, the format of the Linux Memory Extractor.
//!
//! Each range of guest-physical addresses is a header of 32 bytes and its memory. A header has, as
//! little-endian numbers: the magic number (`EMiL`) and the version 1, of 32 bits each; the first
//! and the last address, of 64 bits each; and 8 bytes of zeros.

use page_reader::RamLayout;

use crate::error::PlanError;
use crate::file_plan::{FilePlan, Placed};

const HEADER: u64 = 32;

/// Plans a file with one header for each range of addresses.
pub(crate) fn plan(layout: &RamLayout) -> Result<FilePlan, PlanError> {
    let (mut headers, mut placed) = (Vec::new(), Vec::new());
    let (mut ram, mut file) = (0, 0_u64);
    for range in layout.addresses() {
        let mut header = Vec::with_capacity(HEADER as usize);
        header.extend_from_slice(b"EMiL");
        header.extend_from_slice(&1_u32.to_le_bytes());
        header.extend_from_slice(&range.start.to_le_bytes());
        header.extend_from_slice(&(range.end - 1).to_le_bytes());
        header.resize(HEADER as usize, 0);
        headers.push((file, header));
        let len = range.end - range.start;
        let data = file + HEADER;
        placed.push(Placed {
            ram,
            file: data,
            len,
        });
        ram += len;
        file = data.checked_add(len).ok_or(PlanError::TooLarge)?;
    }
    FilePlan::new(headers, placed)
}
