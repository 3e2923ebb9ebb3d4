//! Writes full dumps, diffs, commits and merged images, durably, in comparison with the peers.
//! `RAMSNAP_BENCH_DIR` selects the file system. With `--test`, everything runs once and is small.

#![allow(
    unreachable_pub,
    reason = "modules that benchmarks share have public items"
)]

mod cases;

use atomic_file::{AtomicWriter, Durability};
use benches::place;
use cases::ram::{Content, Ram};
use cases::{Case, Dirty, Pattern, diff, full, recycled};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memory_image::Chain;
use memory_writer::MemoryWriter;

/// Returns whether to only check that everything runs.
fn is_smoke_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
}

fn gib(count: u64) -> u64 {
    if is_smoke_test() {
        count << 24
    } else {
        count << 30
    }
}

fn run(c: &mut Criterion, case: &Case<'_>) {
    let (place, file_system) = place().unwrap();
    let mut group = c.benchmark_group(format!("{}: {} on {file_system}", case.group, case.name));
    group
        .sample_size(10)
        .throughput(Throughput::Bytes(case.bytes));
    for (number, contender) in case.contenders.iter().enumerate() {
        group.bench_function(contender.name, |b| {
            b.iter_batched(
                || case.destination(place.path(), number),
                |dest| (contender.run)(&dest),
                criterion::BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Returns the RAM of each full dump.
fn rams(size: u64) -> [(&'static str, Ram); 4] {
    [
        ("random bytes", Ram::new(size, Content::Random)),
        ("half zero", Ram::new(size, Content::Zero(50))),
        ("95 % zero", Ram::new(size, Content::Zero(95))),
        ("95 % never touched", Ram::new(size, Content::Untouched(95))),
    ]
}

fn fulls(c: &mut Criterion) {
    let [random, half, zero, untouched] = rams(gib(1));
    run(c, &full(&random.1, random.0, MemoryWriter::options));
    for (name, ram) in [half, zero] {
        run(
            c,
            &full(&ram, name, || MemoryWriter::options().skip_zeros(true)),
        );
    }
    let skip = || {
        MemoryWriter::options()
            .skip_zeros(true)
            .skip_untouched(true)
    };
    run(c, &full(&untouched.1, untouched.0, skip));
    run(c, &recycled(&random.1, "random bytes, over the previous"));
}

fn diffs(c: &mut Criterion) {
    for size in [1, 8] {
        let ram = Ram::new(gib(size), Content::Random);
        for page in [4 << 10, 16 << 10] {
            for (share, one_in) in [("1 %", 100), ("10 %", 10)] {
                for pattern in [Pattern::Clustered, Pattern::Random] {
                    let dirty = Dirty::new(ram.size, page, one_in, pattern);
                    let name = format!("{share} of {size} GiB, {} KiB {pattern:?}", page >> 10);
                    run(c, &diff(&ram, &dirty, &name));
                }
            }
        }
    }
}

fn commits(c: &mut Criterion) {
    let (place, file_system) = place().unwrap();
    let dest = place.path().join("guest.mem");
    let mut group = c.benchmark_group(format!("commit 64 KiB on {file_system}"));
    for durability in [Durability::None, Durability::Barrier, Durability::Full] {
        group.bench_function(
            BenchmarkId::from_parameter(format!("{durability:?}")),
            |b| {
                b.iter(|| {
                    let options = AtomicWriter::options().durability(durability);
                    let writer = options.open(&dest).unwrap();
                    writer.write_all_at(&[7; 64 << 10], 0).unwrap();
                    writer.commit().unwrap();
                });
            },
        );
    }
    group.finish();
}

fn apply(c: &mut Criterion) {
    const PAGE: u64 = 16 << 10;
    let (place, file_system) = place().unwrap();
    let ram = Ram::new(gib(1), Content::Random);
    let path = |number: u64| place.path().join(format!("{number}.mem"));
    let mut writer = MemoryWriter::open(path(0), ram.size, PAGE).unwrap();
    writer.write_full(&ram.reader()).unwrap();
    writer.commit().unwrap();
    let dirty = Dirty::new(ram.size, PAGE, 100, Pattern::Random);
    for number in 1..=10 {
        let mut writer = MemoryWriter::open(path(number), ram.size, PAGE).unwrap();
        writer.write_diff(&ram.reader(), &dirty.ours).unwrap();
        writer.commit().unwrap();
    }
    let mut group = c.benchmark_group(format!("apply 10 diffs to 1 GiB on {file_system}"));
    group
        .sample_size(10)
        .throughput(Throughput::Bytes(ram.size));
    group.bench_function("flatten", |b| {
        b.iter(|| {
            let mut chain = Chain::open_raw(path(0), PAGE).unwrap();
            for number in 1..=10 {
                chain.push_raw(path(number)).unwrap();
            }
            chain.flatten(place.path().join("merged.mem")).unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, fulls, diffs, commits, apply);
criterion_main!(benches);
