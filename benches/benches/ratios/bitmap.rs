//! Marks and walks dirty bitmaps.

use std::hint::black_box;
use std::time::Instant;

use dirty_bitmap::DirtyBitmap;
use figures::report;
use random::Random;

use crate::cases::{OURS, SQUIB};
use crate::{Comparison, named, named_goals};

impl Comparison<'_> {
    /// Compares marking and walking, without files.
    pub fn bitmap(&mut self) {
        const PAGE: u64 = 4096;
        let size = 1024 * self.gib;
        let pages = size / PAGE;
        for (what, one_in, goal) in [
            ("1 % random", 100, 25.0),
            ("0.01 % random", 10_000, 300.0),
            ("clean", u64::MAX, 10_000.0),
            ("half", 2, 0.0),
        ] {
            let name = format!("walk a bitmap of 1 TiB, {what}");
            if !self.wants(&name) {
                continue;
            }
            let ours = DirtyBitmap::new(0, size, PAGE).unwrap();
            let squib = squib_snapshot::DirtyBitmap::new(0, size, PAGE).unwrap();
            let mut random = Random::seeded(4);
            for _ in 0..pages / one_in {
                let page = random.number() % pages;
                ours.mark_page(page).unwrap();
                squib.set_dirty_by_index(page);
            }
            let walk_ours = || {
                let bytes: u64 = ours.runs().map(|run| run.end - run.start).sum();
                black_box(bytes);
            };
            // Walks as its own writer does: one query for each page.
            let walk_squib = || {
                let dirty = (0..pages).filter(|page| squib.is_dirty_by_index(*page));
                black_box(dirty.count());
            };
            self.run_in_turns(&name, goal, &walk_ours, &walk_squib);
        }
        let size = self.gib;
        let ours = DirtyBitmap::new(0, size, PAGE).unwrap();
        let squib = squib_snapshot::DirtyBitmap::new(0, size, PAGE).unwrap();
        let mut random = Random::seeded(3);
        let addresses: Vec<u64> = (0..1 << 20)
            .map(|_| random.number() % (size / PAGE) * PAGE)
            .collect();
        let in_threads = |threads: usize, mark: &(dyn Fn(u64) + Sync)| {
            std::thread::scope(|scope| {
                for part in addresses.chunks(addresses.len() / threads) {
                    scope.spawn(move || part.iter().for_each(|address| mark(*address)));
                }
            });
        };
        for threads in [1, 2] {
            let name = format!("mark a million pages at random, threads: {threads}");
            if self.wants(&name) {
                let mark_ours = || {
                    in_threads(threads, &|address| {
                        black_box(ours.mark(address).unwrap());
                    })
                };
                let mark_squib = || {
                    in_threads(threads, &|address| {
                        black_box(squib.set_dirty(address));
                    })
                };
                self.run_in_turns(&name, 1.0, &mark_ours, &mark_squib);
            }
        }
    }

    fn run_in_turns(&mut self, name: &str, goal: f64, ours: &dyn Fn(), squib: &dyn Fn()) {
        let mut seconds = vec![Vec::new(); 2];
        for round in 0..=self.rounds {
            for (number, run) in [ours, squib].into_iter().enumerate() {
                let start = Instant::now();
                run();
                if round > 0 {
                    seconds[number].push(start.elapsed().as_secs_f64());
                }
            }
        }
        let goals = [(SQUIB, goal)];
        let found = report::Case {
            name: name.into(),
            group: "bitmap".into(),
            bytes: 0,
            contenders: named([OURS, SQUIB].into_iter(), seconds),
            goals: named_goals(if goal > 0.0 { &goals } else { &[] }),
        };
        self.record(found);
    }
}
