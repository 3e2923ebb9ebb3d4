//! A VM whose RAM is being filled.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use memory_image::Progress;

use super::Vms;
use super::refused::{Reaction, VmProcess};
use crate::error::LazyError;
use crate::filling::Filling;
use crate::working_set::WorkingSet;

/// A VM whose RAM is being filled by a [`PageServer`](super::PageServer).
///
/// Dropping it before it has ended makes the missing pages of the VM fail, as
/// [`on_failure`](super::PageServerOptions::on_failure) decides.
#[derive(Debug)]
#[must_use = "the VM is ended when this is dropped"]
pub struct ServedVm {
    filling: Filling,
    process: VmProcess,
    vms: Arc<Vms>,
    end: OnceLock<VmEnd>,
}

/// The way in which serving a VM has ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum VmEnd {
    /// All of its RAM is filled or poisoned, and it no longer needs the server.
    Filled,
    /// Its process has exited.
    Exited,
    /// It could not be served any longer, and was killed or notified.
    Failed(Arc<LazyError>),
}

impl ServedVm {
    pub(super) fn new(filling: Filling, process: VmProcess, vms: Arc<Vms>) -> Self {
        vms.served.fetch_add(1, Ordering::Relaxed);
        Self {
            filling,
            process,
            vms,
            end: OnceLock::new(),
        }
    }

    /// Returns the process that has connected.
    #[must_use]
    pub fn process(&self) -> &VmProcess {
        &self.process
    }

    /// Returns what was done to the process because it can no longer be served.
    #[must_use]
    pub fn reaction(&self) -> Option<Reaction> {
        self.filling.pages().status().reaction()
    }

    /// Returns the progress of filling: the bytes of the images that are in the RAM, and the total.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.filling.progress()
    }

    /// Returns the number of handled faults.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.filling.faults()
    }

    /// Returns the first error since the start, after which some page was not filled.
    #[must_use]
    pub fn error(&self) -> Option<&LazyError> {
        self.filling.pages().status().failure().map(Arc::as_ref)
    }

    /// Returns the pages touched so far, in the order of their first touch, or `None` without
    /// [`record`](super::PageServerOptions::record).
    #[must_use]
    pub fn recorded(&self) -> Option<WorkingSet> {
        self.filling.recorded()
    }

    /// Fills all pages, if they are not being filled in the background, and waits until this has
    /// ended. The fill stays incomplete if the VM ends.
    pub fn complete(&self) {
        // The error, if any, is that of `wait`.
        let _ = self.filling.wait_with(&mut |_| ControlFlow::Continue(()));
    }

    /// Waits until the RAM is filled, or the VM has ended otherwise. Without prefetching, the RAM
    /// is only filled by [`complete`](Self::complete), which another thread may call meanwhile.
    pub fn wait(&self) -> VmEnd {
        self.end.get_or_init(|| self.join()).clone()
    }

    fn join(&self) -> VmEnd {
        self.filling.join();
        let status = self.filling.pages().status();
        let (end, number) = match status.failure() {
            Some(error) if status.is_aborted() => {
                (VmEnd::Failed(Arc::clone(error)), &self.vms.failed)
            }
            _ if status.has_exited() => (VmEnd::Exited, &self.vms.exited),
            Some(error) if !status.is_filled() => {
                (VmEnd::Failed(Arc::clone(error)), &self.vms.failed)
            }
            _ => (VmEnd::Filled, &self.vms.filled),
        };
        number.fetch_add(1, Ordering::Relaxed);
        self.vms.served.fetch_sub(1, Ordering::Relaxed);
        end
    }
}

impl Drop for ServedVm {
    fn drop(&mut self) {
        let pages = Arc::clone(self.filling.pages());
        let status = pages.status();
        if self.end.get().is_none() && !status.is_finished() {
            pages.revoke();
        }
        self.filling.stop();
        self.wait();
    }
}
