//! An address range of this process, without a reference to it.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

/// The bytes of a machine word, the unit in which guest memory is loaded.
const WORD: usize = size_of::<usize>();
/// How many words are loaded before it's asked whether any is not zero.
const BLOCK: usize = 32;

/// A range of this process's memory that stays readable for `'a` and may change at any moment.
///
/// This is an address and a length, never a reference: a vCPU may write the bytes while the kernel or
/// [`copy_to`](Self::copy_to) reads them. Hand [`as_ptr`](Self::as_ptr) and [`len`](Self::len) to a system call
/// (`pwrite`, io_uring, `vmsplice`) and the kernel reads the memory directly, or copy the bytes out.
///
/// # Examples
/// ```
/// use page_reader::HostMemory;
///
/// let memory = HostMemory::from(&b"guest"[..]);
/// let mut copy = [0; 2];
/// memory.slice(1..3).copy_to(&mut copy);
/// assert_eq!(&copy, b"ue");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct HostMemory<'a> {
    start: *const u8,
    len: usize,
    source: PhantomData<&'a ()>,
}

// SAFETY: the value is an address and a length. `new` asks that the range be readable, and tolerate writes, for
// 'a whatever the thread: mappings belong to the process, not to a thread.
unsafe impl Send for HostMemory<'_> {}
// SAFETY: as for Send; and every method takes the value by copy and only loads, so sharing it adds nothing.
unsafe impl Sync for HostMemory<'_> {}

impl<'a> HostMemory<'a> {
    /// Names `len` bytes from `start` on.
    ///
    /// # Safety
    /// As long as the value, or anything made from it (copies, slices, readers over it), can still be used, `'a`
    /// at most:
    /// - The whole range is mapped and readable by every thread, and doesn't wrap around the address space. A file
    ///   behind it isn't truncated (a load past its end is a SIGBUS). Memory that is filled on first
    ///   touch, as by userfaultfd, counts as readable.
    /// - No `&mut` reference covers any of its bytes.
    /// - vCPUs, devices, the kernel and other processes may write it at any time. Rust code of *this* process that
    ///   writes it meanwhile does so through raw pointers, with atomic operations or, as `vm-memory` does, volatile
    ///   ones: a plain write is a data race.
    ///
    /// An empty range asks for nothing.
    #[must_use]
    pub const unsafe fn new(start: *const u8, len: usize) -> Self {
        Self {
            start,
            len,
            source: PhantomData,
        }
    }

    /// The address of the first byte; of any alignment.
    #[must_use]
    pub const fn as_ptr(self) -> *const u8 {
        self.start
    }

