//! Compares writing memory directly to a file with reading it into the writer's buffer first.
//!
//! `cargo run --release -p ramsnap-sparse-file --example copy_or_direct -- [DIRECTORY] [MIB]`

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sparse_file::{Engine, RunSource, WriteOptions, grow, write_runs};

/// The same bytes without their addresses.
struct Copied<'a>(&'a [u8]);

impl RunSource for Copied<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: usize = match args.next() {
        Some(mib) => mib.to_string_lossy().parse()?,
        None => 256,
    };
    let ram: Vec<u8> = (0..mib << 20).map(|at| (at >> 12) as u8 | 1).collect();
    let time = |source: &dyn RunSource| -> Result<Duration, Box<dyn std::error::Error>> {
        let file = tempfile::tempfile_in(&dir)?;
        grow(&file, ram.len() as u64)?;
        let start = Instant::now();
        let all = std::iter::once(0..ram.len() as u64);
        let options = WriteOptions::new().engine(Engine::Pwrite);
        write_runs(&file, all, source, &options, &mut |_| {
            ControlFlow::Continue(())
        })?;
        Ok(start.elapsed())
    };
    let copied = Copied(&ram);
    let direct = Direct(&ram);
    let (mut straight, mut copy) = (Vec::new(), Vec::new());
    // Alternate, so that both see the same state of the machine.
    for _ in 0..9 {
        straight.push(time(&direct)?);
        copy.push(time(&copied)?);
    }
    straight.sort();
    copy.sort();
    println!(
        "{mib} MiB buffered, medians of 9: straight {:?}, copied {:?}",
        straight[4], copy[4]
    );
    Ok(())
}

/// A sized wrapper, because a slice cannot be a trait object.
struct Direct<'a>(&'a [u8]);

impl RunSource for Direct<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<sparse_file::HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }
}
