//! Saves by another process, which is killed at any moment.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use atomic_file::{AtomicGroup, AtomicWriter};
use dirty_bitmap::DirtyBitmap;
use harness::interrupt::Interrupt;
use harness::process::Process;
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use page_reader::FileReader;
use serde::{Deserialize, Serialize};

/// What the process is to save.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// A copy of the RAM.
    pub ram: PathBuf,
    pub size: u64,
    pub page: u64,
    pub dirty: Vec<Range<u64>>,
    pub regions: Vec<Range<u64>>,
    pub parent: Option<[u8; 16]>,
    pub dest: PathBuf,
    /// A file that is committed with it, and what is to be in there.
    pub state: PathBuf,
    pub says: String,
    /// Sealed, or raw.
    pub sealed: bool,
}

/// Bytes of a write, between pauses: time to be killed in.
const UNHURRIED: usize = 16 << 10;

/// What the process says when it begins to write.
const BEGUN: &str = "begun\n";

/// In the process: saves what the file `order` says, slowly enough to be killed on the way.
pub(super) fn save(order: &Path) -> anyhow::Result<()> {
    let order: Order = serde_json::from_slice(&fs::read(order)?)?;
    let dirty = DirtyBitmap::new(0, order.size, 4096)?;
    for run in &order.dirty {
        dirty.mark_range(run.start, run.end - run.start)?;
    }
    let mut options = MemoryWriter::options()
        .allow_ambiguous_diff(true)
        .chunk_size(UNHURRIED)
        .progress(|_| {
            thread::sleep(Duration::from_micros(50));
            std::ops::ControlFlow::Continue(())
        });
    if order.sealed {
        let seal = Seal::new().regions(order.regions);
        options = options.layout(Layout::Sealed).seal(match order.parent {
            Some(parent) => seal.parent(ImageId::from_bytes(parent)),
            None => seal.on_raw_image(),
        });
    }
    let mut writer = options.open(&order.dest, order.size, order.page)?;
    print!("{BEGUN}");
    std::io::stdout().flush()?;
    writer.write_diff(&FileReader::new(File::open(&order.ram)?), &dirty)?;
    let mut state = AtomicWriter::open(&order.state)?;
    state.write_all(order.says.as_bytes())?;
    let mut group = AtomicGroup::new();
    group.add(writer.finish()?)?;
    group.add(state)?;
    Ok(group.commit()?)
}

/// Has `program` carry out the order that is written to `file`, and kills it after so long; it may
/// have ended by then.
pub(super) fn save_and_kill(
    program: &Path,
    order: &Order,
    file: &Path,
    after: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    fs::write(file, serde_json::to_vec(order)?)?;
    let mut command = Command::new(program);
    command.arg("--child").arg(file);
    let mut process = Process::start(command, interrupt)?;
    let line = process.next(Duration::from_secs(60))?;
    ensure!(
        line.as_deref() == Some(BEGUN),
        "another process could not begin to save"
    );
    thread::sleep(after);
    process.kill();
    // All of its output, so that nothing waits for it any more.
    while process
        .next(Duration::from_secs(60))
        .context("after the kill")?
        .is_some()
    {}
    Ok(())
}
