//! That each engine, asked for by name, writes the bytes that a naive writer would.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use scenarios::ram::{Stamped, first_difference};
use scenarios::target::Target;
use sparse_file::{Capabilities, Engine, RunSource, WriteError, WriteOptions, grow};

use super::Check;
use crate::finding::Family::Bytes;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Bytes, "written by io_uring", |fixture| {
        check(fixture, Engine::IoUring)
    }),
    Check::new(Bytes, "written by threads", |fixture| {
        check(fixture, Engine::Threads)
    }),
    Check::new(Bytes, "written by positioned writes", |fixture| {
        check(fixture, Engine::Pwrite)
    }),
    Check::new(Bytes, "written by the automatic engine", |fixture| {
        check(fixture, Engine::Auto)
    }),
];

/// A new engine needs a check of its own.
const _: () = assert!(CHECKS.len() == Engine::ALL.len());

/// With a tail that is no block.
const LEN: u64 = (4 << 20) + 1234;
/// An alignment of addresses that is enough for direct I/O everywhere.
const ALIGNMENT: usize = 64 << 10;

fn check(fixture: &Fixture, engine: Engine) -> anyhow::Result<Outcome> {
    let ram = Stamped::new(1, LEN).bytes(0..LEN);
    let (aligned, odd) = (Shifted::new(&ram, 0), Shifted::new(&ram, 1));
    let sources: [(&str, &dyn RunSource); 3] = [
        ("aligned memory", &aligned),
        ("misaligned memory", &odd),
        ("bytes that the source copies", &Read(&ram)),
    ];
    let shapes = [
        ("all of it", 1 << 20, vec![0..LEN]),
        ("scattered runs", 64 << 10, scattered()),
    ];
    let direct = match Capabilities::probe(&fixture.dir)?.direct_io {
        Some(_) => "there is direct I/O",
        None => "there is no direct I/O",
    };
    let expected = format!(
        "{} times the bytes of a simple writer, before and after a sync",
        sources.len() * shapes.len()
    );
    let path = fixture.path("vm.mem");
    for (shape, chunk, runs) in &shapes {
        let wanted = naive(&ram, runs);
        let options = WriteOptions::new().engine(engine).chunk_size(*chunk);
        for (kind, source) in sources {
            let found = match write(fixture.target, &path, runs, source, &options, &wanted) {
                Err(Failure::NotHere(why)) => {
                    return Ok(Outcome::not_run(format!("not available here: {why}")));
                }
                Err(Failure::Other(error)) => Some(format!("{error:#}")),
                Ok(differs) => differs.map(|at| format!("byte {at} differs")),
            };
            if let Some(wrong) = found {
                let seen = format!("{shape} from {kind}: {wrong}; {direct}");
                return Ok(Outcome::broken(expected, seen));
            }
        }
    }
    Ok(Outcome::holds(
        expected,
        format!("every byte correct; {direct}"),
    ))
}

/// Runs that begin and end anywhere, not in order, two of them overlapping, up to the end; more
/// than what goes through the page cache for being little.
fn scattered() -> Vec<Range<u64>> {
    let mut runs: Vec<_> = (0..40)
        .map(|n| n * 104_729 + 13)
        .map(|start| start..start + 40_009)
        .rev()
        .collect();
    runs.extend([5_000..60_000, LEN - 5000..LEN]);
    runs
}

/// One run after the other, over zeros.
fn naive(ram: &[u8], runs: &[Range<u64>]) -> Vec<u8> {
    let mut bytes = vec![0; ram.len()];
    for run in runs {
        let run = run.start as usize..run.end as usize;
        bytes[run.clone()].copy_from_slice(&ram[run]);
    }
    bytes
}

enum Failure {
    /// The engine, for this reason.
    NotHere(io::Error),
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// Writes a new file, and gives the first byte that is not as it should be.
fn write(
    target: Target,
    path: &Path,
    runs: &[Range<u64>],
    source: &dyn RunSource,
    options: &WriteOptions,
    wanted: &[u8],
) -> Result<Option<u64>, Failure> {
    let file = File::create(path)?;
    grow(&file, LEN)?;
    match target.runs(&file, runs, source, options) {
        Err(WriteError::Engine { source, .. }) => return Err(Failure::NotHere(source)),
        written => written?,
    };
    let differs = || -> io::Result<Option<u64>> {
        let file = File::open(path)?;
        if file.metadata()?.len() != LEN {
            return Ok(Some(file.metadata()?.len().min(LEN)));
        }
        first_difference(&file, 0..LEN, &wanted)
    };
    if let Some(at) = differs()? {
        return Ok(Some(at));
    }
    file.sync_all()?;
    Ok(differs()?)
}

/// Memory that begins `shift` bytes past an address that suits direct I/O.
struct Shifted {
    memory: Vec<u8>,
    range: Range<usize>,
}

impl Shifted {
    fn new(bytes: &[u8], shift: usize) -> Self {
        let mut memory = vec![0; bytes.len() + ALIGNMENT + shift];
        let start = memory.as_ptr().align_offset(ALIGNMENT) + shift;
        let range = start..start + bytes.len();
        memory[range.clone()].copy_from_slice(bytes);
        Self { memory, range }
    }
}

impl RunSource for Shifted {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.memory[self.range.clone()].read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<sparse_file::HostMemory<'_>> {
        self.memory[self.range.clone()].host_memory(offset, len)
    }
}

/// Bytes that have no address.
struct Read<'a>(&'a [u8]);

impl RunSource for Read<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
}
