//! Write protection of guest memory by userfaultfd.

#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::WriteProtection;
use nix::sys::mman::{MmapAdvise, madvise};
use page_reader::{HostMemory, PageReader};
use uffd::{Modes, Stop, Userfaultfd};

use super::tracker_error::{UffdProtectError, UffdTrackerError};

/// The most bytes that are protected in one call, which holds locks of the address space: about
/// half a millisecond in pages of 4 KiB.
const SLICE: u64 = 32 << 20;

/// The write protection of guest memory by userfaultfd. Ranges are offsets in the memory file.
#[derive(Clone, Debug)]
pub struct UffdProtection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fault: Userfaultfd,
    pieces: Box<[Piece]>,
}

/// A contiguous part of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    address: u64,
    len: u64,
}

impl UffdProtection {
    /// Registers the memory of `ram_size` bytes that a reader exposes. No page is protected yet.
    pub(super) fn register<M: PageReader + ?Sized>(
        fault: Userfaultfd,
        memory: &M,
        ram_size: u64,
    ) -> Result<Self, UffdTrackerError> {
        let mut pieces = Vec::new();
        let mut offset = 0;
        while offset < ram_size {
            let rest = usize::try_from(ram_size - offset).unwrap_or(usize::MAX);
            let exposed = memory.host_memory(offset, rest);
            let exposed = exposed.ok_or(UffdTrackerError::NotExposed { offset })?;
            let (address, len) = (exposed.as_ptr().addr() as u64, exposed.len() as u64);
            // SAFETY: the memory is mapped while the caller keeps its owner, which it does longer
            // than the descriptor. Only writes wait: missing pages are filled as before.
            unsafe { fault.register(address..address + len, Modes::WRITE_PROTECT) }?;
            unmerge(exposed);
            pieces.push(Piece {
                offset,
                address,
                len,
            });
            offset += len;
        }
        let pieces = pieces.into_boxed_slice();
        Ok(Self(Arc::new(Inner { fault, pieces })))
    }

    pub(super) fn fault(&self) -> &Userfaultfd {
        &self.0.fault
    }

    /// Returns the offset of an address in the memory file.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let pieces = self.0.pieces.iter();
        pieces
            .filter(|piece| (piece.address..piece.address + piece.len).contains(&address))
            .map(|piece| piece.offset + (address - piece.address))
            .next()
    }

    /// Returns the addresses of a range of offsets, at most one range for each piece of memory.
    pub(super) fn addresses(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.0.pieces.iter().filter_map(move |piece| {
            let start = range.start.max(piece.offset);
            let end = range.end.min(piece.offset + piece.len);
            let address = |offset: u64| piece.address + (offset - piece.offset);
            (start < end).then(|| address(start)..address(end))
        })
    }

    /// Wakes the writes that wait for a page.
    pub(super) fn wake(&self, range: Range<u64>) -> std::io::Result<()> {
        let mut addresses = self.addresses(range);
        addresses.try_for_each(|addresses| self.0.fault.wake(addresses))
    }

    /// Ends the registration of all memory: it is writable, and waiting writes continue. Returns
    /// the first error.
    pub(super) fn unregister(&self) -> std::io::Result<()> {
        let mut first = Ok(());
        for Piece { address, len, .. } in &self.0.pieces {
            let unregistered = self.0.fault.unregister(*address..address + len);
            first = first.and(unregistered);
        }
        first
    }

    fn change(
        &self,
        range: Range<u64>,
        change: impl Fn(&Userfaultfd, Range<u64>) -> Result<(), Stop>,
    ) -> Result<(), UffdProtectError> {
        for addresses in self.addresses(range) {
            let mut at = addresses.start;
            while at < addresses.end {
                let end = addresses.end.min(at + SLICE);
                match change(&self.0.fault, at..end) {
                    Ok(()) => at = end,
                    // A mapping of the process is changing.
                    Err(Stop::Changing) => std::thread::yield_now(),
                    Err(source) => {
                        return Err(UffdProtectError {
                            addresses: at..end,
                            source,
                        });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes memory private that the kernel has merged with equal pages (KSM), and ends the merging: a
/// page that is merged loses its write protection without a fault.
fn unmerge(memory: HostMemory<'_>) {
    let start = NonNull::new(memory.as_ptr().cast_mut().cast());
    if let Some(start) = start {
        // SAFETY: the memory is mapped, and this does not change its contents.
        let unmerged = unsafe { madvise(start, memory.len(), MmapAdvise::MADV_UNMERGEABLE) };
        // A kernel without KSM refuses it, and merges nothing.
        let _ = unmerged;
    }
}

impl WriteProtection for UffdProtection {
    type Error = UffdProtectError;

    fn protect(&self, range: Range<u64>) -> Result<(), UffdProtectError> {
        self.change(range, Userfaultfd::write_protect)
    }

    /// A page of anonymous memory that was discarded is found by its missing protection.
    fn may_bridge(&self) -> bool {
        false
    }

    /// Does not wake waiting writes.
    fn unprotect(&self, range: Range<u64>) -> Result<(), UffdProtectError> {
        self.change(range, |fault, range| fault.write_unprotect(range, false))
    }
}
