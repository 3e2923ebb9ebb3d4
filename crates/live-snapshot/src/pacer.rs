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

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 reads of 5 ms each, and the first one at once.
    #[test]
    fn reads_take_at_least_the_time_of_their_rate() {
        let (pacer, token) = (Pacer::new(Some(1 << 20)), CancelToken::new());
        let began = Instant::now();
        for _ in 0..5 {
            pacer.wait((1 << 20) / 200, &token).unwrap();
        }
        assert!(began.elapsed() >= Duration::from_millis(19));
    }

    #[test]
    fn idle_time_does_not_count() {
        let (pacer, token) = (Pacer::new(Some(1 << 20)), CancelToken::new());
        pacer.wait(10, &token).unwrap();
        thread::sleep(Duration::from_millis(5));
        pacer.wait((1 << 20) / 100, &token).unwrap();
        let next = pacer.next.lock().unwrap().unwrap();
        assert!(next.saturating_duration_since(Instant::now()) <= Duration::from_millis(10));
        let began = Instant::now();
        pacer.wait(1, &token).unwrap();
        assert!(Instant::now() >= next && began.elapsed() <= Duration::from_mins(1));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let (pacer, token) = (Pacer::new(None), CancelToken::new());
        pacer.wait(usize::MAX, &token).unwrap();
        assert!(pacer.next.lock().unwrap().is_none());
        token.cancel();
        let error = pacer.wait(1, &token).unwrap_err();
        assert_eq!(error.to_string(), "the live snapshot was cancelled");
    }

    /// The read would wait for an hour.
    #[test]
    fn cancellation_ends_a_wait() {
        let (pacer, token) = (Pacer::new(Some(1)), CancelToken::new());
        pacer.wait(3600, &token).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| pacer.wait(1, &token));
            token.cancel();
            waiting.join().unwrap().unwrap_err();
        });
    }

    #[test]
    fn memory_is_exposed_only_at_an_unlimited_rate() {
        let (ram, token) = (vec![7; 4096], CancelToken::new());
        let (unlimited, limited) = (Pacer::new(None), Pacer::new(Some(1 << 40)));
        let paced = Paced::new(&ram[..], &unlimited, &token);
        assert_eq!(
            paced.host_memory(96, 4000).map(|memory| memory.len()),
            Some(4000)
        );
        assert_eq!(paced.known_size(), ram[..].known_size());
        let slow = Paced::new(&ram[..], &limited, &token);
        assert!(slow.host_memory(0, 4096).is_none());
        let mut bytes = [0; 3];
        slow.read_at(5, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 3]);
        token.cancel();
        assert!(paced.host_memory(0, 4096).is_none());
        assert!(paced.read_at(0, &mut bytes).is_err());
    }
}
