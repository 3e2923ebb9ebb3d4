//! Chains in the RAM of a VMM: restored into it, or mapped as it.

mod support;

use std::sync::Arc;

use dirty_bitmap::Untracked;
use guest_ram::{GuestRam, GuestRamError, RamOwner};
use memory_image::{Chain, ImageId, Layout, MappedChain, MappedImage, RamTarget, RestoreError};
use memory_writer::MemoryWriter;
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use support::raw_guest::{Guest, SIZE};

const HIGH: u64 = 4 << 30;
const LOW_SIZE: u64 = SIZE / 4;

fn layout() -> RamLayout {
    RamLayout::new([(0, LOW_SIZE), (HIGH, SIZE - LOW_SIZE)]).unwrap()
}

fn bytes(reader: &impl PageReader) -> Vec<u8> {
    let mut bytes = vec![1; SIZE as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn guest_ram_is_restored_without_marks_and_copies() {
    let guest = Guest::with_history();
    let ram: Arc<GuestRam> = Arc::new(GuestRam::new(layout()).unwrap());
    ram.write_at(0, &vec![0xee; SIZE as usize]).unwrap();
    ram.set_baseline().unwrap();
    guest.chain().restore(&mut &*ram).unwrap();
    assert!(bytes(&ram) == guest.ram);
    assert!(ram.dirty_bitmap().is_clean());

    // The memory is lent, up to the end of its region.
    let mut target = &*ram;
    let memory = RamTarget::memory_mut(&mut target, LOW_SIZE - 16, 64).unwrap();
    assert_eq!(memory.len(), 16);
    let expected = ram.host_memory(LOW_SIZE - 16, 16).unwrap().as_ptr();
    assert_eq!(memory.as_ptr().cast_const(), expected);
    assert!(RamTarget::memory_mut(&mut target, SIZE, 1).is_none());
    assert!(RamTarget::memory_mut(&mut target, SIZE + 1, 1).is_none());

    // A first diff has what is written from here on.
    ram.write(HIGH, &[1]).unwrap();
    assert_eq!(ram.dirty_bitmap().runs().next().unwrap().start, LOW_SIZE);
}

#[test]
fn ram_at_other_addresses_is_not_a_target() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let saved: GuestRam = GuestRam::new(layout()).unwrap();
    saved.write(HIGH, b"high").unwrap();
    let options = MemoryWriter::options().layout(Layout::Sealed);
    let mut writer = options.open(&path, SIZE, 4096).unwrap();
    writer.write_full(&saved).unwrap();
    writer.commit().unwrap();
    let chain = Chain::open(&path, 4096).unwrap();

    let single = || RamLayout::single(0, SIZE).unwrap();
    let mut other: GuestRam = GuestRam::new(single()).unwrap();
    other.write(0, b"old").unwrap();
    let before = bytes(&other);
    let error = chain.restore(&mut other).unwrap_err();
    assert!(matches!(error, RestoreError::TargetAddresses { .. }));
    assert!(error.to_string().contains("0x100000000.."), "{error}");
    assert!(chain.restore(&mut Box::new(&other)).is_err());
    assert!(bytes(&other) == before);
    let mapped = MappedChain::open(&chain).unwrap();
    let error = GuestRam::<Untracked>::from_owner(single(), mapped).unwrap_err();
    assert!(matches!(error, GuestRamError::OtherAddresses { .. }));

    // Regions that are split differently have the same addresses. A vector has none.
    let half = LOW_SIZE / 2;
    let split = [(0, half), (half, half), (HIGH, SIZE - LOW_SIZE)];
    let mut split: GuestRam = GuestRam::new(RamLayout::new(split).unwrap()).unwrap();
    chain.restore(&mut split).unwrap();
    assert!(bytes(&split) == bytes(&saved));
    chain.restore(&mut vec![0; SIZE as usize]).unwrap();
}

#[test]
fn writes_to_a_guest_ram_target_mark_nothing() {
    let mut ram: GuestRam = GuestRam::new(layout()).unwrap();
    RamTarget::write_at(&mut &ram, LOW_SIZE - 1, &[1, 2]).unwrap();
    RamTarget::write_at(&mut ram, 7, &[3]).unwrap();
    assert!(ram.dirty_bitmap().is_clean());
    let all = bytes(&ram);
    assert_eq!(
        (all[7], &all[LOW_SIZE as usize - 1..][..2]),
        (3, &[1, 2][..])
    );
    let error = RamTarget::write_at(&mut ram, SIZE - 1, &[1, 2]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WriteZero);
    assert_eq!(bytes(&ram)[SIZE as usize - 1], 0);

    let guest = Guest::with_history();
    guest.chain().restore(&mut ram).unwrap();
    assert!(bytes(&ram) == guest.ram && ram.dirty_bitmap().is_clean());
}

#[test]
fn vectors_and_pointers_are_targets() {
    let guest = Guest::with_history();
    let chain = guest.chain();
    let filled = || vec![0xee; SIZE as usize];
    let mut vector = filled();
    chain.restore(&mut vector).unwrap();
    assert!(vector == guest.ram);

    let mut vector = filled();
    let mut by_reference: &mut Vec<u8> = &mut vector;
    chain.restore(&mut by_reference).unwrap();
    assert!(by_reference.memory_mut(SIZE - 2, 9).unwrap().len() == 2);
    by_reference.write_at(0, &[9]).unwrap();
    assert!(vector[1..] == guest.ram[1..] && vector[0] == 9);

    let mut boxed: Box<dyn RamTarget> = Box::new(filled());
    chain.restore(&mut boxed).unwrap();
    assert!(boxed.memory_mut(0, 1).is_some());
    assert!(boxed.write_at(SIZE, &[1]).is_err());
}

#[cfg(feature = "vm-memory")]
mod guest_memory {
    use memory_image::GuestMemoryTarget;
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        let high = (SIZE - LOW_SIZE) as usize;
        let ranges = [
            (GuestAddress(0), LOW_SIZE as usize),
            (GuestAddress(HIGH), high),
        ];
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    fn is_clean(memory: &GuestMemoryMmap<AtomicBitmap>) -> bool {
        let mut pages = memory.iter().flat_map(|region| {
            let pages = (0..region.len() as usize).step_by(4096);
            pages.map(|page| region.bitmap().dirty_at(page))
        });
        !pages.any(|dirty| dirty)
    }

    #[test]
    fn guest_memory_is_restored_without_marks() {
        let guest = Guest::with_history();
        let memory = Arc::new(memory());
        let mut target = GuestMemoryTarget::new(Arc::clone(&memory)).unwrap();
        assert_eq!(target.layout(), &layout());
        guest.chain().restore(&mut target).unwrap();
        let mut all = vec![0; SIZE as usize];
        let (low, high) = all.split_at_mut(LOW_SIZE as usize);
        memory.read_slice(low, GuestAddress(0)).unwrap();
        memory.read_slice(high, GuestAddress(HIGH)).unwrap();
        assert!(all == guest.ram);

        let lent = target.memory_mut(LOW_SIZE - 16, 64).unwrap();
        assert_eq!(lent.len(), 16);
        let address = memory
            .get_host_address(GuestAddress(LOW_SIZE - 16))
            .unwrap();
        assert_eq!(lent.as_ptr(), address);
        assert!(target.memory_mut(SIZE, 1).is_none());

        let across: Vec<u8> = (1..=32).collect();
        target.write_at(LOW_SIZE - 11, &across).unwrap();
        let mut read = [0; 21];
        memory.read_slice(&mut read, GuestAddress(HIGH)).unwrap();
        assert_eq!(read, across[11..]);
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(LOW_SIZE - 11)).unwrap(),
            1
        );
        assert!(target.write_at(SIZE - 1, &[1, 2]).is_err());
        assert!(is_clean(&memory));
    }

    #[test]
    fn guest_memory_lives_as_long_as_the_ram() {
        let memory = Arc::new(memory());
        let ram: GuestRam = GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap();
        assert_eq!(ram.layout(), &layout());
        memory.write_slice(b"device", GuestAddress(HIGH)).unwrap();
        let weak = Arc::downgrade(&memory);
        drop(memory);
        assert_eq!(&bytes(&ram)[LOW_SIZE as usize..][..6], b"device");
        drop(ram);
        assert!(weak.upgrade().is_none());
    }
}

