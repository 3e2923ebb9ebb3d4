//! One suite for every way to protect memory that works here, with real faults.
#![cfg(unix)]

mod machines;

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Barrier, mpsc};
use std::thread;

use dirty_bitmap::{BLOCK_SIZE, Policy, TakenBitmap, TrackedEpoch};
use hvf_backend::{ArmError, FaultError};
use machines::{HIGH, Kind, LOW_SIZE, Machine};
use memory_writer::{Durability, MemoryWriter, SnapshotError};
use page_reader::PageReader;
use rstest::rstest;
use test_machine::rounds;

/// Images on disk, each of what one save took, and what they add up to.
struct Images {
    dir: tempfile::TempDir,
    saved: Vec<u8>,
    count: usize,
}

impl Images {
    fn new(machine: &Machine) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            saved: vec![0; machine.layout().ram_size() as usize],
            count: 0,
        }
    }

    fn writer(&mut self, machine: &Machine) -> MemoryWriter {
        self.count += 1;
        let path = self.dir.path().join(self.count.to_string());
        MemoryWriter::options()
            .durability(Durability::None)
            // The epochs say which pages they hold.
            .allow_ambiguous_diff(true)
            .open(
                path,
                machine.layout().ram_size(),
                machine.bitmap().page_size(),
            )
            .unwrap()
    }

    /// Saves the pages of an epoch.
    fn save(&mut self, machine: &Machine, epoch: TrackedEpoch) {
        let mut writer = self.writer(machine);
        writer.write_diff(&*machine.ram, epoch.bitmap()).unwrap();
        self.commit(writer, epoch.bitmap());
        epoch.release().unwrap();
    }

    fn commit(&mut self, writer: MemoryWriter, pages: &TakenBitmap) {
        let path = writer.dest_path().to_owned();
        writer.commit().unwrap();
        self.merge(&path, pages);
        std::fs::remove_file(path).unwrap();
    }

    fn merge(&mut self, path: &Path, pages: &TakenBitmap) {
        let file = page_reader::FileReader::new(std::fs::File::open(path).unwrap());
        for run in pages.runs() {
            let to = &mut self.saved[run.start as usize..run.end as usize];
            file.read_at(run.start, to).unwrap();
        }
    }

    /// A save that the disk ends half-way.
    fn fail(&mut self, machine: &Machine, epoch: TrackedEpoch) {
        let middle = epoch.bitmap().runs().map(|run| run.start).last();
        let reader = UpTo(&*machine.ram, middle.unwrap_or(0));
        let mut writer = self.writer(machine);
        let failed = writer.write_diff(&reader, epoch.bitmap());
        let error = failed.unwrap_err();
        assert!(matches!(error, SnapshotError::MemoryIo { .. }), "{error}");
    }

    fn assert_same_as(&self, machine: &Machine, when: &str) {
        let page_size = machine.bitmap().page_size() as usize;
        let ram = machine.image();
        let pages = self.saved.chunks(page_size).zip(ram.chunks(page_size));
        let lost: Vec<_> = (0..)
            .step_by(page_size)
            .zip(pages)
            .filter(|(_, (saved, ram))| saved != ram)
            .map(|(offset, _)| format!("{offset:#x}"))
            .collect();
        assert!(lost.is_empty(), "{when}: pages lost: {lost:?}");
    }
}

/// RAM that can't be read from some offset on.
struct UpTo<'a>(&'a (dyn PageReader + Send + Sync), u64);

impl PageReader for UpTo<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > self.1 {
            return Err(io::Error::other("the memory is gone"));
        }
        self.0.read_at(offset, buf)
    }
}

/// A checkpoint of a guest whose vCPUs have stopped. By userfaultfd, a thread may still be at a fault whose write has gone on, woken by
/// another's.
fn once_stopped<T>(
    mut checkpoint: impl FnMut() -> Result<T, ArmError<io::Error>>,
) -> Result<T, ArmError<io::Error>> {
    loop {
        match checkpoint() {
            Err(ArmError::VcpuRunning { .. }) => thread::yield_now(),
            end => return end,
        }
    }
}

