//! Guests that start from an image.
//!
//! The framework is that of `testing/fake-hvf`: `cargo xtask fake-hvf`.
#![cfg(hvf_fake)]

mod support;

use std::path::Path;
use std::sync::Arc;

use dirty_bitmap::Policy;
use fake_hvf::{Code, control};
use hvf_backend::guest_ram::RamOwner;
use hvf_backend::{GuestRam, PAGE_SIZE, Stage2, StartError, Vm};
use memory_image::MappedImage;
use memory_writer::{Layout, MemoryWriter};
use page_reader::{PageReader, RamLayout};
use support::RAM;

const SIZE: u64 = 1 << 20;
const DATA: u64 = RAM + 8 * PAGE_SIZE;

fn layout(size: u64) -> RamLayout {
    RamLayout::single(RAM, size).unwrap()
}

/// Returns an image of the RAM of a guest that executes `str x0, [x1]; hvc #0`.
fn image(dir: &Path) -> MappedImage {
    let ram = GuestRam::new(layout(SIZE)).unwrap();
    support::write_guest(&ram, &[0xf900_0020, 0xd400_0002]);
    let path = dir.join("guest.mem");
    let options = MemoryWriter::options().layout(Layout::Sealed);
    let mut writer = options.open(&path, SIZE, PAGE_SIZE).unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    MappedImage::open(&path).unwrap()
}

#[test]
fn a_guest_starts_from_an_image_with_its_writes_tracked() {
    let _turn = control::turn();
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::new().unwrap();
    let image = image(dir.path());
    let parent = image.image();
    assert!(parent.id().is_some());
    let zeroed = SIZE - PAGE_SIZE;
    image.write_zeros(zeroed..SIZE).unwrap();
    let tracker = Stage2::start(&vm, layout(SIZE), image, Policy::Pages).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    let mut state = support::start_state();
    (state.x[0], state.x[1]) = (7, DATA);
    let _ = state.restore(&vcpu, 0).unwrap();
    support::run_tracked(&tracker, &mut vcpu);
    let epoch = tracker.checkpoint().unwrap();
    let dirty = |offset: &u64| epoch.bitmap().is_dirty(*offset).unwrap();
    let pages: Vec<u64> = (0..SIZE)
        .step_by(PAGE_SIZE as usize)
        .filter(dirty)
        .collect();
    // What the guest wrote, and what was zeroed before it started.
    assert_eq!(pages, [DATA - RAM, zeroed]);
    assert_eq!(epoch.bitmap().parent(), parent);
    let ram = Arc::clone(tracker.protection().ram());
    let mut word = [0; 8];
    ram.read_at(DATA - RAM, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 7);
}

#[test]
fn an_image_that_can_not_be_mapped_leaves_nothing_mapped() {
    let _turn = control::turn();
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::new().unwrap();
    let start = |size| {
        let image = image(dir.path());
        let started = Stage2::start(&vm, layout(size), image, Policy::Pages);
        started.map(drop).unwrap_err()
    };
    let error = start(2 * SIZE);
    assert!(matches!(error, StartError::Ram(_)), "{error:?}");
    control::fail("hv_vm_map", 1, Code::FAULT);
    let error = start(SIZE);
    assert!(matches!(error, StartError::Map(_)), "{error:?}");
    control::fail_from("hv_vm_protect", 1, Code::FAULT);
    let error = start(SIZE);
    assert!(matches!(error, StartError::Protect(_)), "{error:?}");
    assert!(error.to_string().contains("hv_vm_protect"), "{error}");
    assert!(control::mapped().is_empty());
}
