//! Guest RAM of every kind of memory.

#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use guest_ram::{GuestRam, GuestRamError, Mapping};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use page_reader::RamLayout;

use crate::guest::PAGE;

/// The memory behind the RAM of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private anonymous memory.
    Private,
    /// A memfd.
    Memfd,
    /// A memfd of huge pages.
    Huge,
    /// Private anonymous memory in two regions, with a gap between them.
    Gap,
}

impl Kind {
    /// Returns the size of its pages.
    pub(crate) fn page_size(self) -> u64 {
        match self {
            Self::Private | Self::Memfd | Self::Gap => PAGE,
            Self::Huge => 2 << 20,
        }
    }
}

/// RAM of a guest, and the file of its memory.
pub(crate) struct Memory {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) file: Option<File>,
}

impl Memory {
    pub(crate) fn new(kind: Kind, size: u64) -> Self {
        let single = || RamLayout::single(0x4000_0000, size).unwrap();
        let flags = match kind {
            Kind::Private => return Self::private(single()),
            Kind::Gap => {
                let half = size / 2;
                return Self::private(RamLayout::new([(0, half), (4 << 30, half)]).unwrap());
            }
            Kind::Memfd => MFdFlags::MFD_CLOEXEC,
            Kind::Huge => MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB,
        };
        let file = File::from(memfd_create(c"ram", flags).unwrap());
        file.set_len(size).unwrap();
        let ram = GuestRam::options().map(single(), |_| Ok::<_, GuestRamError>(map(&file, size)));
        Self {
            ram: Arc::new(ram.unwrap()),
            file: Some(file),
        }
    }

    fn private(layout: RamLayout) -> Self {
        Self {
            ram: Arc::new(GuestRam::new(layout).unwrap()),
            file: None,
        }
    }

    /// Returns the address of an offset in the memory file.
    pub(crate) fn address(&self, offset: u64) -> NonNull<u8> {
        let mut regions = self.ram.layout().regions().iter();
        let region = regions
            .find(|it| (it.offset..it.offset + it.size).contains(&offset))
            .unwrap();
        let start = self.ram.host_address(region.region);
        // SAFETY: inside the mapping of the region.
        unsafe { start.add((offset - region.offset) as usize) }
    }

    /// Discards a page of the memory as a balloon does.
    pub(crate) fn discard(&self, how: Discard, page: u64) {
        let advise = |advice| {
            // SAFETY: a page of the RAM, which no reference covers.
            unsafe { madvise(self.address(page * PAGE).cast(), PAGE as usize, advice) }.unwrap();
        };
        match how {
            Discard::DontNeed => advise(MmapAdvise::MADV_DONTNEED),
            Discard::Remove => advise(MmapAdvise::MADV_REMOVE),
            Discard::Punch => {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (offset, len) = ((page * PAGE).cast_signed(), PAGE.cast_signed());
                fallocate(self.file.as_ref().unwrap(), flags, offset, len).unwrap();
            }
        }
    }

    /// Reads bytes of a file into the RAM by the kernel.
    pub(crate) fn read_from(&self, file: &File, at: u64, offset: u64, len: usize) {
        let to = self.address(offset).as_ptr().cast();
        // SAFETY: the bytes are in one page of the RAM, which no reference covers.
        let read = unsafe { libc::pread(file.as_raw_fd(), to, len, at.cast_signed()) };
        assert_eq!(read, len.cast_signed());
    }

    /// Returns the number of bytes of the RAM that are allocated, without the page of zeros.
    pub(crate) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        if let Some(file) = &self.file {
            return file.metadata().unwrap().blocks() * 512;
        }
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let address = self.address(0).addr().get();
        let contains = |line: &&str| {
            let range = line
                .split_once(' ')
                .and_then(|(range, _)| range.split_once('-'));
            range.is_some_and(|(start, end)| {
                let number = |text| usize::from_str_radix(text, 16);
                number(start).is_ok_and(|start| start <= address)
                    && number(end).is_ok_and(|end| address < end)
            })
        };
        let mut lines = smaps.lines().skip_while(|line| !contains(line));
        let anonymous = lines
            .find_map(|line| line.strip_prefix("Anonymous:"))
            .unwrap();
        let kib = anonymous.trim().strip_suffix(" kB").unwrap();
        kib.parse::<u64>().unwrap() << 10
    }
}

/// A way to return memory to the host.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Discard {
    DontNeed,
    Remove,
    Punch,
}

fn map(file: &File, size: u64) -> Mapping {
    let len = NonZeroUsize::new(size as usize).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: the kernel chooses the address.
    let start = unsafe { mmap(None, len, access, flags, file.as_fd(), 0) }.unwrap();
    let owner = Unmap(start.addr(), len);
    // SAFETY: mapped until the owner is dropped, to which no reference exists.
    unsafe { Mapping::new(start.cast(), len.get(), owner) }
}

/// Unmaps an address range on drop.
#[derive(Debug)]
struct Unmap(NonZeroUsize, NonZeroUsize);

impl Drop for Unmap {
    fn drop(&mut self) {
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut(self.0.get())).unwrap();
        // SAFETY: this value owns the mapping.
        let _ = unsafe { munmap(start, self.1.get()) };
    }
}