fn arm(machine: &Machine) -> Result<TrackedEpoch, ArmError<io::Error>> {
    once_stopped(|| machine.tracker.arm())
}

/// The same for the last checkpoint of a save.
fn arm_last<'e>(
    machine: &Machine,
    epoch: &'e mut TrackedEpoch,
) -> Result<&'e TakenBitmap, ArmError<io::Error>> {
    // Refused when the vCPUs have stopped, too: a save is under way.
    once_stopped(|| machine.tracker.arm()).unwrap_err();
    machine.tracker.arm_last(epoch)
}

/// The first checkpoint of all, and its image.
fn saved_whole(machine: &Machine) -> Images {
    let mut images = Images::new(machine);
    let epoch = arm(machine).unwrap();
    assert_eq!(epoch.bitmap().dirty_bytes(), machine.layout().ram_size());
    images.save(machine, epoch);
    images.assert_same_as(machine, "at first");
    images
}

/// Has all vCPUs write at once, each the pages that it gets.
fn all_write(machine: &Machine, pages_of: impl Fn(usize) -> Vec<u64> + Sync) {
    let start = Barrier::new(machine.vcpus());
    thread::scope(|scope| {
        for vcpu in 0..machine.vcpus() {
            let (start, pages_of) = (&start, &pages_of);
            scope.spawn(move || {
                start.wait();
                machine.write_pages(vcpu, pages_of(vcpu));
            });
        }
    });
    machine.wait_until_marked();
}

