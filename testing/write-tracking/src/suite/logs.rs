//! Saves of guests whose writes a hypervisor logs.

#![allow(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "a panic is a failed test")]

use std::sync::Barrier;
use std::thread;

use dirty_bitmap::TakenBitmap;
use guest_ram::host_page_size;
use page_reader::PageReader;
use test_machine::rounds;

use crate::backend::{HIGH, HIGH_SIZE, LOW_SIZE};
use crate::logged::LoggedBackend;
use crate::machine::PROGRAM_END;

/// A guest, and the contents of its saves so far.
struct Saved<B> {
    backend: B,
    image: Vec<u8>,
}

impl<B: LoggedBackend> Saved<B> {
    /// Creates a guest and makes the first save. Returns `None` if the machine lacks what the
    /// backend needs, and reports that for `test`.
    fn new(test: &str) -> Option<Self> {
        let test = format!("{}::{test}", std::any::type_name::<B>());
        if !B::NEEDS.iter().all(|need| need.met(&test)) {
            return None;
        }
        let backend = B::new([(0, LOW_SIZE), (HIGH, HIGH_SIZE)]);
        let mut saved = Self {
            image: vec![0xee; (LOW_SIZE + HIGH_SIZE) as usize],
            backend,
        };
        saved.save(true);
        saved.assert_complete("first save");
        Some(saved)
    }

    /// Makes a save of a stopped guest. One that is not `durable` fails after the copy.
    fn save(&mut self, durable: bool) {
        let Self { backend, image } = self;
        backend.begin_paused(|epoch| {
            copy(backend.ram(), epoch.bitmap(), image);
            if durable {
                epoch.release().unwrap();
            }
        });
    }

    fn assert_complete(&self, when: &str) {
        let mut ram = vec![0; self.image.len()];
        self.backend.ram().read_at(0, &mut ram).unwrap();
        let page_size = host_page_size() as usize;
        let pages = self.image.chunks(page_size).zip(ram.chunks(page_size));
        let lost = pages.enumerate().filter(|(_, (saved, ram))| saved != ram);
        let lost: Vec<_> = lost.map(|(page, _)| page).collect();
        assert!(lost.is_empty(), "{when}: pages lost: {lost:?}");
    }
}

fn copy(ram: &impl PageReader, pages: &TakenBitmap, image: &mut [u8]) {
    for run in pages.runs() {
        let bytes = &mut image[run.start as usize..run.end as usize];
        ram.read_at(run.start, bytes).unwrap();
    }
}

/// Returns the guest-physical address of each page that vCPUs may write.
fn pages() -> Vec<u64> {
    let page_size = host_page_size() as usize;
    let low = (PROGRAM_END..LOW_SIZE).step_by(page_size);
    low.chain((HIGH..HIGH + HIGH_SIZE).step_by(page_size))
        .collect()
}

/// Returns the pages of one vCPU in one round: about one of seven.
fn chosen(vcpu: usize, round: usize) -> impl Iterator<Item = u64> {
    let pages = pages().into_iter().enumerate();
    let of_round = move |(page, _): &(usize, u64)| (page * 5 + round * 3 + vcpu).is_multiple_of(7);
    pages
        .filter(of_round)
        .map(move |(_, page)| page + 8 * vcpu as u64)
}

/// Checks that each save of a stopped guest has the contents of the RAM, with a bitmap of pages of
/// `page_size` bytes.
pub fn images_equal_the_ram<B: LoggedBackend>(page_size: u64) {
    let Some(mut saved) = Saved::<B>::new("the_images_equal_the_ram_at_every_pause") else {
        return;
    };
    let bitmap = saved.backend.ram().dirty_bitmap();
    bitmap.rebuild(page_size).unwrap();
    for round in 0..rounds(5, 50) {
        let start = Barrier::new(saved.backend.vcpus());
        thread::scope(|scope| {
            for vcpu in 0..saved.backend.vcpus() {
                let (backend, start) = (&saved.backend, &start);
                scope.spawn(move || {
                    start.wait();
                    backend.increment(vcpu, &chosen(vcpu, round).collect::<Vec<_>>());
                });
            }
        });
        // Some of seven pages were written by no vCPU in this round.
        for at in pages().into_iter().cycle().skip(round * 11 + 1).take(7) {
            saved.backend.host_write(at, &[round as u8; 300]);
        }
        let durable = round % 3 != 1;
        saved.save(durable);
        if durable {
            saved.assert_complete(&format!("round {round}"));
        }
    }
}

