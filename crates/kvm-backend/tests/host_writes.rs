//! Host writes that are marked elsewhere than in the bitmap of the RAM.
#![cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]

mod support;

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dirty_bitmap::{DirtyBitmapSlice, LoggedBitmap, RegionBitmap};
use kvm_backend::{
    DirtyLog, GuestRam, HarvestError, LogEpochError, Precopy, PrecopyError, RamSlots, StartError,
    Vcpu, Vcpus, create_vm, open_kvm,
};
use nix::libc;
use rstest::rstest;
use support::{Guest, HIGH, PAGE};
use test_machine::needs;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const SIZE: usize = 1 << 20;
/// The first pages of two regions in the bitmap.
const FIRST: u64 = 3;
const SECOND: u64 = SIZE as u64 / PAGE + 5;

fn memory<B: Bitmap>(bitmaps: [B; 2]) -> Arc<GuestMemoryMmap<B>> {
    let regions = bitmaps.into_iter().zip([0, HIGH]).map(|(bitmap, start)| {
        let mapping = MmapRegionBuilder::new_with_bitmap(SIZE, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    });
    Arc::new(GuestMemoryMmap::from_regions(regions.collect()).unwrap())
}

fn atomic() -> AtomicBitmap {
    AtomicBitmap::new(SIZE, NonZeroUsize::new(PAGE as usize).unwrap())
}

/// A virtual machine whose RAM is guest memory of `vm-memory`.
struct Vm<B: Bitmap> {
    memory: Arc<GuestMemoryMmap<B>>,
    ram: Arc<GuestRam>,
    slots: Arc<RamSlots>,
    vcpus: Vcpus,
    _vcpu: Vcpu,
}

impl<B: Bitmap + fmt::Debug + Send + Sync + 'static> Vm<B> {
    fn new(bitmaps: [B; 2]) -> Self {
        let vm = create_vm(&open_kvm().unwrap()).unwrap();
        let vcpus = Vcpus::new(&vm).unwrap();
        let memory = memory(bitmaps);
        let ram = guest_ram::GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap();
        let ram = Arc::new(GuestRam::from(ram));
        Self {
            memory,
            slots: Arc::new(RamSlots::register(&vm, &ram, 0).unwrap()),
            ram,
            _vcpu: vcpus.create(&vm, 0).unwrap(),
            vcpus,
        }
    }

    fn device_writes(&self, address: u64) {
        let written = self.memory.write_obj(7_u32, GuestAddress(address));
        written.unwrap();
    }
}

#[rstest]
#[case::atomic([atomic(), atomic()])]
#[case::optional([Some(atomic()), Some(atomic())])]
fn each_epoch_has_the_marks_of_atomic_bitmaps<B>(#[case] bitmaps: [B; 2])
where
    B: RegionBitmap + fmt::Debug + Send + Sync + 'static,
{
    needs!(Kvm);
    let vm = Vm::new(bitmaps);
    let error = DirtyLog::start(&vm.slots).unwrap_err();
    assert!(matches!(error, StartError::MarksElsewhere), "{error:?}");
    assert!(error.to_string().contains("mark_host_writes"));

    let memory = Arc::clone(&vm.memory);
    let log = DirtyLog::options()
        .mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&memory))
        .start(&vm.slots)
        .unwrap();
    vm.ram.set_baseline().unwrap();
    let (first, second) = (FIRST * PAGE, HIGH + 5 * PAGE);
    let harvest = || log.harvest(vm.vcpus.pause().unwrap()).unwrap();

    vm.device_writes(first);
    let mut epoch = log.begin_live_epoch().unwrap();
    assert!(epoch.bitmap().pages().eq([FIRST..FIRST + 1]));
    vm.device_writes(second);
    let extension = log.extend_live(&mut epoch).unwrap();
    assert!(extension.pages().eq([SECOND..SECOND + 1]));
    vm.device_writes(first);
    let paused = harvest();
    let extension = paused.extend(&mut epoch).unwrap();
    assert!(extension.pages().eq([FIRST..FIRST + 1]));
    drop(paused);
    epoch.release().unwrap();

    vm.device_writes(second);
    let epoch = harvest().begin_epoch().unwrap();
    assert!(epoch.bitmap().pages().eq([SECOND..SECOND + 1]));
    epoch.release().unwrap();

    vm.device_writes(first);
    let mut precopy = Precopy::begin(&log).unwrap();
    let round = precopy.live_round::<Box<dyn std::error::Error>>(|_| Ok(()));
    assert_eq!(round.unwrap(), 1);
}

#[test]
fn memory_that_marks_in_the_bitmap_needs_no_function() {
    needs!(Kvm);
    let bitmap = Arc::new(LoggedBitmap::logged(0, 2 * SIZE as u64, PAGE).unwrap());
    let slices = DirtyBitmapSlice::of_regions(&bitmap, [SIZE as u64; 2]).unwrap();
    let vm = Vm::new(<[_; 2]>::try_from(slices).unwrap());
    let log = DirtyLog::start(&vm.slots).unwrap();
    vm.ram.set_baseline().unwrap();
    vm.device_writes(HIGH + 5 * PAGE);
    let epoch = log.begin_live_epoch().unwrap();
    assert!(epoch.bitmap().pages().eq([SECOND..SECOND + 1]));
}

#[test]
fn failure_to_mark_host_writes_takes_no_mark() {
    needs!(Kvm);
    let guest = Guest::touching();
    let failing = Arc::new(AtomicBool::new(true));
    let fails = Arc::clone(&failing);
    let mark = move |_: &_| match fails.load(Ordering::Relaxed) {
        true => Err("no marks"),
        false => Ok(()),
    };
    let log = DirtyLog::options().mark_host_writes(mark);
    let log = log.start(&guest.slots).unwrap();
    let all = guest.ram.dirty_bitmap().dirty_pages();

    let error = log.harvest_live().unwrap_err();
    assert!(matches!(error, HarvestError::HostWrites(_)), "{error:?}");
    assert!(error.to_string().ends_with(": no marks"));
    let error = log.begin_live_epoch().unwrap_err();
    assert!(
        matches!(error, LogEpochError::Harvest(HarvestError::HostWrites(_))),
        "{error:?}"
    );
    let error = Precopy::begin(&log).unwrap_err();
    assert!(
        matches!(
            error,
            PrecopyError::Epoch(LogEpochError::Harvest(HarvestError::HostWrites(_)))
        ),
        "{error:?}"
    );
    assert_eq!(guest.ram.dirty_bitmap().dirty_pages(), all);
    failing.store(false, Ordering::Relaxed);
    assert_eq!(log.begin_live_epoch().unwrap().bitmap().dirty_pages(), all);
}