    /// The length in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The bytes from `range.start` up to, not including, `range.end`, both counted from the first byte.
    ///
    /// # Panics
    /// Panics where the range is decreasing or ends past [`len`](Self::len), as slicing does.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        let Range { start, end } = range;
        assert!(
            start <= end && end <= self.len,
            "bytes {start}..{end} of a host memory range of {} bytes",
            self.len
        );
        Self {
            // Inside the range, or one past its last byte, by the assertion: the same memory as `new` was given.
            start: self.start.wrapping_add(start),
            len: end - start,
            source: PhantomData,
        }
    }

    /// The first `mid` bytes, and the others.
    ///
    /// # Panics
    /// Panics where `mid` is past [`len`](Self::len), as `<[u8]>::split_at` does.
    #[must_use]
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        (self.slice(0..mid), self.slice(mid..self.len))
    }

    /// Copies the bytes to `buf`, while others may be writing them.
    ///
    /// Each aligned machine word is loaded once and whole: a word that others write with single stores is copied
    /// as it was before or after each of them, never torn. Between words there's no order: what is written meanwhile
    /// may be in the copy in part, so a page whose copy must be of one instant needs its writers stopped (or a dirty
    /// log that brings it back in the next round).
    ///
    /// Not for bytes that `buf` itself covers: [`new`](Self::new) forbids that.
    ///
    /// # Panics
    /// Panics where `buf` isn't exactly [`len`](Self::len) bytes, as `copy_from_slice` does.
    pub fn copy_to(self, buf: &mut [u8]) {
        assert_eq!(
            self.len,
            buf.len(),
            "a host memory range is copied to a buffer of its own length"
        );
        // Why atomics: a load that races with a store is undefined where either is plain, volatile or the inside
        // of a memcpy, and defined where both are atomic (what vCPUs and devices do is machine stores, atomic per
        // aligned word). Why words: from memory outside the caches this loop reached 0.66 to 1.05 of
        // memcpy's speed in several runs on a shared 2-core Xeon (medians of the steadiest: 8.4 of 11.2 GB/s in 4 KiB
        // pages, 8.1 of 9.9 in 1 MiB pieces), byte-wise loads about a sixth.
        let unaligned = self.start.align_offset(WORD).min(buf.len());
        let (head, rest) = buf.split_at_mut(unaligned);
        let (words, tail) = rest.as_chunks_mut::<WORD>();
        let mut from = self.start;
        copy_bytes(&mut from, head);
        for word in words {
            // SAFETY: head, words and tail add up to `len`, and `from` has advanced by what came before, so it
            // is in the range that `new` promises mapped, free of `&mut` and of plain writers. It's aligned, since
            // head took what was missing. The reference lives for this load, and being to an atomic it claims
            // nothing about who else writes. Relaxed loads up to a word may also touch read-only memory
            // (std::sync::atomic, "Atomic accesses to read-only memory").
            *word = unsafe { (*from.cast::<AtomicUsize>()).load(Relaxed) }.to_ne_bytes();
            from = from.wrapping_add(WORD);
        }
        copy_bytes(&mut from, tail);

        fn copy_bytes(from: &mut *const u8, to: &mut [u8]) {
            for byte in to {
                // SAFETY: as for words, of which a byte needs no alignment.
                *byte = unsafe { (*from.cast::<AtomicU8>()).load(Relaxed) };
                *from = from.wrapping_add(1);
            }
        }
    }

    /// Maps the pages of the range, as a load of each would do.
    ///
    /// A load of a page that cannot be had is a `SIGBUS`, which ends the process: on a tmpfs that is
    /// full, where there is no huge page left, past the end of a file that was truncated, in memory
    /// that the hardware lost. Here that is an error. What becomes of the pages afterwards (a hole that
    /// is punched, a truncation) is not known to this call.
    ///
    /// Memory that is filled by userfaultfd is waited for, unless it is for loads of this process
    /// alone; that memory is left as it is. On systems other than Linux, and before Linux 5.14, nothing
    /// is done.
    ///
    /// # Errors
    /// `EFAULT` where a load would be a `SIGBUS`, `EHWPOISON` where the memory is broken, `ENOMEM`
    /// where there is no memory or no mapping.
    pub fn fault_in(self) -> std::io::Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        return crate::sys::fault_in(self);
        #[cfg(not(target_os = "linux"))]
        Ok(())
    }

    /// Whether every byte is zero, each as it is when it's loaded: others may be writing them.
    ///
    /// Goes no further than a few words past the first byte that isn't zero. Memory that was never touched is touched by this:
    /// [`PageReader::populated`](crate::PageReader::populated) says where that can be saved.
    ///
    /// # Examples
    /// ```
    /// use page_reader::HostMemory;
    ///
    /// let mut page = vec![0; 4096];
    /// assert!(HostMemory::from(&page[..]).is_zero());
    /// page[4095] = 1;
    /// assert!(!HostMemory::from(&page[..]).is_zero());
    /// ```
    #[must_use]
    pub fn is_zero(self) -> bool {
        let (head, rest) = self.split_at(self.start.align_offset(WORD).min(self.len));
        let (blocks, rest) = rest.split_at(rest.len - rest.len % (BLOCK * WORD));
        let (words, tail) = rest.split_at(rest.len - rest.len % WORD);
        let block = |at: usize| (0..BLOCK).fold(0, |any, word| any | blocks.word(at + word * WORD));
        (0..head.len).all(|at| head.byte(at) == 0)
            && (0..blocks.len)
                .step_by(BLOCK * WORD)
                .all(|at| block(at) == 0)
            && (0..words.len).step_by(WORD).all(|at| words.word(at) == 0)
            && (0..tail.len).all(|at| tail.byte(at) == 0)
    }

    /// The byte at `at`.
    fn byte(self, at: usize) -> u8 {
        debug_assert!(at < self.len);
        // SAFETY: `at` is in the range (the callers go through it), which `new` promises mapped, free of `&mut` and of plain
        // writers; the reference to an atomic lives for this load, and may also touch read-only memory, as in `copy_to`.
        unsafe { (*self.start.wrapping_add(at).cast::<AtomicU8>()).load(Relaxed) }
    }

    /// The word that starts at `at`, where the address is aligned.
    fn word(self, at: usize) -> usize {
        debug_assert!(at < self.len && self.len - at >= WORD);
        let word = self.start.wrapping_add(at).cast::<AtomicUsize>();
        debug_assert!(word.is_aligned());
        // SAFETY: as for a byte; the callers go through whole words from an aligned address on.
        unsafe { (*word).load(Relaxed) }
    }
}

