//! Starts simulated guests on an unmerged chain: mapped, and filled on demand, without and with a
//! recorded working set.
//!
//! `cargo run --release -p ramsnap-lazy-restore --example lazy_restore [MIB]`

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    linux::run()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("LazyRam needs Linux: on this system a chain is mapped (MappedChain) or restored");
}

#[cfg(target_os = "linux")]
mod linux {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::Instant;

    use dirty_bitmap::DirtyBitmap;
    use lazy_restore::{LazyRam, WorkingSet};
    use memory_image::{Chain, MappedChain};
    use memory_writer::{Durability, MemoryWriter};
    use page_reader::PageReader;

    type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

    const PAGE: u64 = 4096;
    /// Pages that a guest touches until it has done its task.
    const TOUCHED: u64 = 500;

    pub(super) fn run() -> Result<()> {
        let mib = std::env::args()
            .nth(1)
            .map_or(Ok(256), |mib| mib.parse::<u64>())?;
        let dir = tempfile::tempdir()?;
        let snapshots = take_snapshots(dir.path(), mib << 20)?;
        let open = || -> Result<Chain> {
            let mut chain = Chain::open_raw(&snapshots[0], PAGE)?;
            for diff in &snapshots[1..] {
                chain.push_raw(diff)?;
            }
            Ok(chain)
        };
        let chain = Arc::new(open()?);
        println!("a chain of {} images over {mib} MiB", chain.len());

        let begun = Instant::now();
        let mapped = MappedChain::open(&chain)?;
        touch(&mapped, 0..1)?;
        println!(
            "mapped: the first page after {:?}; {} MiB mapped, {} copied",
            begun.elapsed(),
            mapped.mapped() >> 20,
            mapped.copied() >> 20
        );

        let begun = Instant::now();
        let ram = LazyRam::options().start(Arc::clone(&chain))?;
        touch(&ram, 0..1)?;
        let first = begun.elapsed();
        touch(&ram, 1..TOUCHED)?;
        let faults = ram.faults();
        let useful = begun.elapsed();
        ram.wait()?;
        println!(
            "filled on demand: the first page after {first:?}, {TOUCHED} pages after {useful:?} \
             and {faults} faults, all of {} MiB after {:?}",
            ram.progress().done >> 20,
            begun.elapsed()
        );

        let set = dir.path().join("working.set");
        let ram = LazyRam::options().record(true).start(Arc::clone(&chain))?;
        touch(&ram, 0..TOUCHED)?;
        ram.recorded().save(&set)?;
        println!("recorded: {} KiB touched", ram.recorded().bytes() >> 10);

        let begun = Instant::now();
        let working_set = WorkingSet::load(&set)?;
        let ram = LazyRam::options().working_set(working_set).start(chain)?;
        touch(&ram, 0..TOUCHED)?;
        println!(
            "with the working set first: {TOUCHED} pages after {:?} and {} faults",
            begun.elapsed(),
            ram.faults()
        );
        Ok(())
    }

    /// Touches scattered bytes as a guest would.
    fn touch(ram: &impl PageReader, steps: std::ops::Range<u64>) -> Result<()> {
        let pages = ram.host_memory(0, usize::MAX).ok_or("no memory")?.len() as u64 / PAGE;
        for step in steps {
            let page = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages;
            ram.read_at(page * PAGE, &mut [0])?;
        }
        Ok(())
    }

    /// Takes a full snapshot and nine diffs of scattered runs of pages.
    fn take_snapshots(dir: &Path, size: u64) -> Result<Vec<PathBuf>> {
        let ram = vec![7; size as usize];
        let mut snapshots = Vec::new();
        for number in 0..10 {
            let path = dir.join(format!("{number}.mem"));
            let options = MemoryWriter::options().durability(Durability::None);
            let mut writer = options.open(&path, size, PAGE)?;
            if number == 0 {
                writer.write_full(&ram)?;
            } else {
                let dirty = DirtyBitmap::new(0, size, PAGE)?;
                for run in 0..100_u64 {
                    let at = (run * 10 + number).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                        % (size - (64 << 10));
                    dirty.mark_range(at, 16 << 10)?;
                }
                writer.write_diff(&ram, &dirty)?;
            }
            writer.commit()?;
            snapshots.push(path);
        }
        Ok(snapshots)
    }
}
