//! Saving RAM of any kind allocates none of it and never raises a `SIGBUS`.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{
    Durability, Engine, Layout, MemoryIoStep, MemoryWriter, MemoryWriterOptions, Seal,
    SnapshotError,
};
use nix::libc::c_void;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use page_reader::{HostMemory, PageReader};
use rstest::rstest;
use support::Place;
use test_machine::{HugeFs, TinyTmpfs, needs};

const PAGE: u64 = 4096;
const SIZE: u64 = 8 << 20;
/// Pages that hold data.
const WRITTEN: [u64; 5] = [0, 1, 2, 1000, 2047];

/// Mapped RAM.
struct Mapped {
    start: NonNull<c_void>,
    /// The file that is mapped.
    file: Option<File>,
}

impl Mapped {
    fn of_file(file: File) -> Self {
        // On hugetlbfs no page is reserved.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, len(), both(), flags, file.as_fd(), 0) }.unwrap();
        Self {
            start,
            file: Some(file),
        }
    }

    /// Maps memory between pages of another kind, because the kernel merges adjacent mappings of
    /// the same kind.
    fn anonymous(flags: MapFlags) -> Self {
        let whole = NonZeroUsize::new((SIZE + 2 * PAGE) as usize).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses, and a part of it. The guard
        // pages remain.
        let start = unsafe {
            let start = mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags).unwrap();
            let start = start.byte_add(PAGE as usize);
            mprotect(start, SIZE as usize, both()).unwrap();
            start
        };
        Self { start, file: None }
    }

    /// Writes through the mapping, which populates the pages.
    fn write(self) -> Self {
        for page in WRITTEN {
            let to = self.start.cast::<u8>().as_ptr();
            // SAFETY: inside the mapping, to which no other reference exists.
            unsafe {
                to.add((page * PAGE) as usize + 17)
                    .write((page % 251) as u8 + 1)
            };
        }
        self
    }

    /// Returns the bytes of the mapping that are resident in this process, and the bytes allocated
    /// to the file.
    fn resident(&self) -> (u64, u64) {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", self.start.addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        let rss: u64 = rss.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        let blocks = self
            .file
            .as_ref()
            .map_or(0, |file| file.metadata().unwrap().blocks());
        (rss << 10, blocks * 512)
    }
}

impl PageReader for Mapped {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let memory = self.host_memory(offset, buf.len());
        memory.ok_or(io::ErrorKind::UnexpectedEof)?.copy_to(buf);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = len.min(SIZE.checked_sub(offset)? as usize);
        // SAFETY: mapped for the lifetime of `self`, and not written during the borrow.
        let all = unsafe { HostMemory::new(self.start.as_ptr().cast(), SIZE as usize) };
        (len > 0).then(|| all.slice(offset as usize..offset as usize + len))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by the constructor; readers borrow `self`.
        unsafe { munmap(self.start, SIZE as usize) }.unwrap();
    }
}

fn len() -> NonZeroUsize {
    NonZeroUsize::new(SIZE as usize).unwrap()
}

fn both() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

#[derive(Clone, Copy, Debug)]
enum Ram {
    Private,
    SharedAnonymous,
    Memfd,
    /// A file on a full tmpfs.
    FullTmpfs,
    /// A file on a full hugetlbfs, none of whose pages is allocated.
    NoHugePages,
}

/// Returns the RAM and the file systems mounted for it.
fn ram(kind: Ram) -> (Mapped, Option<TinyTmpfs>, Option<HugeFs>) {
    match kind {
        Ram::Private => {
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            (Mapped::anonymous(flags).write(), None, None)
        }
        Ram::SharedAnonymous => (Mapped::anonymous(MapFlags::MAP_SHARED).write(), None, None),
        Ram::Memfd => {
            let fd: OwnedFd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
            (sized(File::from(fd)).write(), None, None)
        }
        Ram::FullTmpfs => {
            let tmpfs = TinyTmpfs::new(256 << 10).unwrap();
            let ram = sized(create(&tmpfs.path().join("ram"))).write();
            let filler = create(&tmpfs.path().join("filler"));
            let full = (0..).find_map(|page| filler.write_all_at(&[1; 4096], page * PAGE).err());
            assert_eq!(full.unwrap().kind(), io::ErrorKind::StorageFull);
            (ram, Some(tmpfs), None)
        }
        Ram::NoHugePages => {
            // At most one page, if the machine has any.
            let huge = HugeFs::new(Some(2 << 20)).unwrap();
            (sized(create(&huge.path().join("ram"))), None, Some(huge))
        }
    }
}

fn create(path: &std::path::Path) -> File {
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    options.unwrap()
}

fn sized(file: File) -> Mapped {
    file.set_len(SIZE).unwrap();
    Mapped::of_file(file)
}

