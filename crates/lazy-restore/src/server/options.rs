//! Options of a page server.

use std::sync::Arc;
use std::time::Duration;

use super::PageServer;
use crate::error::LazyError;
use crate::peer::{OnDamage, OnFailure};
use crate::ram_source::RamSource;
use crate::working_set::WorkingSet;

/// Options of a page server, created by [`PageServer::options`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `source`"]
pub struct PageServerOptions {
    pub(super) prefetch: bool,
    pub(super) working_set: Option<WorkingSet>,
    pub(super) record: bool,
    pub(super) fault_around: u64,
    pub(super) handlers: usize,
    pub(super) handshake_limit: Duration,
    pub(super) on_failure: OnFailure,
    pub(super) on_damage: OnDamage,
}

impl Default for PageServerOptions {
    fn default() -> Self {
        Self {
            prefetch: true,
            working_set: None,
            record: false,
            fault_around: 16 << 10,
            handlers: 4,
            handshake_limit: Duration::from_secs(30),
            on_failure: OnFailure::default(),
            on_damage: OnDamage::default(),
        }
    }
}

impl PageServerOptions {
    /// Sets whether to fill all pages in the background. The default is true. With false, a page is
    /// filled when it is touched.
    pub fn prefetch(mut self, prefetch: bool) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets the pages to fill first, in this order.
    pub fn working_set(mut self, working_set: WorkingSet) -> Self {
        self.working_set = Some(working_set);
        self
    }

    /// Sets whether to [record](super::ServedVm::recorded) touched pages. As for
    /// [`LazyRamOptions::record`](crate::LazyRamOptions::record), this disables prefetching, and
    /// every page faults separately.
    pub fn record(mut self, record: bool) -> Self {
        self.record = record;
        self
    }

    /// Sets the maximum number of bytes that one fault reads, or one page if that is larger. The
    /// default is 16 KiB: the next fault of the VM waits while more neighbors are filled.
    pub fn fault_around(mut self, bytes: u64) -> Self {
        self.fault_around = bytes;
        self
    }

    /// Sets how many faults of one VM are handled at the same time. The default is 4. 0 is taken as
    /// 1.
    pub fn handlers(mut self, handlers: usize) -> Self {
        self.handlers = handlers.max(1);
        self
    }

    /// Sets how long to wait for the message of a client. The default is 30 seconds.
    pub fn handshake_limit(mut self, limit: Duration) -> Self {
        self.handshake_limit = limit;
        self
    }

    /// Sets what happens to a VMM that can no longer be served. The default is to kill it.
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// Sets what happens if pages of the source cannot be read. The default is to poison them.
    pub fn on_damage(mut self, on_damage: OnDamage) -> Self {
        self.on_damage = on_damage;
        self
    }

    pub(super) fn prefetches(&self) -> bool {
        self.prefetch && !self.record
    }

    /// Creates a server that fills RAM from `source`, such as an
    /// [`VerifiedChain`](memory_image::VerifiedChain).
    ///
    /// # Errors
    /// Returns a [`LazyError`] if the source has no RAM, is not complete, or was changed, or if the
    /// working set is that of another guest.
    pub fn source(&self, source: impl RamSource + 'static) -> Result<PageServer, LazyError> {
        let checked = source.check_complete().and_then(|()| source.check_source());
        checked.map_err(LazyError::of_source)?;
        let image = match source.ram_size() {
            0 => return Err(LazyError::NoRam),
            size => size,
        };
        let ram_size = self.working_set.as_ref().map(WorkingSet::ram_size);
        if let Some(working_set) = ram_size.filter(|size| *size != image) {
            return Err(LazyError::WorkingSetSize { image, working_set });
        }
        Ok(PageServer {
            source: Arc::new(source),
            options: self.clone(),
            counters: Arc::default(),
            vms: Arc::default(),
        })
    }
}