fn mapped_chain(chain: &Chain) -> Arc<dyn RamOwner> {
    Arc::new(MappedChain::open(chain).unwrap())
}

fn mapped_image(chain: &Chain) -> Arc<dyn RamOwner> {
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged.mem");
    chain.flatten(&merged).unwrap();
    Arc::new(MappedImage::open_raw(&merged).unwrap())
}

#[rstest]
fn mapped_chain_is_ram_as_long_as_the_ram_lives(
    #[values(mapped_chain, mapped_image)] map: fn(&Chain) -> Arc<dyn RamOwner>,
) {
    let guest = Guest::with_history();
    let owner = map(&guest.chain());
    let weak = Arc::downgrade(&owner);
    let ram: GuestRam = GuestRam::from_owner(layout(), owner).unwrap();
    assert!(bytes(&ram) == guest.ram && ram.dirty_bitmap().is_clean());
    ram.write(HIGH, b"device").unwrap();
    assert_eq!(&bytes(&ram)[LOW_SIZE as usize..][..6], b"device");
    assert!(weak.upgrade().is_some());
    drop(ram);
    assert!(weak.upgrade().is_none());
    assert!(bytes(&guest.chain()) == guest.ram);
}

#[test]
fn ram_of_an_image_has_the_image_as_the_parent_of_its_next_diff() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let options = MemoryWriter::options().layout(Layout::Sealed);
    let layout = RamLayout::single(0, SIZE).unwrap();
    let mut writer = options.open(&path, SIZE, 4096).unwrap();
    writer.write_full(&vec![1; SIZE as usize]).unwrap();
    let id = writer.image_id().map(ImageId::to_bytes);
    writer.commit().unwrap();
    let chain = Chain::open_sealed(&[&path]).unwrap();
    let chain = MappedChain::open(&chain).unwrap();
    let image = MappedImage::open(&path).unwrap();
    let rams: [GuestRam; 2] = [
        GuestRam::from_owner(layout.clone(), chain).unwrap(),
        GuestRam::from_owner(layout, Arc::new(image)).unwrap(),
    ];
    for ram in rams {
        assert!(id.is_some());
        assert_eq!(ram.dirty_bitmap().parent_id(), id);
    }
}

#[test]
fn layout_of_another_size_than_the_owner_is_refused() {
    let guest = Guest::with_history();
    let own = |size| {
        let layout = RamLayout::single(0, size).unwrap();
        GuestRam::<dirty_bitmap::Untracked>::from_owner(layout, mapped_chain(&guest.chain()))
    };
    let smaller = own(SIZE - 4096).unwrap_err();
    assert!(matches!(
        smaller,
        GuestRamError::LargerOwner { ram_size } if ram_size == SIZE - 4096
    ));
    let larger = own(SIZE + 4096).unwrap_err();
    assert!(matches!(
        larger,
        GuestRamError::MappingSize { mapped, .. } if mapped as u64 == SIZE
    ));
}
