//! How far a write has come, as two see it: the one that writes, and the one that finds what needn't be.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;

use crate::options::{Progress, Watch};

/// Counts the bytes that are done, and tells.
pub(crate) struct Meter<'w> {
    watch: RefCell<&'w mut Watch>,
    page_size: u64,
    bytes_total: u64,
    written: Cell<u64>,
    left_out: Cell<u64>,
    cancelled: Cell<bool>,
}

impl<'w> Meter<'w> {
    pub(crate) fn new(watch: &'w mut Watch, page_size: u64, bytes_total: u64) -> Self {
        Self {
            watch: RefCell::new(watch),
            page_size,
            bytes_total,
            written: Cell::new(0),
            left_out: Cell::new(0),
            cancelled: Cell::new(false),
        }
    }

    /// `bytes` were written so far.
    pub(crate) fn wrote(&self, bytes: u64) -> ControlFlow<()> {
        self.written.set(bytes);
        self.tell()
    }

    /// `bytes` more need not be written.
    pub(crate) fn left_out(&self, bytes: u64) -> ControlFlow<()> {
        if bytes == 0 {
            return ControlFlow::Continue(());
        }
        self.left_out.set(self.left_out.get() + bytes);
        self.tell()
    }

    /// Whether it was told to stop.
    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled.get()
    }

    fn tell(&self) -> ControlFlow<()> {
        let bytes_done = self.written.get() + self.left_out.get();
        let flow = self.watch.borrow_mut().tell(Progress {
            bytes_done,
            // A bitmap that is marked meanwhile may yield more than was counted.
            bytes_total: self.bytes_total.max(bytes_done),
            page_size: self.page_size,
        });
        self.cancelled.set(flow.is_break());
        flow
    }
}
