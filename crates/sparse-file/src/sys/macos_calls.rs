//! The decisions about system calls of macOS, apart from the calls. Tests run them on each system.

use std::io;
use std::ops::Range;

use nix::errno::Errno;

/// The system calls of macOS on a file.
pub(crate) trait Calls {
    /// Returns the length of the file and the bytes that are allocated to it (`fstat`).
    fn sizes(&self) -> io::Result<Sizes>;
    /// Sets the length of the file (`ftruncate`).
    fn resize(&self, len: u64) -> io::Result<()>;
    /// Writes all bytes at an offset (`pwrite`).
    fn put(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Returns the block size of the file system (`fstatfs`).
    fn block_size(&self) -> io::Result<u64>;
    /// Punches out whole blocks (`F_PUNCHHOLE`).
    fn punch(&self, blocks: Range<u64>) -> Result<(), Errno>;
    /// Allocates bytes after the present blocks of the file (`F_PREALLOCATE`, with
    /// `F_ALLOCATEALL` and `F_PEOFPOSMODE`). The length of the file does not change.
    fn preallocate(&self, more: u64) -> Result<(), Errno>;
    /// Sets or clears `F_NOCACHE`.
    fn set_uncached(&self, on: bool) -> Result<(), Errno>;
}

/// The sizes of a file in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub len: u64,
    pub allocated: u64,
}

/// Punches a hole by `F_PUNCHHOLE`, which refuses a range that is not of whole blocks. Parts of
/// blocks at both ends are therefore overwritten with zeros.
pub(crate) fn punch_hole(file: &impl Calls, range: Range<u64>) -> io::Result<()> {
    let block = file.block_size()?.max(1);
    let start = range.start.next_multiple_of(block).min(range.end);
    let end = (range.end - range.end % block).max(start);
    // First, so that an unsupported call changes no bytes.
    if start < end {
        file.punch(start..end)?;
    }
    write_zeros(file, range.start..start)?;
    write_zeros(file, end..range.end)
}

