//! Copies of a running guest's RAM.

#![cfg(all(target_os = "linux", target_arch = "x86_64", not(ramsnap_loom)))]

mod support;

use std::cell::RefCell;
use std::error::Error;
use std::sync::{Arc, Mutex};

use dirty_bitmap::TakenBitmap;
use kvm_backend::{DirtyLog, GuestRam, LogEpochError, Precopy, PrecopyError};
use page_reader::PageReader;
use support::{Guest, HIGH, PAGE, offset};
use test_machine::needs;

type AnyError = Box<dyn Error>;

/// A file into which pages are copied, and the pages of the last write.
struct Image {
    bytes: RefCell<Vec<u8>>,
    written: RefCell<Vec<u64>>,
}

impl Image {
    fn new(ram: &GuestRam) -> Self {
        Self {
            bytes: RefCell::new(vec![0; ram.layout().ram_size() as usize]),
            written: RefCell::default(),
        }
    }

    fn write(&self, ram: &GuestRam, pages: &TakenBitmap) -> Result<(), AnyError> {
        let mut bytes = self.bytes.borrow_mut();
        for run in pages.runs() {
            let part = &mut bytes[run.start as usize..run.end as usize];
            ram.read_at(run.start, part)?;
        }
        let pages = pages.runs().flat_map(|run| run.step_by(PAGE as usize));
        *self.written.borrow_mut() = pages.map(|at| at / PAGE).collect();
        Ok(())
    }

    fn wrote(&self, guest_address: u64) -> bool {
        self.written
            .borrow()
            .contains(&(offset(guest_address) / PAGE))
    }
}

fn started(guest: &Guest) -> DirtyLog {
    DirtyLog::start(&guest.slots).unwrap()
}

fn pages_marked(guest: &Guest) -> u64 {
    guest.ram.dirty_bitmap().dirty_pages()
}

/// Makes the last round of a guest whose vCPU has left it.
macro_rules! finish {
    ($precopy:expr, $guest:expr, $capture:expr, $write:expr) => {{
        let Guest { vcpu, vcpus, .. } = &mut $guest;
        let pause = || {
            vcpu.complete_io(|exit| panic!("{exit:?}"))?;
            Ok(vcpus.pause()?)
        };
        $precopy.finish::<_, AnyError>(pause, $capture, $write)
    }};
}

#[test]
fn rounds_and_the_last_one_are_the_whole_image() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = started(&guest);
    let ram = guest.ram.clone();
    let image = Image::new(&ram);
    let write = |pages: &TakenBitmap| image.write(&ram, pages);
    let mut precopy = Precopy::begin(&log).unwrap();
    let all = ram.layout().ram_size() / PAGE;
    assert_eq!(precopy.live_round::<AnyError>(write).unwrap(), all);

    guest.touch(&[0x30_0000, HIGH]);
    let found = precopy.live_round::<AnyError>(write).unwrap();
    assert!((2..all / 2).contains(&found), "{found}");
    assert!(image.wrote(0x30_0000) && image.wrote(HIGH));

    guest.touch(&[0x38_0000]);
    let capture = |_: &_| {
        // As KVM does for the flag of a preempted vCPU.
        ram.write(0x3c_0000, &[9])?;
        Ok(17)
    };
    let copy = finish!(precopy, guest, capture, write).unwrap();
    assert!(image.wrote(0x38_0000) && image.wrote(0x3c_0000));
    assert!(!image.wrote(HIGH));
    assert_eq!(copy.state, 17);
    assert_eq!(copy.pages, image.written.borrow().len() as u64);
    assert!(*image.bytes.borrow() == guest.image());
    copy.epoch.release().unwrap();
    assert_eq!(pages_marked(&guest), 0);
    guest.touch(&[0x30_0000]); // the vCPUs may run
}

#[test]
fn last_round_alone_writes_all_pages() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = started(&guest);
    let ram = guest.ram.clone();
    let image = Image::new(&ram);
    let precopy = Precopy::begin(&log).unwrap();
    guest.touch(&[0x30_0000]);
    let write = |pages: &TakenBitmap| image.write(&ram, pages);
    let copy = finish!(precopy, guest, |_| Ok(()), write).unwrap();
    assert_eq!(copy.pages, ram.layout().ram_size() / PAGE);
    assert!(*image.bytes.borrow() == guest.image());
}

