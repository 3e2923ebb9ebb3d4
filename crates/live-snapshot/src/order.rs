//! The order in which the pages of a capture are written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use host_memory::SecretBuffer;
use memory_writer::PageRun;

use crate::capture::Capture;

/// The runs of all of the RAM, a chunk at a time: chunks with pages in the pool first, because a
/// vCPU may wait for room, and otherwise ascending.
///
/// A chunk is complete before the next one begins. Its checksum is computed while it is written.
pub(crate) struct Order {
    capture: Arc<Capture>,
    ram_size: u64,
    next_chunk: u64,
    /// The rest of the current chunk.
    runs: VecDeque<PageRun>,
    /// For the bytes of pages that may be zeros, if those are looked for.
    zeros: Option<SecretBuffer>,
}

impl Order {
    pub(crate) fn new(capture: &Arc<Capture>, ram_size: u64) -> Self {
        Self {
            capture: Arc::clone(capture),
            ram_size,
            next_chunk: 0,
            runs: VecDeque::new(),
            zeros: None,
        }
    }

    /// Looks for pages of zeros, for a full image: they are returned as zeros.
    pub(crate) fn find_zeros(mut self) -> Self {
        self.zeros = Some(SecretBuffer::new());
        self
    }

    /// Returns only the runs of pages that the image has.
    pub(crate) fn data(self) -> impl Iterator<Item = Range<u64>> {
        self.filter_map(|run| match run {
            PageRun::Data(run) => Some(run),
            PageRun::Zeros(_) => None,
        })
    }

    /// Returns the next chunk that was not returned before.
    fn chunk(&mut self) -> Option<Range<u64>> {
        let size = self.capture.chunk_size();
        let range = |chunk: u64| chunk * size..self.ram_size.min((chunk + 1) * size);
        if let Some(chunk) = self.capture.pool().next_chunk() {
            return Some(range(chunk));
        }
        loop {
            let chunk = self.next_chunk;
            if chunk * size >= self.ram_size {
                // A chunk may have got its first page in the pool meanwhile.
                return self.capture.pool().next_chunk().map(range);
            }
            self.next_chunk += 1;
            if self.capture.pool().list(chunk) {
                return Some(range(chunk));
            }
        }
    }
}

impl Iterator for Order {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        while self.runs.is_empty() {
            let chunk = self.chunk()?;
            let mut at = chunk.start;
            for needed in self.capture.needed(chunk.clone()) {
                let zeros = match &mut self.zeros {
                    Some(buffer) => self.capture.free_zeros(needed.clone(), buffer),
                    None => Vec::new(),
                };
                let mut from = needed.start;
                // The data between the zeros.
                let ends = zeros.into_iter().chain([needed.end..needed.end]);
                for zeros in ends {
                    if from < zeros.start {
                        push_zeros(&mut self.runs, at..from);
                        self.runs.push_back(PageRun::Data(from..zeros.start));
                        at = zeros.start;
                    }
                    from = zeros.end;
                }
            }
            push_zeros(&mut self.runs, at..chunk.end);
        }
        self.runs.pop_front()
    }
}

fn push_zeros(runs: &mut VecDeque<PageRun>, zeros: Range<u64>) {
    if !zeros.is_empty() {
        runs.push_back(PageRun::Zeros(zeros));
    }
}
