//! Synthetic traces, which are the same in every run.

use random::Random;

use super::trace::{Kind, Trace};

/// The page size of Apple silicon.
const PAGE: u64 = 16 << 10;
const RAM: u64 = 1 << 30;
const PAGES: u32 = (RAM / PAGE) as u32;
/// The number of pages in 1 MiB.
const MIB: u32 = (1 << 20) / PAGE as u32;
const INTERVALS: u32 = 64;

/// Returns a number below `bound`.
fn below(random: &mut Random, bound: u32) -> u32 {
    random.below(bound.into()) as u32
}

/// Returns a skewed number below `bound`: three quarters of the numbers are in the lowest quarter,
/// recursively.
fn skewed(random: &mut Random, mut bound: u32) -> u32 {
    while bound > 64 && random.below(4) != 0 {
        bound /= 4;
    }
    below(random, bound)
}

fn shuffle(random: &mut Random, pages: &mut [u32]) {
    for at in (1..pages.len()).rev() {
        pages.swap(at, below(random, at as u32 + 1) as usize);
    }
}

fn trace(
    name: &str,
    kind: Kind,
    about: &str,
    mut interval: impl FnMut(&mut Random, u32) -> Vec<u32>,
) -> Trace {
    let mut random = Random::seeded(1);
    Trace {
        name: name.into(),
        about: about.into(),
        kind,
        page_size: PAGE,
        pages: PAGES,
        intervals: (0..INTERVALS).map(|at| interval(&mut random, at)).collect(),
    }
}

/// Returns `len` pages from `start` on, which wrap around at the end of the RAM.
fn run(start: u32, len: u32) -> impl Iterator<Item = u32> {
    (start..start + len).map(|page| page % PAGES)
}

pub(crate) fn all() -> Vec<Trace> {
    vec![uniform(), sequential(), hot_set(), database(), booting()]
}

fn uniform() -> Trace {
    let about = "6,000 random writes in 1 GiB";
    trace("uniform", Kind::Plain, about, |random, _| {
        (0..6000).map(|_| below(random, PAGES)).collect()
    })
}

fn sequential() -> Trace {
    let about = "192 MiB in sequence, continuing after the last interval";
    trace("sequential", Kind::Plain, about, |_, at| {
        run(at * 192 * MIB % PAGES, 192 * MIB).collect()
    })
}

fn hot_set() -> Trace {
    let about = "all of 48 MiB in random order, and 1,500 writes anywhere";
    trace("hot set", Kind::Mixed, about, |random, _| {
        // Six pieces of 8 MiB.
        let hot = (0..6).flat_map(|piece| run(piece * 170 * MIB, 8 * MIB));
        let mut pages: Vec<u32> = hot.collect();
        pages.extend((0..1500).map(|_| below(random, PAGES)));
        shuffle(random, &mut pages);
        pages
    })
}

fn database() -> Trace {
    let about = "a log of 24 MiB in a ring of 128 MiB, 4,000 skewed updates of a 640 MiB tree, \
                 16 MiB of buffers; every 16th interval rewrites 96 MiB";
    trace("database", Kind::Mixed, about, |random, at| {
        let ring = (0..24 * MIB).map(|page| (at * 24 * MIB + page) % (128 * MIB));
        let mut log: Vec<u32> = ring.collect();
        let tree = 128 * MIB;
        let buffers = 800 * MIB;
        let mut others: Vec<u32> = (0..4000)
            .map(|_| {
                // Hot leaves are spread over the whole tree.
                let leaf = skewed(random, 640 * MIB);
                tree + (leaf * 40_503) % (640 * MIB)
            })
            .chain(run(buffers, 16 * MIB))
            .collect();
        shuffle(random, &mut others);
        if at % 16 == 15 {
            log.extend(run(880 * MIB, 96 * MIB));
        }
        // The writes to the log are interleaved with the updates.
        let mut pages = Vec::new();
        let mut log = log.into_iter();
        for other in others {
            pages.push(other);
            pages.extend(log.next());
        }
        pages.extend(log);
        pages
    })
}

fn booting() -> Trace {
    let about = "for 24 intervals, 30 MiB of new memory in sequence and 400 skewed writes to \
                 earlier memory; then only 400 skewed writes and a heap of 8 MiB";
    trace("freshly booted", Kind::Mixed, about, |random, at| {
        let touched = (at * 30 * MIB).min(24 * 30 * MIB);
        let mut pages: Vec<u32> = match at {
            0..24 => run(touched, 30 * MIB).collect(),
            _ => run(64 * MIB, 8 * MIB).collect(),
        };
        if touched > 0 {
            let scattered = (0..400).map(|_| skewed(random, touched) * 17 % touched);
            pages.extend(scattered);
        }
        pages
    })
}
