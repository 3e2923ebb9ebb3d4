//! Guests for which this process is the machine: threads as vCPUs, and one as a device, on memory
//! with real write faults.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use dirty_bitmap::Policy;
use guests::embedded::Watch;
use guests::guest::{Ram, Tracker};
use page_reader::{HostMemory, PageReader};
use random::Random;
use write_faults::{Memory, Mprotect, Userfaultfd};

use super::saved_guest::{SavedGuest, Stop};

const WORD: u64 = 8;
const PAGE: u64 = 4096;

/// What a thread writes in one go, and how long it then idles: more, and the saves would get no
/// processor.
const BURST: u64 = 24;
const IDLE: Duration = Duration::from_micros(400);

/// Pages that are written again and again.
const HOT: u64 = 24;

/// RAM in pieces, one after another in the memory file.
struct Pieces(Vec<Piece>);

struct Piece {
    range: Range<u64>,
    memory: Arc<Memory>,
    /// What a device writes to.
    file: Option<File>,
}

impl Pieces {
    fn piece(&self, offset: u64) -> Option<&Piece> {
        self.0.iter().find(|piece| piece.range.contains(&offset))
    }

    fn store(&self, offset: u64, word: u64) {
        if let Some(piece) = self.piece(offset) {
            piece.memory.store(offset - piece.range.start, word);
        }
    }

    fn size(&self) -> u64 {
        self.0.last().map_or(0, |piece| piece.range.end)
    }
}

impl PageReader for Pieces {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let memory = self.host_memory(at, rest.len());
            let memory = memory.ok_or(io::ErrorKind::UnexpectedEof)?;
            let (now, later) = rest.split_at_mut(memory.len());
            memory.copy_to(now);
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let piece = self.piece(offset)?;
        piece.memory.host_memory(offset - piece.range.start, len)
    }
}

/// The mechanism that detects writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Guarded {
    Userfaultfd,
    Mprotect,
}

/// Threads that write to their memory.
pub(super) struct Writers {
    memory: Arc<Pieces>,
    vcpus: Vec<Vcpu>,
    device: Option<Random>,
}

/// Writers whose writes are tracked.
struct Tracked {
    // First: it ends while the memory is there.
    tracker: Arc<dyn Tracker>,
    writers: Writers,
}

/// A thread's own state.
struct Vcpu {
    random: Random,
    /// The page written last by sequential writes.
    cursor: u64,
    /// What is written next: no word is written twice, so stale ones show.
    value: u64,
}

impl Writers {
    pub(super) fn new(
        sizes: impl IntoIterator<Item = u64>,
        device: bool,
        threads: u64,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let mut pieces: Vec<Piece> = Vec::new();
        for size in sizes {
            let start = pieces.last().map_or(0, |piece| piece.range.end);
            let (memory, file) = if device {
                let (memory, file) = Memory::shared(size)?;
                (memory, Some(file))
            } else {
                (Memory::new(size)?, None)
            };
            pieces.push(Piece {
                range: start..start + size,
                memory: Arc::new(memory),
                file,
            });
        }
        let vcpu = |thread: u64| Vcpu {
            random: Random::seeded(seed.wrapping_add(thread)),
            cursor: 0,
            value: (thread + 1) << 56,
        };
        Ok(Self {
            memory: Arc::new(Pieces(pieces)),
            vcpus: (0..threads).map(vcpu).collect(),
            device: device.then(|| Random::seeded(seed.wrapping_add(threads))),
        })
    }

    pub(super) fn track(
        self,
        by: Guarded,
        page: u64,
        policy: Policy,
    ) -> anyhow::Result<impl SavedGuest + use<>> {
        let size = self.memory.size();
        let tracker: Arc<dyn Tracker> = match by {
            Guarded::Userfaultfd => {
                let protection = Userfaultfd::new(&self.memory, size, 2)?;
                Arc::new(Watch::new(size, page, policy, protection)?)
            }
            Guarded::Mprotect => {
                let piece = self.memory.0.first().context("there is RAM")?;
                let protection = Mprotect::new(&piece.memory);
                Arc::new(Watch::new(size, page, policy, protection)?)
            }
        };
        Ok(Tracked {
            tracker,
            writers: self,
        })
    }
}

impl Vcpu {
    /// One write: mostly a word, now and then a page, or a page of zeros.
    fn write(&mut self, memory: &Pieces) {
        let pages = memory.size() / PAGE;
        let page = match self.random.below(16) {
            0..9 => self.random.below(HOT.min(pages)),
            9..13 => {
                self.cursor = (self.cursor + 1) % pages;
                self.cursor
            }
            _ => self.random.below(pages),
        };
        let start = page * PAGE;
        self.value += 1;
        match self.random.below(24) {
            0 => (start..start + PAGE)
                .step_by(WORD as usize)
                .for_each(|at| memory.store(at, 0)),
            1..4 => (start..start + PAGE)
                .step_by(WORD as usize)
                .for_each(|at| memory.store(at, self.value)),
            _ => {
                let word = self.random.below(PAGE / WORD);
                memory.store(start + word * WORD, self.value);
            }
        }
    }

    fn work(&mut self, memory: &Pieces, stop: &AtomicBool) {
        // Once at least, however late it gets a processor.
        loop {
            (0..BURST).for_each(|_| self.write(memory));
            if stop.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(IDLE);
        }
    }
}

/// Writes to the memory's file, which causes no fault, and then marks the written pages.
fn device(
    random: &mut Random,
    memory: &Pieces,
    tracker: &dyn Tracker,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let offset = random.below(memory.size());
        let piece = memory.piece(offset).context("it is in the RAM")?;
        let file = piece.file.as_ref().context("the memory is a file")?;
        let len = (1 + random.below(6000)).min(piece.range.end - offset);
        let bytes = vec![random.below(256) as u8; len as usize];
        file.write_all_at(&bytes, offset - piece.range.start)?;
        tracker.dirty().mark_range(offset, len)?;
        thread::sleep(2 * IDLE);
    }
    Ok(())
}

impl SavedGuest for Tracked {
    fn ram(&self) -> Ram {
        Ram::new(Arc::clone(&self.writers.memory))
    }

    fn tracker(&self) -> Arc<dyn Tracker> {
        Arc::clone(&self.tracker)
    }

    fn run(&mut self, work: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let stop = AtomicBool::new(false);
        let (stop, tracker) = (&stop, &*self.tracker);
        let Writers {
            memory,
            vcpus,
            device: random,
        } = &mut self.writers;
        let memory = &**memory;
        thread::scope(|scope| {
            for vcpu in vcpus {
                scope.spawn(move || vcpu.work(memory, stop));
            }
            let device = random
                .as_mut()
                .map(|random| scope.spawn(move || device(random, memory, tracker, stop)));
            let done = {
                let _stop = Stop(stop);
                work()
            };
            if let Some(device) = device {
                let ran = device.join();
                ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            done
        })
    }
}
