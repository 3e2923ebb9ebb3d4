//! Saves of a stopped guest, of a running guest, and with pre-copy.

#![allow(clippy::missing_panics_doc, reason = "a panic is a failed test")]

use std::sync::mpsc;
use std::thread;

use dirty_bitmap::Policy;
use page_reader::PageReader;
use test_machine::rounds;

use crate::backend::{Backend, HIGH};
use crate::images::{Images, saved_whole};
use crate::machine::Machine;

/// Checks that a save of a stopped guest, after each of several rounds of writes, has the contents
/// of the RAM.
pub fn images_equal_the_ram<B: Backend>(page_size: u64, policy: Policy) {
    let test = "the_images_equal_the_ram_at_every_checkpoint";
    let Some(machine) = Machine::<B>::new(page_size, policy, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = machine.pages();
    let mut written = vec![vec![0; pages.len()]; machine.vcpus()];
    for round in 0..rounds(3, 8) {
        let chosen = |vcpu: usize| {
            let pages = pages.iter().enumerate();
            // Some blocks are written densely, some sparsely.
            pages.filter(move |(page, _)| {
                (page * 7 + round * 3 + vcpu).is_multiple_of(2 + page / 97 % 40)
            })
        };
        machine.all_write(|vcpu| chosen(vcpu).map(|(_, page)| *page).collect());
        for (vcpu, written) in written.iter_mut().enumerate() {
            chosen(vcpu).for_each(|(page, _)| written[page] += 1);
        }
        machine.host_write(pages[round * 5 % pages.len()] + 128, &[round as u8; 300]);
        machine.host_write(HIGH + 256, &[round as u8; 8]);

        let epoch = machine.checkpoint().unwrap();
        if round % 3 == 1 {
            images.fail(&machine, epoch);
        } else {
            images.save(&machine, epoch);
            images.assert_same_as(&machine, &format!("round {round}"));
        }
    }
    // Every write of the guest happened exactly once.
    for (vcpu, written) in written.iter().enumerate() {
        for (page, times) in pages.iter().zip(written) {
            let offset = machine.offset_of(page + 8 * vcpu as u64);
            let mut word = [0; 8];
            machine.ram().read_at(offset, &mut word).unwrap();
            assert_eq!(u64::from_ne_bytes(word), *times, "vCPU {vcpu} at {page:#x}");
        }
    }
}

/// Checks that saves of a running guest lose no page.
pub fn saves_while_all_vcpus_write<B: Backend>(page_size: u64, policy: Policy) {
    let test = "saves_while_all_vcpus_write_lose_no_page";
    let Some(machine) = Machine::<B>::new(page_size, policy, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = machine.pages();
    let vcpus = machine.vcpus();
    assert!(
        vcpus > 1,
        "the suite for running guests needs several vCPUs"
    );
    let mut saves = 0;
    for round in 0..rounds(3, 20) {
        // Each page is written once a round, by one vCPU or by all, so that a later write does not
        // hide a missed one.
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
            // Each save begins after the vCPUs were given a part of their pages.
            for part in 0..4 {
                for (go, share) in running.iter().zip(&shares) {
                    let quarter = share.len().div_ceil(4);
                    let pages = share.chunks(quarter).nth(part).unwrap_or_default();
                    // A vCPU that panicked is reported when its thread is joined.
                    let _ = go.send(pages.to_vec());
                }
                let epoch = machine.tracker.checkpoint_live().unwrap();
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
        let epoch = machine.checkpoint().unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}, after {saves} saves"));
    }
}

/// Checks that a save that ends with a short pause has the contents of the RAM at the pause.
pub fn precopy_save<B: Backend>(page_size: u64) {
    let test = "a_precopy_save_equals_the_ram_of_the_stopped_guest";
    let Some(machine) = Machine::<B>::new(page_size, Policy::default(), test) else {
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
            let mut epoch = machine.tracker.checkpoint_live().unwrap();
            writer.write_diff(machine.ram(), epoch.bitmap()).unwrap();
            while !running.iter().all(|vcpu| vcpu.is_finished()) {
                let more = machine.tracker.checkpoint_incremental(&mut epoch).unwrap();
                writer.write_diff(machine.ram(), &more).unwrap();
            }
            machine.host_write(pages[round] + 512, b"host");
            let last = machine.checkpoint_final(&mut epoch).unwrap();
            writer.write_diff(machine.ram(), last).unwrap();
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
        // A fault that is handled late marks its page once more.
        assert!(machine.bitmap().is_clean() || B::LATE_FAULTS);
    }
}

/// Checks that a page that the VMM discards and marks is zeros in the images, and that its next
/// write is found: userfaultfd drops the protection of a discarded page.
#[cfg(target_os = "linux")]
pub fn discarded_page<B: Backend>() {
    use nix::fcntl::{FallocateFlags, fallocate};

    let test = "a_discarded_page_that_is_marked_becomes_zeros";
    let Some(machine) = Machine::<B>::new(4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let (page, page_size) = (machine.pages()[1], machine.bitmap().page_size());
    let mut save_and_compare = |when: &str| {
        let epoch = machine.checkpoint().unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, when);
    };
    machine.write_pages(0, [page]);
    machine.wait_until_marked();
    save_and_compare("before the discard");
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (file, offset) = (machine.file(), machine.offset_of(page));
    fallocate(file, hole, offset as i64, page_size as i64).unwrap();
    machine.tracker.mark_host_write(page, page_size).unwrap();
    save_and_compare("after the discard");
    machine.write_pages(0, [page]);
    machine.wait_until_marked();
    save_and_compare("after the next write");
}
