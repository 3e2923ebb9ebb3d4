//! A tracker compared with an oracle of all writes: every written page is saved or marked.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use dirty_bitmap::{BLOCK_SIZE, Policy, WriteTracker};
use proptest::prelude::*;
use rstest::rstest;

use crate::machine::Machine;

const PAGES: u64 = 20;
const PAGE: u64 = BLOCK_SIZE / 8;

#[derive(Clone, Debug)]
enum Step {
    Write(u64),
    HostWrite(u64),
    /// A save with writes between its two halves. It may fail, and the platform may refuse calls
    /// after `calls_left` of them.
    Save {
        during: Vec<u64>,
        fails: bool,
        calls_left: u64,
    },
    Rebuild(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let calls_left = prop_oneof![3 => Just(u64::MAX), 1 => 0u64..3];
    let save = (
        prop::collection::vec(0..PAGES, 0..4),
        any::<bool>(),
        calls_left,
    );
    let step = prop_oneof![
        6 => (0..PAGES).prop_map(Step::Write),
        1 => (0..PAGES).prop_map(Step::HostWrite),
        2 => save.prop_map(|(during, fails, calls_left)| Step::Save { during, fails, calls_left }),
        1 => (10u32..22).prop_map(Step::Rebuild),
    ];
    prop::collection::vec(step, 1..60)
}

fn policies() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::Pages),
        Just(Policy::Blocks),
        (0u32..5).prop_map(Policy::FaultLimit),
        Just(Policy::default()),
    ]
}

/// Returns the start of the RAM: below 4 GiB, or such that the RAM ends one page before 2^64.
fn starts() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(3 * BLOCK_SIZE),
        Just((PAGES * PAGE + PAGE).wrapping_neg())
    ]
}

/// Saves the marked pages and those written during the save. On failure, the image is unchanged.
fn save(
    machine: &Machine,
    tracker: &WriteTracker,
    image: &mut Vec<u64>,
    mut during: impl FnMut(),
    fails: bool,
) -> Option<()> {
    let mut next = image.clone();
    let mut epoch = tracker.checkpoint(machine).ok()?;
    machine.copy(epoch.bitmap(), &mut next);
    during();
    let more = tracker.checkpoint_incremental(&mut epoch, machine).ok()?;
    machine.copy(&more, &mut next);
    if fails {
        return None;
    }
    *image = next;
    epoch.release().unwrap();
    Some(())
}

proptest! {
    #[test]
    fn every_write_is_in_the_next_successful_save(
        start in starts(),
        policy in policies(),
        steps in steps(),
    ) {
        let machine = Machine::new(start, PAGES, PAGE);
        let tracker = machine.tracked(policy);
        let mut image = vec![0; PAGES as usize];
        let stamp = AtomicU64::new(0);
        let next = || stamp.fetch_add(1, Ordering::Relaxed) + 1;
        for step in steps {
            match step {
                Step::Write(page) => _ = machine.write(&tracker, page, next()),
                Step::HostWrite(page) => machine.host_write(&tracker, page, next()),
                Step::Rebuild(shift) => tracker.bitmap().rebuild(1 << shift).unwrap(),
                Step::Save { during, fails, calls_left } => {
                    machine.calls_left.store(calls_left, Ordering::SeqCst);
                    let writes = || {
                        machine.calls_left.store(u64::MAX, Ordering::SeqCst);
                        for page in &during {
                            machine.write(&tracker, *page, next());
                        }
                        machine.calls_left.store(calls_left, Ordering::SeqCst);
                    };
                    let saved = save(&machine, &tracker, &mut image, writes, fails);
                    machine.calls_left.store(u64::MAX, Ordering::SeqCst);
                    // No thread writes now, so a successful save has every page.
                    if saved.is_some() {
                        prop_assert_eq!(&image, &machine.words());
                    }
                }
            }
        }
        prop_assert!(save(&machine, &tracker, &mut image, || (), false).is_some());
        prop_assert_eq!(image, machine.words());
    }
}

/// Eight vCPUs write while one thread rebuilds the bitmap repeatedly. Every third save fails.
#[rstest]
fn concurrent_writes_saves_and_rebuilds_lose_no_page(
    #[values(
        Policy::Pages,
        Policy::Blocks,
        Policy::FaultLimit(3),
        Policy::default()
    )]
    policy: Policy,
) {
    const PAGES: u64 = 4 * 512;
    let thorough = std::env::var_os("RAMSNAP_THOROUGH").is_some_and(|value| value == "1");
    let (min_writes, min_saves) = if thorough { (20_000, 30) } else { (2000, 6) };
    let machine = Machine::new(0, PAGES, 4096);
    let tracker = machine.tracked(policy);
    let mut image = vec![0; PAGES as usize];
    let (done, saves) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..8u64)
            .map(|vcpu| {
                let (machine, tracker, saves) = (&machine, &tracker, &saves);
                scope.spawn(move || {
                    let mut random = vcpu + 1;
                    for count in 0u64.. {
                        if count >= min_writes && saves.load(Ordering::Relaxed) >= min_saves {
                            break;
                        }
                        // Xorshift (Marsaglia 2003). Half of the writes go to a few hot pages.
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let span = if random & 1 << 40 == 0 { PAGES } else { 24 };
                        let word = vcpu << 32 | count;
                        match random & 0xff << 50 {
                            0 => machine.host_write(tracker, random % span, word),
                            _ => _ = machine.write(tracker, random % span, word),
                        }
                    }
                })
            })
            .collect();
        let rebuilder = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for granule in [1 << 14, 1 << 21, 1 << 12] {
                    tracker.bitmap().rebuild(granule).unwrap();
                    thread::yield_now();
                }
            }
        });
        let mut round = 0;
        while vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
            round += 1;
            let saved = save(
                &machine,
                &tracker,
                &mut image,
                thread::yield_now,
                round % 3 == 0,
            );
            saves.fetch_add(saved.is_some().into(), Ordering::Relaxed);
        }
        done.store(true, Ordering::Relaxed);
        rebuilder.join().unwrap();
    });
    save(&machine, &tracker, &mut image, || (), false).unwrap();
    assert!(image == machine.words(), "a page is missing");
}
