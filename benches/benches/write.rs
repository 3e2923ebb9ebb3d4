//! Full dumps and diffs, to durable, beside squib-snapshot's. `MEMSNAP_BENCH_DIR` chooses the file system.

use benches::{place, ram, scattered};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dirty_bitmap::DirtyBitmap;
use memory_writer::MemoryWriter;
use squib_snapshot::{MemoryWriter as SquibWriter, VecPageReader};

const RAM: u64 = 256 << 20;
const PAGE: u64 = 4096;

fn full(c: &mut Criterion) {
    let (place, file_system) = place().unwrap();
    let (ram, dest) = (ram(RAM as usize), place.path().join("guest.mem"));
    let squib = VecPageReader::new(ram.clone());

    let mut group = c.benchmark_group(format!("full 256 MiB random on {file_system}"));
    group.sample_size(10).throughput(Throughput::Bytes(RAM));
    group.bench_function("memory-writer", |b| {
        b.iter(|| {
            let mut writer = MemoryWriter::open(&dest, RAM, PAGE).unwrap();
            writer.write_full(&ram).unwrap();
            writer.commit().unwrap();
        });
    });
    group.bench_function("squib-snapshot", |b| {
        b.iter(|| {
            let mut writer = SquibWriter::open(&dest, RAM, PAGE).unwrap();
            writer.write_full(&squib).unwrap();
            writer.commit().unwrap();
        });
    });
    group.finish();
}

fn diff(c: &mut Criterion) {
    let (place, file_system) = place().unwrap();
    let (ram, dest) = (ram(RAM as usize), place.path().join("guest.mem"));
    let squib = VecPageReader::new(ram.clone());
    let dirty_pages = RAM / PAGE / 100;

    let mut group = c.benchmark_group(format!("diff 1 % of 256 MiB on {file_system}"));
    group
        .sample_size(20)
        .throughput(Throughput::Bytes(dirty_pages * PAGE));
    for (pattern, pages) in [
        ("clustered", (1000..1000 + dirty_pages).collect()),
        ("random", scattered(dirty_pages, RAM / PAGE)),
    ] {
        let ours = DirtyBitmap::new(0, RAM, PAGE).unwrap();
        let theirs = squib_snapshot::DirtyBitmap::new(0, RAM, PAGE).unwrap();
        for page in pages {
            ours.set_dirty_by_index(page).unwrap();
            theirs.set_dirty_by_index(page);
        }
        group.bench_function(BenchmarkId::new("memory-writer", pattern), |b| {
            b.iter(|| {
                let mut writer = MemoryWriter::open(&dest, RAM, PAGE).unwrap();
                writer.write_diff(&ram, &ours).unwrap();
                writer.commit().unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("squib-snapshot", pattern), |b| {
            b.iter(|| {
                let mut writer = SquibWriter::open(&dest, RAM, PAGE).unwrap();
                writer.write_diff(&squib, &theirs).unwrap();
                writer.commit().unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, full, diff);
criterion_main!(benches);
