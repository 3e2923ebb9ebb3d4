//! The threads that fill memory: of this process, or of another one.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host_memory::BlockedSignals;
use memory_image::{Progress, ProgressFn};

use crate::error::{LazyError, WaitError};
use crate::fault_handler::PageFaultHandler;
use crate::ledger::locked;
use crate::pages::Pages;
use crate::prefetcher::Prefetcher;
use crate::trace;
use crate::userfaultfd::UserfaultfdError;
use crate::working_set::WorkingSet;

/// The interval at which a wait for the prefetcher reports progress.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// The name of the thread that prefetches.
pub(crate) const PREFETCHER: &str = "lazy-ram-ahead";

/// Pages, and the threads that fill them.
#[derive(Debug)]
pub(crate) struct Filling {
    pages: Arc<Pages>,
    handler: Arc<PageFaultHandler>,
    pub(crate) prefetcher: Arc<Prefetcher>,
    /// The threads of both.
    pub(crate) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Filling {
    /// Returns the pages with their handler and prefetcher, none of which runs yet.
    pub(crate) fn new(
        pages: Arc<Pages>,
        handler: PageFaultHandler,
        prefetcher: Prefetcher,
    ) -> Self {
        Self {
            pages,
            handler: Arc::new(handler),
            prefetcher: Arc::new(prefetcher),
            threads: Mutex::default(),
        }
    }

    /// Starts `handlers` threads that handle faults, and the prefetcher if `prefetching`.
    pub(crate) fn start(&self, handlers: usize, prefetching: bool) -> Result<(), LazyError> {
        trace::started(self.pages.memory_size(), prefetching);
        for _ in 0..handlers {
            let handler = Arc::clone(&self.handler);
            self.spawn("lazy-ram-faults", move || handler.run())?;
        }
        if prefetching {
            let (pages, handler) = (Arc::clone(&self.pages), Arc::clone(&self.handler));
            let prefetcher = Arc::clone(&self.prefetcher);
            self.spawn(PREFETCHER, move || {
                let _ = prefetcher.run(&mut || ControlFlow::Continue(()));
                report_filled(&pages, &handler);
            })?;
        }
        Ok(())
    }

    pub(crate) fn spawn(
        &self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), LazyError> {
        let pages = Arc::clone(&self.pages);
        let thread = thread::Builder::new().name(name.into());
        // A handler that touches a missing page would wait for the thread that it has interrupted.
        let blocked = BlockedSignals::new();
        let thread = thread.spawn(move || {
            let _guard = AbortOnPanic(&pages);
            work();
        });
        drop(blocked);
        locked(&self.threads).push(thread.map_err(UserfaultfdError::Thread)?);
        Ok(())
    }

    pub(crate) fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress::new(self.pages.loaded(), self.prefetcher.stored_bytes())
    }

    pub(crate) fn faults(&self) -> u64 {
        self.handler.faults()
    }

    pub(crate) fn recorded(&self) -> Option<WorkingSet> {
        self.handler.recorded()
    }

    /// Waits until all pages are in memory, and reads them if no thread prefetches.
    pub(crate) fn wait_with(&self, progress: &mut ProgressFn<'_>) -> Result<(), WaitError> {
        let status = self.pages.status();
        let mut report = || progress(self.progress());
        loop {
            if report().is_break() {
                return Err(WaitError::Cancelled);
            }
            if status.begin_prefetch() && self.prefetch(&mut report).is_break() {
                return Err(WaitError::Cancelled);
            }
            if status.wait(REPORT_INTERVAL) {
                return match status.failure() {
                    Some(error) => Err(WaitError::Fill(Arc::clone(error))),
                    None => Ok(()),
                };
            }
        }
    }

    /// Reads all pages on a thread that handles no signals. A signal handler that touched a missing
    /// page would wait for a lock that its own thread holds.
    fn prefetch(&self, report: &mut (dyn FnMut() -> ControlFlow<()> + Send)) -> ControlFlow<()> {
        let mut fill = || {
            let _guard = AbortOnPanic(&self.pages);
            let flow = self.prefetcher.run(report);
            report_filled(&self.pages, &self.handler);
            flow
        };
        let mut blocked = Some(BlockedSignals::new());
        let filled = thread::scope(|scope| {
            let thread = thread::Builder::new().name(PREFETCHER.into());
            let thread = thread.spawn_scoped(scope, &mut fill).ok()?;
            blocked = None;
            // The panic is one of the prefetcher, which has aborted the filling, or of `report`.
            Some(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        });
        // Without another thread, this one handles signals later.
        let flow = filled.unwrap_or_else(fill);
        drop(blocked);
        flow
    }

    /// Waits until the threads have ended by themselves.
    pub(crate) fn join(&self) {
        for thread in locked(&self.threads).drain(..) {
            // The panic, if any, was reported as an error.
            _ = thread.join();
        }
    }

    /// Stops the threads.
    pub(crate) fn stop(&self) {
        let status = self.pages.status();
        status.stop_prefetch();
        status.stop_handler();
        self.join();
    }
}

/// Reports the totals as an event once all pages are in memory.
fn report_filled(pages: &Pages, handler: &PageFaultHandler) {
    if !pages.status().is_finished() {
        return;
    }
    let by_faults = pages.loaded_by_faults();
    let by_prefetch = pages.loaded().saturating_sub(by_faults);
    trace::filled(handler.faults(), by_faults, by_prefetch, pages.elapsed());
}

/// Aborts filling on drop if the thread panics, to unblock waiting accesses.
struct AbortOnPanic<'p>(&'p Pages);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let panicked = io::Error::other("a thread panicked");
            self.0.abort(UserfaultfdError::Thread(panicked).into());
        }
    }
}
