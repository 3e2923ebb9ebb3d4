//! Guests in this process that log their own writes, and mutants that the suite must reject.

#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_bitmap::{BeginEpochError, ExtendError, Extension, LoggedEpoch, TakenBitmap};
use guest_ram::{LoggedRam, host_page_size};
use page_reader::RamLayout;
use test_machine::Need;
use write_tracking::{LOW_SIZE, LoggedBackend, suite};

/// A mistake of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mistake {
    None,
    /// Writes before the first harvest are missing.
    LogBeginsClean,
    /// The log of the second region is taken for that of the first.
    OneRegion,
    /// A page is logged only once.
    NotLoggedAgain,
    /// The log of a paused guest is not moved.
    NoLastHarvest,
    /// The marks of host writes stay where they were made.
    HostMarksNotMoved,
}

/// The mistake as a type, because a backend is one.
pub(super) trait Makes: Send + Sync + 'static {
    const MISTAKE: Mistake;
}

macro_rules! makes {
    ($($name:ident),*) => {$(
        pub(super) struct $name;
        impl Makes for $name {
            const MISTAKE: Mistake = Mistake::$name;
        }
    )*};
}
makes!(
    None,
    LogBeginsClean,
    OneRegion,
    NotLoggedAgain,
    NoLastHarvest,
    HostMarksNotMoved
);

/// A guest whose vCPUs are threads. Each sets the bit of a page after it has written to it.
pub(super) struct Soft<M> {
    ram: LoggedRam,
    /// One bit for each page of the memory file.
    log: Box<[AtomicU64]>,
    /// The pages that were ever in the log.
    logged: Box<[AtomicU64]>,
    mistake: std::marker::PhantomData<M>,
}

impl<M: Makes> Soft<M> {
    fn begin(&self, harvest: impl FnOnce()) -> LoggedEpoch {
        let bitmap = Arc::clone(self.ram.dirty_bitmap());
        let begun = LoggedEpoch::begin_after(bitmap, |_| {
            harvest();
            Ok::<_, BeginEpochError>(())
        });
        begun.unwrap()
    }

    fn harvest_paused(&self) {
        // The vCPUs are the threads that call `increment`, and none does.
        if M::MISTAKE != Mistake::NoLastHarvest {
            self.harvest();
        }
    }

    fn harvest(&self) {
        let first_page = match M::MISTAKE {
            Mistake::OneRegion => LOW_SIZE / host_page_size(),
            _ => 0,
        };
        let words = self.log.iter().zip(&self.logged).map(|(word, logged)| {
            let taken = word.swap(0, Ordering::SeqCst);
            let before = logged.fetch_or(taken, Ordering::SeqCst);
            match M::MISTAKE {
                Mistake::NotLoggedAgain => taken & !before,
                _ => taken,
            }
        });
        let words: Vec<_> = words.map(u64::to_le).collect();
        let bitmap = self.ram.dirty_bitmap();
        let skipped = &words[(first_page / 64) as usize..];
        let start = bitmap.ram_start();
        bitmap
            .mark_dirty_log(start, host_page_size(), skipped)
            .unwrap();
    }
}

impl<M: Makes> LoggedBackend for Soft<M> {
    const NEEDS: &'static [Need] = &[];

    fn new(regions: [(u64, u64); 2]) -> Self {
        let layout = RamLayout::new(regions).unwrap();
        let words = (layout.ram_size() / host_page_size()).div_ceil(64);
        let zeros = || (0..words).map(|_| AtomicU64::new(0)).collect();
        let ram = LoggedRam::new(layout).unwrap();
        ram.write(0, b"booted").unwrap();
        match M::MISTAKE {
            Mistake::LogBeginsClean => ram.set_baseline().unwrap(),
            _ => ram.mark_all(),
        }
        Self {
            ram,
            log: zeros(),
            logged: zeros(),
            mistake: std::marker::PhantomData,
        }
    }

    fn ram(&self) -> &LoggedRam {
        &self.ram
    }

    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        match M::MISTAKE {
            Mistake::HostMarksNotMoved => {
                let offset = self.ram.layout().offset_of(guest_start).unwrap();
                self.ram.write_unmarked_at(offset, bytes).unwrap();
            }
            _ => self.ram.write(guest_start, bytes).unwrap(),
        }
    }

    fn vcpus(&self) -> usize {
        4
    }

    fn increment(&self, _vcpu: usize, addresses: &[u64]) {
        for address in addresses {
            let piece = self.ram.layout().regions().iter();
            let mut piece = piece.filter(|region| region.guest_start <= *address);
            let region = piece.next_back().unwrap();
            let within = address - region.guest_start;
            // SAFETY: an aligned word of the region, which is mapped as long as `self.ram` exists
            // and is accessed atomically.
            unsafe {
                let word = self
                    .ram
                    .host_address(region.region)
                    .byte_add(within as usize);
                AtomicU64::from_ptr(word.as_ptr().cast()).fetch_add(1, Ordering::SeqCst);
            }
            let page = (region.offset + within) / host_page_size();
            self.log[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    fn begin_live(&self) -> LoggedEpoch {
        self.begin(|| self.harvest())
    }

    fn extend_live(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap)) {
        copy(&extend(epoch, || self.harvest()));
    }

    fn begin_paused(&self, copy: impl FnOnce(LoggedEpoch)) {
        copy(self.begin(|| self.harvest_paused()));
    }

    fn extend_paused(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap)) {
        copy(&extend(epoch, || self.harvest_paused()));
    }
}

fn extend(epoch: &mut LoggedEpoch, harvest: impl FnOnce()) -> Extension<'_> {
    let extended = epoch.extend_after(|_| {
        harvest();
        Ok::<_, ExtendError>(())
    });
    extended.unwrap()
}

/// Returns whether the suite accepts a backend that makes a mistake.
fn is_accepted<M: Makes>() -> bool {
    let suite = || {
        suite::logs::images_equal_the_ram::<Soft<M>>(4096);
        suite::logs::next_write::<Soft<M>>();
    };
    catch_unwind(AssertUnwindSafe(suite)).is_ok()
}

#[test]
fn a_backend_that_loses_pages_fails_the_suite() {
    assert!(is_accepted::<None>());
    assert!(!is_accepted::<LogBeginsClean>());
    assert!(!is_accepted::<OneRegion>());
    assert!(!is_accepted::<NotLoggedAgain>());
    assert!(!is_accepted::<NoLastHarvest>());
    assert!(!is_accepted::<HostMarksNotMoved>());
}
