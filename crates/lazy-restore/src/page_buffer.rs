//! The buffer of a thread that fills pages, and the time that its reads took.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use host_memory::SecretBuffer;

use crate::ram_source::RamSource;

/// A buffer for bytes of the source.
pub(crate) struct PageBuffer {
    bytes: SecretBuffer,
    read_time: Duration,
}

impl PageBuffer {
    pub(crate) fn new() -> Self {
        Self {
            bytes: SecretBuffer::new(),
            read_time: Duration::ZERO,
        }
    }

    /// Reads the bytes of a range, whose rest past `ram_end` is zeros.
    pub(crate) fn read(
        &mut self,
        source: &dyn RamSource,
        range: Range<u64>,
        ram_end: u64,
    ) -> io::Result<&[u8]> {
        let started = Instant::now();
        let bytes = self.bytes.sized((range.end - range.start) as usize);
        let (stored, past_the_ram) = bytes.split_at_mut((ram_end - range.start) as usize);
        past_the_ram.fill(0);
        let read = source.read_at(range.start, stored);
        self.read_time += started.elapsed();
        read.map(|()| &*bytes)
    }

    /// Returns the time that reads took since the last call.
    pub(crate) fn take_read_time(&mut self) -> Duration {
        std::mem::take(&mut self.read_time)
    }
}
