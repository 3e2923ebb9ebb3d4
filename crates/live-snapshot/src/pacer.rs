//! The rate limit of reads, and their cancellation.

use std::io;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use memory_writer::CancelToken;
use page_reader::{HostMemory, PageReader, PopulatedRanges, RamLayout};

/// The longest sleep without a look at the token.
const MAX_SLEEP: Duration = Duration::from_millis(20);

/// Delays reads so that they do not exceed a rate.
#[derive(Debug)]
pub(crate) struct Pacer {
    bytes_per_second: Option<u64>,
    /// The time at which the next read may begin.
    next: Mutex<Option<Instant>>,
}

impl Pacer {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second,
            next: Mutex::new(None),
        }
    }

    /// Waits until `bytes` may be read.
    pub(crate) fn wait(&self, bytes: usize, cancel: &CancelToken) -> io::Result<()> {
        if cancel.is_cancelled() {
            return Err(cancelled());
        }
        let Some(rate) = self.bytes_per_second else {
            return Ok(());
        };
        let due = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let due = next.unwrap_or_else(Instant::now).max(Instant::now());
            *next = Some(due + Duration::from_secs_f64(bytes as f64 / rate as f64));
            due
        };
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if cancel.is_cancelled() {
                return Err(cancelled());
            }
            thread::sleep(left.min(MAX_SLEEP));
        }
    }
}

fn cancelled() -> io::Error {
    io::Error::other("the live snapshot was cancelled")
}

/// A reader that is read at a limited rate, and can be cancelled.
pub(crate) struct Paced<'p, R> {
    reader: R,
    pacer: &'p Pacer,
    cancel: &'p CancelToken,
}

impl<'p, R: PageReader> Paced<'p, R> {
    pub(crate) fn new(reader: R, pacer: &'p Pacer, cancel: &'p CancelToken) -> Self {
        Self {
            reader,
            pacer,
            cancel,
        }
    }
}

impl<R: PageReader> PageReader for Paced<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.pacer.wait(buf.len(), self.cancel)?;
        self.reader.read_at(offset, buf)
    }

    /// Exposes memory only at an unlimited rate.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        match self.pacer.bytes_per_second {
            None if !self.cancel.is_cancelled() => self.reader.host_memory(offset, len),
            None | Some(_) => None,
        }
    }

    fn populated(&self, range: std::ops::Range<u64>) -> PopulatedRanges<'_> {
        self.reader.populated(range)
    }

    fn check_source(&self) -> io::Result<()> {
        self.reader.check_source()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.reader.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        self.reader.known_size()
    }
}