#[rstest]
fn at_every_checkpoint_the_images_are_the_ram(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
    #[values(4096, 16384)] page_size: u64,
    #[values(
        Policy::Pages,
        Policy::Blocks,
        Policy::FaultLimit(3),
        Policy::default()
    )]
    policy: Policy,
) {
    let test = "at_every_checkpoint_the_images_are_the_ram";
    let Some(machine) = Machine::new(kind, page_size, policy, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = machine.pages();
    let mut written = vec![vec![0; pages.len()]; machine.vcpus()];
    for round in 0..rounds(3, 8) {
        let chosen = |vcpu: usize| {
            let pages = pages.iter().enumerate();
            // Some blocks densely, some hardly.
            pages.filter(move |(page, _)| {
                (page * 7 + round * 3 + vcpu).is_multiple_of(2 + page / 97 % 40)
            })
        };
        all_write(&machine, |vcpu| {
            chosen(vcpu).map(|(_, page)| *page).collect()
        });
        for (vcpu, written) in written.iter_mut().enumerate() {
            chosen(vcpu).for_each(|(page, _)| written[page] += 1);
        }
        machine.host_write(pages[round * 5 % pages.len()] + 128, &[round as u8; 300]);
        machine.host_write(HIGH + 256, &[round as u8; 8]);

        let epoch = arm(&machine).unwrap();
        if round % 3 == 1 {
            images.fail(&machine, epoch);
        } else {
            images.save(&machine, epoch);
            images.assert_same_as(&machine, &format!("round {round}"));
        }
    }
    // The guest did write, and only once each.
    for (vcpu, written) in written.iter().enumerate() {
        for (page, times) in pages.iter().zip(written) {
            let offset = machine.offset_of(page + 8 * vcpu as u64);
            let mut word = [0; 8];
            machine.ram.read_at(offset, &mut word).unwrap();
            assert_eq!(u64::from_ne_bytes(word), *times, "vCPU {vcpu} at {page:#x}");
        }
    }
}

#[rstest]
fn saves_while_all_vcpus_write_lose_nothing(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
    #[values(4096, 16384)] page_size: u64,
    #[values(Policy::Pages, Policy::Blocks, Policy::FaultLimit(3))] policy: Policy,
) {
    let test = "saves_while_all_vcpus_write_lose_nothing";
    let Some(machine) = Machine::new(kind, page_size, policy, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = machine.pages();
    let vcpus = machine.vcpus();
    assert_eq!(vcpus, 8);
    let mut saves = 0;
    for round in 0..rounds(3, 20) {
        // Each page once a round, by one vCPU, or by all: what is missed stays missed.
        let share = |vcpu: usize| {
            let pages = pages.iter().enumerate();
            let pages = pages.filter(move |(page, _)| round % 3 == 2 || page % vcpus == vcpu);
            pages.map(|(_, page)| *page).collect::<Vec<_>>()
        };
        thread::scope(|scope| {
            let machine = &machine;
            let vcpu = |vcpu| {
                let (go, portions) = mpsc::channel::<Vec<u64>>();
                scope.spawn(move || {
                    portions
                        .iter()
                        .for_each(|pages| machine.write_pages(vcpu, pages));
                });
                go
            };
            let running: Vec<_> = (0..vcpus).map(vcpu).collect();
            let shares: Vec<_> = (0..vcpus).map(share).collect();
            // Each save begins when the vCPUs have a part of their pages to write.
            for part in 0..4 {
                for (go, share) in running.iter().zip(&shares) {
                    let quarter = share.len().div_ceil(4);
                    let pages = share.chunks(quarter).nth(part).unwrap_or_default();
                    // A vCPU that panicked is reported when its thread is joined.
                    let _ = go.send(pages.to_vec());
                }
                let epoch = machine.tracker.arm_running().unwrap();
                saves += 1;
                if saves % 3 == 0 && !epoch.bitmap().is_clean() {
                    images.fail(machine, epoch);
                } else {
                    images.save(machine, epoch);
                }
                let at = pages[saves * 11 % pages.len()] + 1024;
                machine.host_write(at, &saves.to_ne_bytes());
            }
        });
        let epoch = arm(&machine).unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}, after {saves} saves"));
    }
}

#[rstest]
fn a_save_that_began_while_the_guest_ran_is_of_the_moment_it_stopped(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
    #[values(4096, 16384)] page_size: u64,
) {
    let test = "a_save_that_began_while_the_guest_ran_is_of_the_moment_it_stopped";
    let Some(machine) = Machine::new(kind, page_size, Policy::default(), test) else {
        return;
    };
    let mut images = Images::new(&machine);
    let pages = machine.pages();
    for round in 0..3 {
        let mut writer = images.writer(&machine);
        let (epoch, pause) = thread::scope(|scope| {
            let vcpus = 0..machine.vcpus();
            let (machine, pages) = (&machine, &pages);
            let vcpu = |vcpu| {
                let of_vcpu = pages.iter().skip(vcpu).step_by(5).copied();
                scope.spawn(move || (0..4).for_each(|_| machine.write_pages(vcpu, of_vcpu.clone())))
            };
            let running: Vec<_> = vcpus.map(vcpu).collect();
            let mut epoch = machine.tracker.arm_running().unwrap();
            writer.write_diff(&*machine.ram, epoch.bitmap()).unwrap();
            while !running.iter().all(|vcpu| vcpu.is_finished()) {
                let more = machine.tracker.arm_more(&mut epoch).unwrap();
                writer.write_diff(&*machine.ram, more).unwrap();
            }
            machine.host_write(pages[round] + 512, b"host");
            let last = arm_last(machine, &mut epoch).unwrap();
            writer.write_diff(&*machine.ram, last).unwrap();
            let pause = last.dirty_bytes();
            (epoch, pause)
        });
        assert!(pause > 0);
        if round == 1 {
            drop((writer, epoch));
            continue;
        }
        images.commit(writer, epoch.bitmap());
        epoch.release().unwrap();
        images.assert_same_as(&machine, &format!("round {round}"));
        // A handler that came late for a page that was written marks it once more.
        assert!(machine.bitmap().is_clean() || kind != Kind::Mprotect);
    }
}

#[rstest]
fn a_protection_that_fails_half_way_loses_no_page(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
    #[values(false, true)] more: bool,
) {
    let test = "a_protection_that_fails_half_way_loses_no_page";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = &machine.pages();
    let protection = machine.tracker.protection();
    for round in 0..rounds(1, 4) {
        let sparse = |step: usize| move |_: usize| pages_of(pages, step);
        all_write(&machine, sparse(3));
        let before: Vec<_> = machine.bitmap().runs().collect();

        // The call itself, and the one for all of the RAM that is tried then.
        let error = if more {
            let mut epoch = arm(&machine).unwrap();
            all_write(&machine, sparse(2));
            let dirty: Vec<_> = machine.bitmap().runs().collect();
            protection.refuse_protect.store(2, SeqCst);
            let error = arm_last(&machine, &mut epoch).unwrap_err();
            let still: Vec<_> = machine.bitmap().runs().collect();
            assert_eq!(still, dirty, "what is not protected is dirty");
            error
        } else {
            protection.refuse_protect.store(2, SeqCst);
            arm(&machine).unwrap_err()
        };
        let says = error.to_string();
        assert!(says.contains("its pages stay dirty"), "{says}");
        let Some(dirty_bitmap::ArmError::Protect { .. }) = tracker_error(&error) else {
            panic!("{error:?}");
        };
        let covered = |run: &std::ops::Range<u64>| {
            let page = machine.bitmap().page_size() as usize;
            let mut all = (run.start..run.end).step_by(page);
            all.all(|at| machine.bitmap().is_dirty(at).unwrap())
        };
        assert!(before.iter().all(covered), "all marks are back");

        all_write(&machine, sparse(4));
        let epoch = arm(&machine).unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}"));
        all_write(&machine, sparse(5));
        let epoch = arm(&machine).unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}, after another turn"));
    }
}