/// Ordinary memory is host memory that nobody writes.
impl<'a> From<&'a [u8]> for HostMemory<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        // SAFETY: a shared borrow keeps the bytes allocated, and free of writers and of `&mut`, for 'a.
        unsafe { Self::new(bytes.as_ptr(), bytes.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn every_start_and_length_around_a_word_is_copied_exactly() {
        let bytes: Vec<u8> = (1..=64).collect();
        for start in 0..=2 * WORD {
            for end in start..=start + 3 * WORD {
                let mut copy = vec![0; end - start];
                HostMemory::from(&bytes[..])
                    .slice(start..end)
                    .copy_to(&mut copy);
                assert_eq!(copy, bytes[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn one_byte_anywhere_around_words_and_blocks_is_not_zero() {
        let mut bytes = vec![0; 3 * BLOCK * WORD];
        for start in 0..=WORD {
            for len in (0..=2 * WORD).chain(BLOCK * WORD - 1..=BLOCK * WORD + 2 * WORD) {
                let range = start..start + len;
                // What stands outside doesn't count.
                bytes.fill(1);
                bytes[range.clone()].fill(0);
                assert!(
                    HostMemory::from(&bytes[range.clone()]).is_zero(),
                    "{range:?}"
                );
                for at in range.clone() {
                    bytes[at] = 0x80;
                    assert!(
                        !HostMemory::from(&bytes[range.clone()]).is_zero(),
                        "{at} of {range:?}"
                    );
                    bytes[at] = 0;
                }
            }
        }
    }

    #[test]
    fn the_two_halves_of_a_split_are_the_whole() {
        let memory = HostMemory::from(&b"memory"[..]);
        let (left, right) = memory.split_at(2);
        assert_eq!((left.as_ptr(), left.len()), (memory.as_ptr(), 2));
        assert_eq!(
            (right.as_ptr(), right.len()),
            (memory.as_ptr().wrapping_add(2), 4)
        );
        let (all, nothing) = memory.split_at(6);
        assert!(!all.is_empty() && nothing.is_empty());
    }

    #[rstest]
    #[case::past_the_end(0, 7)]
    #[case::all_past_the_end(7, 7)]
    #[case::end_at_the_last_address(1, usize::MAX)]
    #[case::decreasing(4, 3)]
    #[should_panic(expected = "of a host memory range of 6 bytes")]
    fn a_slice_outside_the_range_panics(#[case] start: usize, #[case] end: usize) {
        let _ = HostMemory::from(&b"memory"[..]).slice(start..end);
    }

    #[rstest]
    #[case::shorter(5)]
    #[case::longer(7)]
    #[should_panic(expected = "a buffer of its own length")]
    fn a_buffer_of_another_length_panics(#[case] len: usize) {
        HostMemory::from(&b"memory"[..]).copy_to(&mut vec![0; len]);
    }

    #[test]
    fn an_empty_range_may_have_any_address() {
        // SAFETY: no byte is promised.
        unsafe { HostMemory::new(std::ptr::null(), 0) }.copy_to(&mut []);
    }
}
