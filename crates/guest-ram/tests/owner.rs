//! RAM in the memory of another value, writes without marks, and the baseline.

use std::io;
use std::sync::Arc;

use guest_ram::{GuestRam, GuestRamError, Mapping, RamOwner};
use page_reader::{HostMemory, PageReader, RamLayout};

const LOW_SIZE: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;
const SIZE: u64 = 3 << 20;

fn layout() -> RamLayout {
    RamLayout::new([(0, LOW_SIZE), (HIGH, SIZE - LOW_SIZE)]).unwrap()
}

/// Memory in two mappings, which are adjacent in the memory file.
#[derive(Debug)]
struct Halves([Mapping; 2]);

impl Halves {
    /// Maps the memory, the first mapping with this size.
    fn new(first: u64) -> Self {
        let map = |len: u64| Mapping::anonymous(len as usize).unwrap();
        Self([map(first), map(SIZE - first)])
    }
}

impl PageReader for Halves {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("RAM is read by its addresses")
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let first = self.0[0].len();
        let (half, at) = match (offset as usize).checked_sub(first) {
            Some(at) => (&self.0[1], at),
            None => (&self.0[0], offset as usize),
        };
        let len = len.min(half.len() - at.min(half.len()));
        (len > 0).then(|| half.host_memory(at, len))
    }

    fn check_source(&self) -> io::Result<()> {
        Err(io::Error::other("a page cannot be read"))
    }
}

// SAFETY: the memory is that of `Mapping`s, which make these promises.
#[allow(unsafe_code)]
unsafe impl RamOwner for Halves {}

#[test]
fn owner_lives_as_long_as_the_ram() {
    let owner = Arc::new(Halves::new(LOW_SIZE));
    let weak = Arc::downgrade(&owner);
    let ram: GuestRam = GuestRam::from_owner(layout(), owner).unwrap();
    ram.write(HIGH, b"high").unwrap();
    let halves = weak.upgrade().unwrap();
    assert_eq!(ram.host_address(0), halves.0[0].start());
    assert_eq!(ram.host_address(1), halves.0[1].start());
    let mut bytes = [0; 4];
    halves.0[1].host_memory(0, 4).copy_to(&mut bytes);
    assert_eq!(&bytes, b"high");
    assert!(ram.check_source().is_err(), "that of the owner");
    drop(halves);
    drop(ram);
    assert!(weak.upgrade().is_none());
}

#[test]
fn memory_that_does_not_fit_the_layout_is_refused() {
    let own =
        |first, layout| GuestRam::<dirty_bitmap::Untracked>::from_owner(layout, Halves::new(first));
    // The second region begins in the first mapping.
    let split = own(LOW_SIZE + 4096, layout()).unwrap_err();
    assert!(matches!(
        split,
        GuestRamError::MappingSize {
            mapped: 4096,
            guest_start: HIGH,
            ..
        }
    ));
    let smaller = own(LOW_SIZE, RamLayout::single(0, LOW_SIZE).unwrap()).unwrap_err();
    assert!(matches!(
        smaller,
        GuestRamError::LargerOwner { ram_size: LOW_SIZE }
    ));
    assert!(smaller.to_string().contains("layout of all of its memory"));
    let regions = [(0, LOW_SIZE), (HIGH, SIZE - LOW_SIZE), (2 * HIGH, 4096)];
    let larger = own(LOW_SIZE, RamLayout::new(regions).unwrap()).unwrap_err();
    assert!(matches!(
        larger,
        GuestRamError::MappingSize { mapped: 0, .. }
    ));
}

#[test]
fn unmarked_writes_are_stored_and_mark_nothing() {
    let ram: GuestRam = GuestRam::new(layout()).unwrap();
    ram.write_unmarked_at(LOW_SIZE - 2, b"restored").unwrap();
    assert!(ram.dirty_bitmap().is_clean());
    let mut bytes = [0; 8];
    ram.read_at(LOW_SIZE - 2, &mut bytes).unwrap();
    assert_eq!(&bytes, b"restored");
    assert!(ram.write_unmarked_at(SIZE - 1, &[1, 2]).is_err());
    ram.read_at(SIZE - 8, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn baseline_discards_marks_unless_a_save_is_under_way() {
    let ram: GuestRam = GuestRam::new(layout()).unwrap();
    ram.mark_all();
    let epoch = ram.dirty_bitmap().begin_epoch().unwrap();
    ram.write(0, &[1]).unwrap();
    assert!(ram.set_baseline().is_err());
    drop(epoch);
    assert_eq!(ram.dirty_bitmap().dirty_bytes(), SIZE);
    ram.set_baseline().unwrap();
    assert!(ram.dirty_bitmap().is_clean());
}
