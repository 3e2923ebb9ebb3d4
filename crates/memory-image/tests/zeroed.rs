//! Zeros in mapped RAM, for a balloon.

mod support;

use std::io;
use std::ops::Range;

use std::sync::Arc;

use dirty_bitmap::{Logged, ParentImage, Tracked, Untracked};
use guest_ram::{BitmapKind, GuestRam, LoggedRam};
use memory_image::{MappedChain, MappedImage};
use page_reader::RamLayout;
use rstest::rstest;
use support::open_chain;
use test_images::{Images, whole};

const PAGE: u64 = 16384;
const SIZE: u64 = 8 * PAGE;

fn images() -> Images {
    Images::new(SIZE, PAGE).with([0..8]).with([2..4])
}

#[rstest]
#[case::pages(PAGE..3 * PAGE)]
#[case::bytes(PAGE + 3..3 * PAGE + 5)]
#[case::end(SIZE - 1..SIZE)]
#[case::nothing(SIZE..SIZE)]
fn zeroed_range_is_zeros_and_the_images_stay(#[case] range: Range<u64>) {
    let images = images();
    let mut expected = images.ram.clone();
    expected[range.start as usize..range.end as usize].fill(0);
    let chain = open_chain(&images);
    let ram = MappedChain::open(&chain).unwrap();
    ram.write_zeros(range.clone()).unwrap();
    assert!(whole(&ram, SIZE as usize) == expected);
    // The files are unchanged.
    let other = MappedChain::open(&chain).unwrap();
    assert!(whole(&other, SIZE as usize) == images.ram);

    let base = MappedImage::open_raw(images.path(0)).unwrap();
    let mut expected = whole(&base, SIZE as usize);
    expected[range.start as usize..range.end as usize].fill(0);
    base.write_zeros(range).unwrap();
    assert!(whole(&base, SIZE as usize) == expected);
}

#[rstest]
#[case::past_the_end(SIZE - 1..SIZE + 1)]
#[case::outside(SIZE + 1..SIZE + 1)]
#[case::overflow(PAGE..u64::MAX)]
fn range_past_the_ram_is_refused(#[case] range: Range<u64>) {
    let images = images();
    let ram = MappedChain::open(&open_chain(&images)).unwrap();
    let error = ram.write_zeros(range).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(whole(&ram, SIZE as usize) == images.ram);
}

/// Returns the marked runs of a RAM that takes zeroed memory.
fn marks<K: BitmapKind>(ram: &GuestRam<K>) -> Vec<Range<u64>> {
    ram.dirty_bitmap().runs().collect()
}

fn layout() -> RamLayout {
    RamLayout::single(1 << 30, SIZE).unwrap()
}

#[test]
fn zeros_before_and_after_a_ram_takes_the_memory_are_marked() {
    fn check<K: BitmapKind>(images: &Images) {
        let chain = Arc::new(MappedChain::open(&open_chain(images)).unwrap());
        let image = Arc::new(MappedImage::open_raw(images.path(0)).unwrap());
        // An error and an empty range mark nothing.
        chain.write_zeros(0..SIZE + 1).unwrap_err();
        chain.write_zeros(PAGE..PAGE).unwrap();
        chain.write_zeros(5 * PAGE..6 * PAGE).unwrap();
        image.write_zeros(5 * PAGE..6 * PAGE).unwrap();
        let rams: [GuestRam<K>; 3] = [
            GuestRam::from_owner(layout(), Arc::clone(&chain)).unwrap(),
            GuestRam::from_owner(layout(), Arc::clone(&image)).unwrap(),
            // A second RAM of the memory has the marks too.
            GuestRam::from_owner(layout(), Arc::clone(&chain)).unwrap(),
        ];
        for ram in &rams {
            assert_eq!(marks(ram), [5 * PAGE..6 * PAGE]);
        }
        chain.write_zeros(0..PAGE).unwrap();
        image.write_zeros(0..PAGE).unwrap();
        for ram in &rams {
            assert_eq!(marks(ram), [0..PAGE, 5 * PAGE..6 * PAGE]);
        }
    }
    let images = images();
    check::<Untracked>(&images);
    check::<Tracked>(&images);
    check::<Logged>(&images);
}

#[test]
fn zeros_are_marked_in_a_bitmap_with_a_start() {
    let chain = MappedChain::open(&open_chain(&images())).unwrap();
    chain.write_zeros(5 * PAGE..6 * PAGE).unwrap();
    let bitmap = dirty_bitmap::DirtyBitmap::new(1 << 30, SIZE, PAGE).unwrap();
    let options = GuestRam::<Untracked>::options().dirty_bitmap(Arc::new(bitmap));
    let ram = options.own(layout(), chain).unwrap();
    assert_eq!(marks(&ram), [5 * PAGE..6 * PAGE]);
}

/// As after the start of a dirty log, which marks all of the RAM.
#[test]
fn baseline_keeps_the_marks_of_zeros() {
    let chain = MappedChain::open(&open_chain(&images())).unwrap();
    chain.write_zeros(5 * PAGE..6 * PAGE).unwrap();
    let ram: LoggedRam = GuestRam::from_owner(layout(), chain).unwrap();
    ram.mark_all();
    ram.set_baseline().unwrap();
    assert_eq!(marks(&ram), [5 * PAGE..6 * PAGE]);
}

#[test]
fn ram_of_a_raw_image_has_a_raw_parent() {
    let images = images();
    let image = MappedImage::open_raw(images.path(0)).unwrap();
    let ram: GuestRam = GuestRam::from_owner(layout(), image).unwrap();
    assert_eq!(ram.dirty_bitmap().parent(), ParentImage::Raw);
}

/// The documentation warns of this: the discarded pages are those of the images again.
#[cfg(target_os = "linux")]
#[test]
fn discarded_memory_is_that_of_the_images_again() {
    use std::ptr::NonNull;

    use nix::sys::mman::{MmapAdvise, madvise};
    use page_reader::PageReader;

    let images = images();
    let ram = MappedChain::open(&open_chain(&images)).unwrap();
    ram.write_zeros(0..SIZE).unwrap();
    let start = NonNull::new(ram.as_ptr().cast()).unwrap();
    // SAFETY: the memory is mapped as long as `ram`, and no reference to it exists.
    #[allow(unsafe_code)]
    unsafe { madvise(start, SIZE as usize, MmapAdvise::MADV_DONTNEED) }.unwrap();
    let mut byte = [0];
    ram.read_at(PAGE, &mut byte).unwrap();
    assert_eq!(byte, images.ram[PAGE as usize..][..1]);
}