fn write_zeros(file: &impl Calls, range: Range<u64>) -> io::Result<()> {
    let zeros = [0; 4096];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).map_or(zeros.len(), |len| len.min(zeros.len()));
        file.put(&zeros[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Reserves the part of `[0, len)` past the present end of the file, and grows the file.
pub(crate) fn reserve(file: &impl Calls, len: u64) -> io::Result<()> {
    let sizes = file.sizes()?;
    let owned = sizes.len.max(sizes.allocated);
    if len > owned {
        match file.preallocate(len - owned) {
            // APFS returns this for valid arguments: for some new files, and where more is
            // allocated than was asked for.
            Err(Errno::EINVAL) => return Err(Errno::ENOTSUP.into()),
            result => result?,
        }
    }
    if len > sizes.len {
        file.resize(len)?;
    }
    Ok(())
}

/// Sets `F_NOCACHE` on a file until it is dropped. The previous state cannot be queried, so it is
/// cleared on drop.
#[derive(Debug)]
pub(crate) struct Uncached<'f, F: Calls>(&'f F);

impl<'f, F: Calls> Uncached<'f, F> {
    /// Sets `F_NOCACHE` as a hint: a file that does not support it is written without.
    pub(crate) fn new(file: &'f F) -> Self {
        let _ = file.set_uncached(true);
        Self(file)
    }
}

impl<F: Calls> Drop for Uncached<'_, F> {
    fn drop(&mut self) {
        let _ = self.0.set_uncached(false);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use rstest::rstest;

    use super::*;

    const BLOCK: u64 = 4096;

    /// A file on APFS, whose calls answer as Apple documents them.
    struct Apfs {
        bytes: RefCell<Vec<u8>>,
        allocated: Cell<u64>,
        /// What `F_PREALLOCATE`, `F_PUNCHHOLE` and `F_NOCACHE` fail with.
        failure: Option<Errno>,
        /// The fcntl calls that succeeded, with their arguments.
        calls: RefCell<Vec<(&'static str, Range<u64>)>>,
    }

    impl Apfs {
        fn new(len: usize, allocated: u64) -> Self {
            Self {
                bytes: RefCell::new(vec![1; len]),
                allocated: Cell::new(allocated),
                failure: None,
                calls: RefCell::default(),
            }
        }

        fn failing(self, errno: Errno) -> Self {
            Self {
                failure: Some(errno),
                ..self
            }
        }

        fn call(&self, name: &'static str, range: Range<u64>) -> Result<(), Errno> {
            if let Some(errno) = self.failure {
                return Err(errno);
            }
            self.calls.borrow_mut().push((name, range));
            Ok(())
        }

        fn len(&self) -> u64 {
            self.bytes.borrow().len() as u64
        }
    }

    impl Calls for Apfs {
        fn sizes(&self) -> io::Result<Sizes> {
            Ok(Sizes {
                len: self.len(),
                allocated: self.allocated.get(),
            })
        }

        fn resize(&self, len: u64) -> io::Result<()> {
            self.bytes.borrow_mut().resize(len as usize, 0);
            Ok(())
        }

        fn put(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            let at = at as usize;
            self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn block_size(&self) -> io::Result<u64> {
            Ok(BLOCK)
        }

        /// fcntl(2): "The offset and length must be multiples of the file system's block size", and
        /// EINVAL otherwise.
        fn punch(&self, blocks: Range<u64>) -> Result<(), Errno> {
            if !(blocks.start | blocks.end).is_multiple_of(BLOCK) || blocks.is_empty() {
                return Err(Errno::EINVAL);
            }
            self.call("punch", blocks.clone())?;
            self.bytes.borrow_mut()[blocks.start as usize..blocks.end as usize].fill(0);
            Ok(())
        }

        fn preallocate(&self, more: u64) -> Result<(), Errno> {
            self.call("preallocate", self.allocated.get()..more)?;
            let blocks = more.next_multiple_of(BLOCK);
            self.allocated.set(self.allocated.get() + blocks);
            Ok(())
        }

        fn set_uncached(&self, on: bool) -> Result<(), Errno> {
            self.call("uncached", 0..u64::from(on))
        }
    }

    #[rstest]
    #[case::whole_blocks(BLOCK..3 * BLOCK, Some(BLOCK..3 * BLOCK))]
    #[case::parts_at_both_ends(100..3 * BLOCK + 7, Some(BLOCK..3 * BLOCK))]
    #[case::part_of_a_block(100..200, None)]
    #[case::parts_of_two_blocks(BLOCK - 1..BLOCK + 1, None)]
    #[case::from_inside_to_the_end(1..4 * BLOCK, Some(BLOCK..4 * BLOCK))]
    fn a_hole_is_of_whole_blocks_with_zeros_around(
        #[case] range: Range<u64>,
        #[case] punched: Option<Range<u64>>,
    ) {
        let file = Apfs::new(4 * BLOCK as usize, 4 * BLOCK);
        punch_hole(&file, range.clone()).expect("punched");
        let calls: Vec<_> = punched
            .map(|blocks| ("punch", blocks))
            .into_iter()
            .collect();
        assert_eq!(*file.calls.borrow(), calls);
        for (at, byte) in (0..).zip(&*file.bytes.borrow()) {
            assert_eq!(*byte == 0, range.contains(&at), "{at}");
        }
    }

    #[test]
    fn a_refused_hole_changes_no_byte() {
        let file = Apfs::new(4 * BLOCK as usize, 4 * BLOCK).failing(Errno::ENOTSUP);
        let error = punch_hole(&file, 100..3 * BLOCK).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTSUP));
        assert!(file.bytes.borrow().iter().all(|byte| *byte == 1));
    }

    /// The file's length, its allocated bytes, and the length to reserve.
    #[rstest]
    #[case::new_file(0, 0, 10_000, Some(10_000))]
    #[case::after_the_blocks(5000, 2 * BLOCK, 10_000, Some(10_000 - 2 * BLOCK))]
    #[case::sparse_file(9000, BLOCK, 10_000, Some(1000))]
    #[case::allocated_before(0, 4 * BLOCK, 10_000, None)]
    #[case::shorter(20_000, 5 * BLOCK, 10_000, None)]
    #[case::same_length(10_000, 3 * BLOCK, 10_000, None)]
    fn what_a_file_lacks_is_reserved(
        #[case] before: usize,
        #[case] allocated: u64,
        #[case] len: u64,
        #[case] more: Option<u64>,
    ) {
        let file = Apfs::new(before, allocated);
        reserve(&file, len).expect("reserved");
        let calls: Vec<_> = more
            .map(|more| ("preallocate", allocated..more))
            .into_iter()
            .collect();
        assert_eq!(*file.calls.borrow(), calls);
        assert_eq!(file.len(), len.max(before as u64));
        assert!(file.allocated.get() >= len || before as u64 > allocated);
    }

    #[rstest]
    #[case::invalid_of_apfs(Errno::EINVAL, libc::ENOTSUP)]
    #[case::unsupported(Errno::ENOTSUP, libc::ENOTSUP)]
    #[case::no_space(Errno::ENOSPC, libc::ENOSPC)]
    fn a_failed_reservation_does_not_grow_the_file(#[case] errno: Errno, #[case] reported: i32) {
        let file = Apfs::new(5, BLOCK).failing(errno);
        let error = reserve(&file, 10_000).expect_err("failed");
        assert_eq!(error.raw_os_error(), Some(reported));
        assert_eq!(file.len(), 5);
    }

    #[test]
    fn the_cache_is_bypassed_until_the_drop() {
        let file = Apfs::new(0, 0);
        let uncached = Uncached::new(&file);
        assert_eq!(*file.calls.borrow(), [("uncached", 0..1)]);
        drop(uncached);
        assert_eq!(
            *file.calls.borrow(),
            [("uncached", 0..1), ("uncached", 0..0)]
        );
        // Only a hint.
        drop(Uncached::new(&Apfs::new(0, 0).failing(Errno::ENOTSUP)));
    }
}