#[test]
fn dropped_copy_returns_its_marks() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = started(&guest);
    let all = pages_marked(&guest);
    let mut precopy = Precopy::begin(&log).unwrap();
    assert_eq!(pages_marked(&guest), 0);
    precopy.live_round::<AnyError>(|_| Ok(())).unwrap();
    guest.touch(&[0x30_0000]);
    precopy.live_round::<AnyError>(|_| Ok(())).unwrap();
    drop(precopy);
    assert_eq!(pages_marked(&guest), all);
}

#[test]
fn failed_write_ends_the_copy() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = started(&guest);
    let mut precopy = Precopy::begin(&log).unwrap();
    let fails = |_: &TakenBitmap| Err(AnyError::from("disk full"));
    let error = precopy.live_round(fails).unwrap_err();
    assert_eq!(error.to_string(), "disk full");
    let never = |_: &TakenBitmap| -> Result<(), AnyError> { panic!("called") };
    let error = precopy.live_round(never).unwrap_err();
    assert!(
        matches!(error.downcast_ref(), Some(PrecopyError::Failed)),
        "{error:?}"
    );
    let error = finish!(precopy, guest, |_| Ok(()), never).unwrap_err();
    assert!(
        matches!(error.downcast_ref(), Some(PrecopyError::Failed)),
        "{error:?}"
    );
    assert_eq!(pages_marked(&guest), guest.ram.layout().ram_size() / PAGE);
}

#[test]
fn failed_pause_returns_the_marks() {
    needs!(Kvm);
    let guest = Guest::touching();
    let log = started(&guest);
    let mut precopy = Precopy::begin(&log).unwrap();
    precopy.live_round::<AnyError>(|_| Ok(())).unwrap();
    let all = guest.ram.layout().ram_size() / PAGE;
    // The vCPU has left the guest with I/O pending.
    let never = |_: &TakenBitmap| -> Result<(), AnyError> { panic!("called") };
    let copy = precopy.finish(|| Ok(guest.vcpus.pause()?), |_| Ok(()), never);
    copy.unwrap_err();
    assert_eq!(pages_marked(&guest), all);
}

#[test]
fn host_writes_are_marked_before_each_take() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let ram = guest.ram.clone();
    let image = Image::new(&ram);
    let write = |pages: &TakenBitmap| image.write(&ram, pages);
    // The marks of a device, which are not in the bitmap of the RAM.
    let device = Arc::new(Mutex::new(vec![]));
    let device_writes = |address: u64| {
        ram.write_unmarked_at(offset(address), &[7]).unwrap();
        device.lock().unwrap().push(offset(address));
    };
    let marks = Arc::clone(&device);
    let options = DirtyLog::options().mark_host_writes(move |bitmap| {
        let mut marks = marks.lock().unwrap();
        marks.drain(..).try_for_each(|at| bitmap.mark(at).map(drop))
    });
    let log = options.start(&guest.slots).unwrap();
    let mut precopy = Precopy::begin(&log).unwrap();
    precopy.live_round::<AnyError>(write).unwrap();
    device_writes(0x30_0000);
    precopy.live_round::<AnyError>(write).unwrap();
    assert!(image.wrote(0x30_0000));

    device_writes(HIGH);
    let capture = |_: &_| {
        device_writes(0x38_0000); // the last write, in the pause
        Ok(())
    };
    let copy = finish!(precopy, guest, capture, write).unwrap();
    assert!(image.wrote(HIGH) && image.wrote(0x38_0000) && !image.wrote(0x30_0000));
    assert!(*image.bytes.borrow() == guest.image());
    copy.epoch.release().unwrap();

    // Without rounds, the last take is the second.
    let precopy = Precopy::begin(&log).unwrap();
    device_writes(HIGH);
    drop(finish!(precopy, guest, |_| Ok(()), write).unwrap());
    assert!(image.wrote(HIGH));
}

#[test]
fn only_one_copy_is_made_at_a_time() {
    needs!(Kvm);
    let guest = Guest::touching();
    let log = started(&guest);
    let first = Precopy::begin(&log).unwrap();
    let error = Precopy::begin(&log).unwrap_err();
    assert!(
        matches!(error, PrecopyError::Epoch(LogEpochError::Begin(_))),
        "{error:?}"
    );
    drop(first);
}