/// Calls `save` with every engine and combination of skip options.
fn ways(mut save: impl FnMut(MemoryWriterOptions, Layout, &str)) {
    for engine in Engine::ALL.iter().copied() {
        for layout in Layout::ALL {
            for (zeros, untouched) in [(false, false), (true, false), (false, true), (true, true)] {
                let way = format!("{engine:?} {layout} {zeros} {untouched}");
                let options = MemoryWriter::options()
                    .engine(engine)
                    .layout(layout)
                    .seal(Seal::new().on_raw_image())
                    .skip_zeros(zeros)
                    .skip_untouched(untouched)
                    .durability(Durability::None);
                save(options, layout, &way);
            }
        }
    }
}

#[rstest]
fn full_dump_does_not_touch_ram(
    #[values(
        Ram::Private,
        Ram::SharedAnonymous,
        Ram::Memfd,
        Ram::FullTmpfs,
        Ram::NoHugePages
    )]
    kind: Ram,
) {
    needs!(Root);
    let (ram, _tmpfs, _huge) = ram(kind);
    let place = Place::new();
    let before = ram.resident();
    let mut expected = vec![0; SIZE as usize];
    if !matches!(kind, Ram::NoHugePages) {
        for page in WRITTEN {
            expected[(page * PAGE) as usize + 17] = (page % 251) as u8 + 1;
        }
    }
    ways(|options, layout, way| {
        let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        assert_eq!(ram.resident(), before, "{way}");
        // Packed pages have other offsets.
        assert!(
            !layout.is_in_place() || place.read()[..SIZE as usize] == expected,
            "{way}"
        );
    });
}

#[rstest]
fn diff_of_all_pages_does_not_touch_ram(
    #[values(Ram::Memfd, Ram::FullTmpfs, Ram::NoHugePages)] kind: Ram,
) {
    needs!(Root);
    let (ram, _tmpfs, _huge) = ram(kind);
    let place = Place::new();
    let dirty = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    dirty.mark_range(0, SIZE).unwrap();
    let before = ram.resident();
    ways(|options, layout, way| {
        if !layout.has_footer() {
            let options = options.allow_ambiguous_diff(true);
            let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
            assert_eq!(writer.write_diff(&ram, &dirty).unwrap(), SIZE / PAGE);
            writer.commit().unwrap();
            assert_eq!(ram.resident(), before, "{way}");
        }
    });
}

/// Pages of 64 KiB, of which 4 KiB were written.
#[test]
fn large_image_pages_do_not_touch_adjacent_ram() {
    let (ram, ..) = ram(Ram::Memfd);
    let place = Place::new();
    let before = ram.resident();
    for zeros in [false, true] {
        let options = MemoryWriter::options()
            .skip_zeros(zeros)
            .skip_untouched(true)
            .durability(Durability::None);
        let mut writer = options.open(&place.dest, SIZE, 64 << 10).unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        assert_eq!(ram.resident(), before);
    }
}

/// No call is made that a filter may forbid.
#[test]
fn read_untouched_reads_without_a_query() {
    let (ram, ..) = ram(Ram::Memfd);
    let place = Place::new();
    let before = ram.resident();
    let options = MemoryWriter::options().read_untouched(true);
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&NotAsked(&ram)).unwrap();
    writer.commit().unwrap();
    assert_eq!(ram.resident(), (SIZE, SIZE));
    assert!(before < (SIZE, SIZE));
}

struct NotAsked<'m>(&'m Mapped);

impl PageReader for NotAsked<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }

    fn populated(&self, _: std::ops::Range<u64>) -> page_reader::PopulatedRanges<'_> {
        unreachable!("it is not asked")
    }
}

/// A reader without knowledge of populated pages, over memory of which most cannot be provided.
struct KnowsNothing(Mapped);

impl PageReader for KnowsNothing {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }

    fn populated(&self, range: std::ops::Range<u64>) -> page_reader::PopulatedRanges<'_> {
        Box::new(std::iter::once(range))
    }
}

#[rstest]
fn memory_that_cannot_be_provided_is_an_error(
    #[values(Ram::FullTmpfs, Ram::NoHugePages)] kind: Ram,
) {
    needs!(Root);
    let (ram, _tmpfs, _huge) = ram(kind);
    // The one huge page that may exist.
    let other = _huge
        .as_ref()
        .map(|huge| sized(create(&huge.path().join("other"))));
    if let Some(other) = &other {
        let _ = page_reader::fault_in(other.host_memory(0, 1).unwrap());
    }
    let (ram, place) = (KnowsNothing(ram), Place::new());
    ways(|options, _, way| {
        let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
        match writer.write_full(&ram).unwrap_err() {
            SnapshotError::MemoryIo {
                step: MemoryIoStep::Read,
                source,
                ..
            } => assert_eq!(source.raw_os_error(), Some(nix::libc::EFAULT), "{way}"),
            other => panic!("{way}: {other:?}"),
        }
    });
    place.assert_untouched();
}
