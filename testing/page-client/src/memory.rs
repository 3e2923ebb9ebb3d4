//! The memory of the client.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io::{PipeReader, PipeWriter, Read};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::time::Instant;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
use random::Random;
use uffd::{Modes, Userfaultfd};

use crate::request::Memory;

/// Mapped regions. They stay mapped until the process ends.
pub(crate) struct Mapped {
    /// Address and size, in the order of the memory file.
    regions: Vec<(usize, u64)>,
    #[cfg(target_arch = "x86_64")]
    guest: Option<crate::guest::Guest>,
}

impl Mapped {
    pub(crate) fn new(memory: &Memory) -> Result<Self, Errno> {
        #[cfg(target_arch = "x86_64")]
        if memory.guest {
            let guest = crate::guest::Guest::new(memory.regions[0]);
            return Ok(Self {
                regions: vec![(guest.address(), memory.regions[0])],
                guest: Some(guest),
            });
        }
        let regions = memory.regions.iter().map(|size| {
            let len = NonZeroUsize::new(*size as usize).unwrap();
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let mut flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            if memory.huge {
                flags |= MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB;
            }
            // SAFETY: no address is requested, so the kernel picks an unused range.
            let start = unsafe { mmap_anonymous(None, len, access, flags) }?;
            Ok((start.expose_provenance().get(), *size))
        });
        Ok(Self {
            regions: regions.collect::<Result<_, Errno>>()?,
            #[cfg(target_arch = "x86_64")]
            guest: None,
        })
    }

    pub(crate) fn register(&self, fault: &Userfaultfd) {
        for (address, size) in &self.regions {
            let start = *address as u64;
            // SAFETY: mapped until the process ends, and accessed by raw pointers only.
            let registered = unsafe { fault.register(start..start + size, Modes::MISSING) };
            registered.unwrap();
        }
    }

    pub(crate) fn addresses(&self) -> Vec<u64> {
        self.regions
            .iter()
            .map(|(address, _)| *address as u64)
            .collect()
    }

    fn size(&self) -> u64 {
        self.regions.iter().map(|(_, size)| size).sum()
    }

    fn pointer(&self, offset: u64) -> *mut u8 {
        let mut rest = offset;
        for (address, size) in &self.regions {
            if rest < *size {
                return std::ptr::with_exposed_provenance_mut(address + rest as usize);
            }
            rest -= size;
        }
        panic!("{offset:#x} is past the memory");
    }

    /// Reads memory by a system call for each page, which fails where the memory is poisoned.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let (mut reader, writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
        let mut bytes = vec![0; len as usize];
        let mut at = offset;
        while at < offset + len {
            let end = (offset + len).min((at / 4096 + 1) * 4096);
            let part = (end - at) as usize;
            let from = self.pointer(at).cast::<c_void>();
            // SAFETY: the kernel reads mapped memory, and reports an error if it cannot.
            let written = unsafe { libc::write(writer.as_raw_fd(), from, part) };
            let written = Errno::result(written)? as usize;
            let start = (at - offset) as usize;
            reader
                .read_exact(&mut bytes[start..start + written])
                .unwrap();
            at += written as u64;
        }
        Ok(bytes)
    }

    pub(crate) fn write(&self, offset: u64, byte: u8) {
        // SAFETY: mapped and writable. No other thread accesses the byte.
        unsafe { self.pointer(offset).write_volatile(byte) }
    }

    pub(crate) fn touch(&self, threads: u64, stride: u64) -> u64 {
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads)
                .map(|thread| {
                    scope.spawn(move || {
                        let pages = (thread..self.size() / stride).step_by(threads as usize);
                        let read = |page| {
                            // SAFETY: mapped and readable.
                            let byte = unsafe { self.pointer(page * stride).read_volatile() };
                            u64::from(byte)
                        };
                        pages.map(read).sum::<u64>()
                    })
                })
                .collect();
            all.into_iter().map(|thread| thread.join().unwrap()).sum()
        })
    }

    /// Reads all pages but the removed ones, with several threads in random order, while another
    /// one discards these.
    pub(crate) fn churn(
        &self,
        threads: u64,
        seed: u64,
        removed: &[Range<u64>],
    ) -> Result<Vec<u8>, Errno> {
        let is_removed = |at: u64| removed.iter().any(|range| range.contains(&at));
        let mut pages: Vec<_> = (0..self.size()).step_by(4096).collect();
        pages.retain(|at| !is_removed(*at));
        let mut random = Random::seeded(seed);
        for last in (1..pages.len()).rev() {
            pages.swap(last, random.below(last as u64 + 1) as usize);
        }
        let mut bytes = vec![0; self.size() as usize];
        let pages = &pages;
        let read = std::thread::scope(|scope| {
            let remove = scope.spawn(|| {
                let mut all = removed.iter();
                all.try_for_each(|range| self.remove(range.start, range.end - range.start))
            });
            let readers: Vec<_> = (0..threads as usize)
                .map(|thread| {
                    scope.spawn(move || {
                        let own = pages.iter().skip(thread).step_by(threads as usize);
                        own.map(|at| Ok((*at, self.read(*at, 4096)?)))
                            .collect::<Result<Vec<_>, Errno>>()
                    })
                })
                .collect();
            let read = readers.into_iter().map(|reader| reader.join().unwrap());
            let read = read.collect::<Result<Vec<_>, Errno>>();
            remove.join().unwrap()?;
            read
        })?;
        for (at, page) in read.into_iter().flatten() {
            bytes[at as usize..][..4096].copy_from_slice(&page);
        }
        Ok(bytes)
    }

    pub(crate) fn measure(&self, first: u64, pages: u64, step: u64) -> Vec<u64> {
        let count = self.size() / 4096;
        let touch = |number| {
            let page = self.pointer((first + number * step) % count * 4096);
            let started = Instant::now();
            // SAFETY: mapped and readable.
            let _ = unsafe { page.read_volatile() };
            started.elapsed().as_nanos() as u64
        };
        (0..pages).map(touch).collect()
    }

    pub(crate) fn remove(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let (mut at, end) = (offset, offset + len);
        let mut region_end = 0;
        for (_, size) in &self.regions {
            region_end += size;
            if at < region_end && at < end {
                let part = end.min(region_end) - at;
                let start = NonNull::new(self.pointer(at).cast::<c_void>()).unwrap();
                // SAFETY: the memory of this process, which is accessed by raw pointers only.
                unsafe { madvise(start, part as usize, MmapAdvise::MADV_DONTNEED) }?;
                at += part;
            }
        }
        Ok(())
    }

    pub(crate) fn run_guest(&self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        return self.guest.as_ref().expect("a guest's memory").sum();
        #[cfg(not(target_arch = "x86_64"))]
        panic!("there is no guest for this processor");
    }
}