fn pages_of(pages: &[u64], step: usize) -> Vec<u64> {
    pages.iter().step_by(step).copied().collect()
}

fn tracker_error(error: &ArmError<io::Error>) -> Option<&dirty_bitmap::ArmError<io::Error>> {
    match error {
        ArmError::Tracker(error) => Some(error),
        _ => None,
    }
}

#[rstest]
fn a_page_that_does_not_open_alone_opens_with_its_block(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
) {
    let test = "a_page_that_does_not_open_alone_opens_with_its_block";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let protection = machine.tracker.protection();
    protection.refuse_lift.store(1, SeqCst);
    machine.write_pages(0, [HIGH + 0x3000]);
    machine.wait_until_marked();
    let block = machine.offset_of(HIGH) / BLOCK_SIZE * BLOCK_SIZE;
    let end = (block + BLOCK_SIZE).min(machine.layout().ram_size());
    for offset in (block..end).step_by(4096) {
        assert!(machine.bitmap().is_dirty(offset).unwrap(), "{offset:#x}");
    }
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "then");

    protection.refuse_lift.store(3, SeqCst);
    let error = machine.tracker.on_write_fault(HIGH + 0x7000).unwrap_err();
    assert!(matches!(error, FaultError::Tracker(_)), "{error:?}");
    assert!(error.to_string().contains("can't lift"), "{error}");
    assert!(machine.is_dirty(HIGH + 0x7000), "what may be open is dirty");
}

#[rstest]
fn a_fault_opens_a_block_on_both_sides_of_a_gap(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
) {
    let test = "a_fault_opens_a_block_on_both_sides_of_a_gap";
    let Some(machine) = Machine::new(kind, 4096, Policy::Blocks, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let protection = machine.tracker.protection();
    let (last, first) = (LOW_SIZE - 4096, HIGH);
    machine.write_pages(0, [last]);
    machine.wait_until_marked();
    let half = BLOCK_SIZE / 2;
    assert!(machine.is_dirty(first), "the same block");
    assert!(machine.is_dirty(first + half - 1) && !machine.is_dirty(first + half));
    assert!(machine.is_dirty(last - half + 4096) && !machine.is_dirty(last - half));
    // It is open there too: this takes no fault.
    protection.refuse_lift.store(9, SeqCst);
    machine.write_pages(1, [first]);
    assert_eq!(protection.refuse_lift.swap(0, SeqCst), 9);
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "then");
}

