//! Finds the note `VMCOREINFO` in the memory of a Linux guest.

use std::io;
use std::ops::ControlFlow;

use page_reader::{NonzeroRuns, PageReader, SecretBuffer, Touched};
use sparse_file::{Progress, ProgressFn};

/// The kernel keeps the note at the start of a page.
const PAGE: u64 = 4096;
/// The length of the header of a note with its name.
const HEADER: usize = 24;
/// More than the description of a note has: the kernel gives it a page.
const MAX_DESCRIPTION: usize = 64 << 10;
/// What the description begins with.
const FIRST_LINE: &[u8] = b"OSRELEASE=";

/// Returns the ELF note `VMCOREINFO` that the kernel of a Linux guest keeps in its memory, with its
/// header, for the notes of an [ELF core](crate::FilePlan::elf). crash and drgn read in it where
/// the kernel is. Returns `None` if the memory has no such note, or several that differ.
///
/// The kernel keeps the note at the start of a page if it is built with `CONFIG_VMCORE_INFO`
/// (`CONFIG_CRASH_CORE` before Linux 6.9), as those of distributions are. All memory that is not
/// known to be untouched is read. A program in the guest can write such a note too, so do not trust
/// it more than the rest of the memory.
///
/// # Errors
/// Returns an error of the source, or one of kind [`Interrupted`](io::ErrorKind::Interrupted) if
/// `progress` breaks.
pub fn find_vmcoreinfo<R: PageReader + ?Sized>(
    reader: &R,
    ram_size: u64,
    progress: &mut ProgressFn<'_>,
) -> io::Result<Option<Vec<u8>>> {
    let touched = Touched::new(reader, ram_size);
    let mut found: Option<Vec<u8>> = None;
    let mut buffer = SecretBuffer::new();
    for run in NonzeroRuns::new(&touched, ram_size, PAGE) {
        if progress(Progress::new(run.start, ram_size)) == ControlFlow::Break(()) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        // At most 1 MiB.
        let bytes = buffer.sized((run.end - run.start) as usize);
        touched.read_at(run.start, bytes)?;
        for (page, start) in (run.start..run.end).step_by(PAGE as usize).enumerate() {
            let first = &bytes[page * PAGE as usize..];
            let Some(len) = note_len(&first[..first.len().min(PAGE as usize)]) else {
                continue;
            };
            // The note may end in a later run.
            let mut note = vec![0; len];
            if start + len as u64 > ram_size {
                continue;
            }
            touched.read_at(start, &mut note)?;
            match &found {
                Some(other) if *other != note => return Ok(None),
                _ => found = Some(note),
            }
        }
    }
    Ok(found)
}

/// Returns the length of the note that a page begins with: the lengths of name and description, the
/// type 0 (32 bits each, little-endian), the name, and the description, both padded to 4 bytes.
fn note_len(page: &[u8]) -> Option<usize> {
    let description = page.strip_prefix(&[11, 0, 0, 0])?;
    let (len, rest) = description.split_first_chunk::<4>()?;
    let rest = rest.strip_prefix(b"\0\0\0\0VMCOREINFO\0\0")?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let is_one = rest.starts_with(FIRST_LINE) && len <= MAX_DESCRIPTION;
    is_one.then(|| (HEADER + len).next_multiple_of(4))
}
