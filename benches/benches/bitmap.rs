//! Marks and walks a dirty bitmap, in comparison with squib-snapshot.

use std::hint::black_box;
use std::time::Instant;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dirty_bitmap::DirtyBitmap;
use random::Random;

const PAGE: u64 = 4096;

fn mark(c: &mut Criterion) {
    const PAGES: u64 = (1 << 30) / PAGE;
    const MARKS: usize = 1 << 16;
    let mut random = Random::seeded(3);
    let addresses: Vec<u64> = (0..MARKS).map(|_| random.number() % PAGES * PAGE).collect();
    let ours = DirtyBitmap::new(0, PAGES * PAGE, PAGE).unwrap();
    let squib = squib_snapshot::DirtyBitmap::new(0, PAGES * PAGE, PAGE).unwrap();

    let mut group = c.benchmark_group("mark 1 GiB at random");
    group.throughput(Throughput::Elements(MARKS as u64));
    let mark_ours = || {
        addresses
            .iter()
            .for_each(|address| _ = black_box(ours.mark(*address)))
    };
    let mark_squib = || {
        addresses
            .iter()
            .for_each(|address| _ = black_box(squib.set_dirty(*address)))
    };
    let each = BatchSize::PerIteration;
    group.bench_function("clean pages/dirty-bitmap", |b| {
        b.iter_batched(|| drop(ours.drain()), |()| mark_ours(), each);
    });
    group.bench_function("clean pages/squib-snapshot", |b| {
        b.iter_batched(|| drop(squib.drain()), |()| mark_squib(), each);
    });
    group.bench_function("dirty pages/dirty-bitmap", |b| b.iter(mark_ours));
    group.bench_function("dirty pages/squib-snapshot", |b| b.iter(mark_squib));
    group.finish();
}

fn walk(c: &mut Criterion) {
    // With `--test` nothing is timed, and marking half of 1 TiB takes 20 s.
    let tests = std::env::args().any(|argument| argument == "--test");
    let ram: u64 = if tests { 1 << 34 } else { 1 << 40 };
    let mut group = c.benchmark_group("walk 1 TiB");
    group.sample_size(10);
    for (share, dirty) in [
        ("clean", 0),
        ("0.01 %", ram / PAGE / 10_000),
        ("1 %", ram / PAGE / 100),
        ("50 %", ram / PAGE / 2),
    ] {
        let ours = DirtyBitmap::new(0, ram, PAGE).unwrap();
        let squib = squib_snapshot::DirtyBitmap::new(0, ram, PAGE).unwrap();
        let mut random = Random::seeded(4);
        for _ in 0..dirty {
            let page = random.number() % (ram / PAGE);
            ours.mark_page(page).unwrap();
            squib.set_dirty_by_index(page);
        }
        group.bench_function(BenchmarkId::new("dirty-bitmap", share), |b| {
            b.iter(|| ours.runs().map(|run| run.end - run.start).sum::<u64>());
        });
        // Walks as its own writer does: one query for each page.
        group.bench_function(BenchmarkId::new("squib-snapshot", share), |b| {
            b.iter(|| {
                (0..ram / PAGE)
                    .filter(|page| squib.is_dirty_by_index(*page))
                    .count()
            });
        });
    }
    group.finish();
}

/// Measures the part of a pause that depends on the bitmap: an epoch begins, and is extended, with
/// a few dirty pages.
fn epoch(c: &mut Criterion) {
    const DIRTY: u64 = 1000;
    let mut group = c.benchmark_group("take 1,000 marks out");
    for (name, ram) in [("1 GiB", 1 << 30), ("1 TiB", 1_u64 << 40)] {
        let ours = DirtyBitmap::new(0, ram, PAGE).unwrap();
        let squib = squib_snapshot::DirtyBitmap::new(0, ram, PAGE).unwrap();
        let mut random = Random::seeded(5);
        let pages: Vec<u64> = (0..DIRTY).map(|_| random.number() % (ram / PAGE)).collect();
        let mark = || {
            pages
                .iter()
                .for_each(|page| _ = ours.mark_page(*page).unwrap())
        };
        group.bench_function(BenchmarkId::new("begin_epoch", name), |b| {
            b.iter_custom(|times| {
                let once = |_| {
                    mark();
                    let start = Instant::now();
                    let epoch = black_box(ours.begin_epoch().unwrap());
                    let taken = start.elapsed();
                    epoch.release().unwrap();
                    taken
                };
                (0..times).map(once).sum()
            });
        });
        group.bench_function(BenchmarkId::new("extend", name), |b| {
            b.iter_custom(|times| {
                let mut epoch = ours.begin_epoch().unwrap();
                let once = |_| {
                    mark();
                    let start = Instant::now();
                    let _ = black_box(epoch.extend().unwrap());
                    start.elapsed()
                };
                (0..times).map(once).sum()
            });
        });
        group.bench_function(BenchmarkId::new("squib-snapshot", name), |b| {
            let mark = || {
                pages
                    .iter()
                    .for_each(|page| _ = squib.set_dirty_by_index(*page))
            };
            b.iter_custom(|times| {
                let once = |_| {
                    mark();
                    let start = Instant::now();
                    let taken = black_box(squib.drain());
                    let time = start.elapsed();
                    drop(taken);
                    time
                };
                (0..times).map(once).sum()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, mark, walk, epoch);
criterion_main!(benches);