/// Checks that saves that begin while all vCPUs write lose no page.
pub fn saves_while_all_vcpus_write<B: LoggedBackend>() {
    let Some(mut saved) = Saved::<B>::new("saves_while_all_vcpus_write_lose_no_page") else {
        return;
    };
    for round in 0..rounds(3, 30) {
        let Saved { backend, image } = &mut saved;
        assert!(backend.vcpus() > 1, "the suite needs several vCPUs");
        let mut epoch = backend.begin_live();
        copy(backend.ram(), epoch.bitmap(), image);
        thread::scope(|scope| {
            let backend = &*backend;
            let vcpu = |vcpu| {
                scope.spawn(move || {
                    for part in 0..4 {
                        let addresses: Vec<_> = chosen(vcpu, 4 * round + part).collect();
                        backend.increment(vcpu, &addresses);
                    }
                })
            };
            let running: Vec<_> = (0..backend.vcpus()).map(vcpu).collect();
            backend.host_write(HIGH + HIGH_SIZE - 8, &round.to_le_bytes());
            while !running.iter().all(|vcpu| vcpu.is_finished()) {
                backend.extend_live(&mut epoch, |pages| copy(backend.ram(), pages, image));
            }
        });
        backend.host_write(LOW_SIZE - 8, &round.to_le_bytes());
        backend.extend_paused(&mut epoch, |pages| copy(backend.ram(), pages, image));
        epoch.release().unwrap();
        saved.assert_complete(&format!("round {round}"));
    }
}

/// Checks that a page that was harvested is logged again at its next write, in both regions.
pub fn next_write<B: LoggedBackend>() {
    let test = "a_page_written_after_a_harvest_is_logged_again";
    let Some(saved) = Saved::<B>::new(test) else {
        return;
    };
    let ram = saved.backend.ram();
    for address in [LOW_SIZE - 8, HIGH, HIGH + HIGH_SIZE - 8] {
        for time in 0..3 {
            saved.backend.increment(0, &[address]);
            let epoch = saved.backend.begin_live();
            let offset = ram.layout().offset_of(address).unwrap();
            let marked = epoch.bitmap().is_dirty(offset).unwrap();
            assert!(marked, "{address:#x}, {time}");
            epoch.release().unwrap();
        }
    }
}

/// Checks that a page that the VMM discards and marks is zeros in the images, and is logged at its
/// next write.
#[cfg(target_os = "linux")]
pub fn discarded_page<B: LoggedBackend>() {
    let test = "a_discarded_page_that_is_marked_becomes_zeros";
    let Some(mut saved) = Saved::<B>::new(test) else {
        return;
    };
    let page_size = host_page_size();
    saved.backend.increment(0, &[HIGH]);
    saved.save(true);
    saved.assert_complete("before the discard");
    let ram = saved.backend.ram();
    discard(ram, 1, page_size as usize);
    ram.mark(HIGH, page_size).unwrap();
    let mut page = vec![1; page_size as usize];
    ram.read(HIGH, &mut page).unwrap();
    assert!(page.iter().all(|byte| *byte == 0), "it was discarded");
    saved.save(true);
    saved.assert_complete("after the discard");
    saved.backend.increment(0, &[HIGH]);
    saved.save(true);
    saved.assert_complete("after the next write");
}

/// Discards the first bytes of a region, as a balloon device does.
#[cfg(target_os = "linux")]
fn discard(ram: &guest_ram::LoggedRam, region: usize, len: usize) {
    use nix::sys::mman::{MmapAdvise, madvise};

    let start = ram.host_address(region).cast();
    // SAFETY: the pages are in the RAM, which no reference covers.
    let shared = unsafe { madvise(start, len, MmapAdvise::MADV_REMOVE) };
    if shared.is_err() {
        // SAFETY: as above.
        unsafe { madvise(start, len, MmapAdvise::MADV_DONTNEED) }.unwrap();
    }
}
