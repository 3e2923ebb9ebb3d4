//! How a tracker is started.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, RwLock};
use std::thread;

use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection, WriteTracker};
use host_memory::BlockedSignals;
use page_reader::PageReader;
use uffd::{AdoptError, Features, Userfaultfd};

use super::{Memory, UffdTracker};
use crate::linux::handler::Shared;
use crate::linux::pagemap::Pagemap;
use crate::linux::protection::UffdProtection;
use crate::linux::tracker_error::UffdTrackerError;
use crate::slot::CopyOnWrite;

/// Options for a [`UffdTracker`], created by [`UffdTracker::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `start`"]
pub struct UffdTrackerOptions {
    page_size: Option<u64>,
    policy: Option<Policy>,
    userfaultfd: Option<Arc<OwnedFd>>,
}

impl UffdTrackerOptions {
    /// Sets the size of a tracked page in bytes: the page size of the memory, or a multiple of it.
    /// The default is the page size of the host. Memory on hugetlbfs needs the size of its pages.
    pub fn page_size(mut self, bytes: u64) -> Self {
        self.page_size = Some(bytes);
        self
    }

    /// Sets how much a write fault unprotects. The default is [`Policy::default`].
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Sets the descriptor to use, for a process that may not open a userfaultfd: an open
    /// `/dev/userfaultfd` that a privileged process has passed, or a userfaultfd that this process
    /// opened before it gave up its privileges. See
    /// [`UserfaultfdOptions::adopt`](uffd::UserfaultfdOptions::adopt).
    ///
    /// The device may be used for any number of guests, a userfaultfd for one guest at a time. The
    /// latter must have the features
    /// [`PAGEFAULT_FLAG_WP`](uffd::Features::PAGEFAULT_FLAG_WP),
    /// [`WP_HUGETLBFS_SHMEM`](uffd::Features::WP_HUGETLBFS_SHMEM) and
    /// [`WP_UNPOPULATED`](uffd::Features::WP_UNPOPULATED).
    ///
    /// A process that has changed its user since it was started must also be allowed to open
    /// `/proc/self/pagemap`: `prctl(PR_SET_DUMPABLE, 1)`.
    pub fn userfaultfd(mut self, descriptor: OwnedFd) -> Self {
        self.userfaultfd = Some(Arc::new(descriptor));
        self
    }

    /// Starts to track the writes to all of the RAM. No page is protected yet, and all are marked.
    ///
    /// # Errors
    /// Returns [`UffdTrackerError`].
    pub fn start<M>(&self, memory: &Arc<M>) -> Result<UffdTracker, UffdTrackerError>
    where
        M: PageReader + Send + Sync + 'static,
    {
        let ram_size = memory.known_size().ok_or(UffdTrackerError::UnknownSize)?;
        let host_page = host_page_size().map_err(UffdTrackerError::Pagemap)?;
        let page_size = self.page_size.unwrap_or(host_page);
        let bitmap = Arc::new(TrackedBitmap::tracked(0, ram_size, page_size)?);
        let tracker = WriteTracker::new(bitmap, self.policy.unwrap_or_default())?;
        let fault = open_userfaultfd(self.userfaultfd.as_deref())?;
        let protection = UffdProtection::register(fault, &**memory, ram_size)?;
        // Memory in huge pages refuses a part of a page.
        let first = 0..page_size;
        protection
            .protect(first.clone())
            .and_then(|()| protection.unprotect(first))
            .map_err(|source| UffdTrackerError::PageSize { page_size, source })?;
        let shared = Arc::new(Shared {
            tracker,
            protection: CopyOnWrite::new(protection),
            faults: RwLock::new(()),
            failed: Mutex::new(None),
        });
        let pagemap = Pagemap::open(host_page).map_err(UffdTrackerError::Pagemap)?;
        let (closed, hang_up) = io::pipe().map_err(UffdTrackerError::Thread)?;
        let handler = Arc::clone(&shared);
        // A handler of a signal that writes the RAM on this thread would wait for itself.
        let blocked = BlockedSignals::new();
        let thread = thread::Builder::new()
            .name("write-faults".into())
            .spawn(move || handler.handle_faults(&closed))
            .map_err(UffdTrackerError::Thread)?;
        drop(blocked);
        Ok(UffdTracker {
            shared,
            pagemap,
            discards: RwLock::new(()),
            hang_up: Some(hang_up),
            thread: Some(thread),
            memory: Memory(Arc::clone(memory) as _),
        })
    }
}

/// Opens a userfaultfd for write protection, or uses one that the caller has passed.
pub(super) fn open_userfaultfd(passed: Option<&OwnedFd>) -> Result<Userfaultfd, UffdTrackerError> {
    let features =
        Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED;
    let options = Userfaultfd::options().features(features);
    match passed {
        Some(passed) => {
            let passed = passed.try_clone().map_err(AdoptError::Unchecked)?;
            Ok(options.adopt(passed)?)
        }
        None => Ok(options.open()?),
    }
}

/// Returns the page size of the host in bytes.
pub(super) fn host_page_size() -> io::Result<u64> {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
    let size = size.and_then(|size| u64::try_from(size).ok());
    size.ok_or_else(|| io::Error::other("the page size of the host is not known"))
}