#[rstest]
fn a_block_that_is_open_but_not_yet_marked_makes_a_checkpoint_wait(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
) {
    let test = "a_block_that_is_open_but_not_yet_marked_makes_a_checkpoint_wait";
    let Some(machine) = Machine::new(kind, 4096, Policy::Blocks, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let hold = &machine.tracker.protection().hold_lift;
    let (unmarked, checkpoint) = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(HIGH));
        // An exit that is being handled, its vCPU out of the guest.
        let handling = scope.spawn(|| machine.tracker.on_write_fault(HIGH).unwrap());
        held.wait_until_it_comes();
        machine.write_pages(1, [HIGH + 0x5000]);
        let seen = (!machine.is_dirty(HIGH + 0x5000), machine.tracker.arm());
        drop(held);
        handling.join().unwrap();
        seen
    });
    assert!(unmarked);
    let refused = ArmError::<io::Error>::VcpuRunning { running: 1 };
    assert_eq!(checkpoint.unwrap_err().to_string(), refused.to_string());
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "then");
}

#[rstest]
fn what_is_written_as_soon_as_it_is_protected_is_marked_again(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
    #[values(false, true)] more: bool,
) {
    let test = "what_is_written_as_soon_as_it_is_protected_is_marked_again";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let page = HIGH + 0x5000;
    let hold = &machine.tracker.protection().hold_protect;
    let mut begun = more.then(|| machine.tracker.arm_running().unwrap());
    machine.write_pages(0, [page]);
    // A writer that the kernel wakes for other work goes on as soon as the page is open.
    machine.wait_until_marked();
    let epoch = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(page));
        let checkpoint = scope.spawn(|| match begun.take() {
            None => machine.tracker.arm_running().unwrap(),
            Some(mut epoch) => {
                machine.tracker.arm_more(&mut epoch).unwrap();
                epoch
            }
        });
        held.wait_until_it_comes();
        machine.write_pages(1, [page]);
        drop(held);
        checkpoint.join().unwrap()
    });
    machine.wait_until_marked();
    assert!(machine.is_dirty(page), "it is open");
    images.save(&machine, epoch);
    machine.write_pages(2, [page]);
    images.save(&machine, arm(&machine).unwrap());
    images.assert_same_as(&machine, "then");
}

#[rstest]
fn no_checkpoint_of_a_stopped_guest_while_a_vcpu_runs(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
) {
    let test = "no_checkpoint_of_a_stopped_guest_while_a_vcpu_runs";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let in_guest = machine.tracker.enter();
    let error = machine.tracker.arm().unwrap_err();
    assert!(error.to_string().contains("stop them first"), "{error}");
    assert_eq!(machine.bitmap().dirty_bytes(), machine.layout().ram_size());

    let mut epoch = machine.tracker.arm_running().unwrap();
    machine.tracker.arm_last(&mut epoch).unwrap_err();
    machine.tracker.arm_more(&mut epoch).unwrap();
    drop(in_guest);
    machine.tracker.arm_last(&mut epoch).unwrap();
    let error = machine.tracker.arm().unwrap_err();
    let expected = dirty_bitmap::BeginEpochError::AlreadyOpen;
    assert!(
        matches!(tracker_error(&error), Some(dirty_bitmap::ArmError::Epoch(open)) if *open == expected),
        "{error:?}"
    );
    epoch.release().unwrap();
    machine.tracker.arm().unwrap().release().unwrap();
}
