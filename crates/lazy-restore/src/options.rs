//! Options of lazily filled RAM.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::working_set::WorkingSet;

/// Options for filling RAM on demand, created by [`LazyRam::options`](crate::LazyRam::options).
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `start` or `adopt`"]
pub struct LazyRamOptions {
    pub(crate) prefetch: bool,
    pub(crate) working_set: Option<WorkingSet>,
    pub(crate) record: bool,
    pub(crate) fault_around: u64,
    /// Whether to use the kernel's page poisoning.
    pub(crate) poison: bool,
    pub(crate) userfaultfd: Option<Arc<OwnedFd>>,
}

impl Default for LazyRamOptions {
    fn default() -> Self {
        Self {
            prefetch: true,
            working_set: None,
            record: false,
            fault_around: 64 << 10,
            poison: true,
            userfaultfd: None,
        }
    }
}

impl LazyRamOptions {
    /// Sets whether to prefetch all pages while the guest runs. The default is true. With false, a
    /// page is read when it is touched, and [`LazyRam::wait`](crate::LazyRam::wait) reads the
    /// others.
    pub fn prefetch(mut self, prefetch: bool) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets the pages to read first, in this order. Pages of the set that are zeros and not in the
    /// images are filled up to the number of bytes that the images store. The others become zeros
    /// when they are touched.
    pub fn working_set(mut self, working_set: WorkingSet) -> Self {
        self.working_set = Some(working_set);
        self
    }

    /// Sets whether to [record](crate::LazyRam::recorded) touched pages. Recording disables
    /// prefetching, and every page faults separately. This makes the start slow: record once for
    /// an image, so that later starts are faster.
    pub fn record(mut self, record: bool) -> Self {
        self.record = record;
        self
    }

    /// Sets the descriptor to use, for a process that may not open a userfaultfd: an open
    /// `/dev/userfaultfd` that a privileged process has passed, or a userfaultfd that this process
    /// opened before it gave up its privileges. [`available`](crate::available) returns whether the
    /// process needs one.
    ///
    /// The device may be used for any number of guests, a userfaultfd for one guest at a time. A
    /// descriptor that cannot be used is [`UserfaultfdError::Passed`](crate::UserfaultfdError) at
    /// the start, among them a userfaultfd that another process has opened: it would receive the
    /// faults of that process. A userfaultfd that this process has opened must have the features
    /// [`EVENT_REMAP`](uffd::Features::EVENT_REMAP),
    /// [`EVENT_REMOVE`](uffd::Features::EVENT_REMOVE) and
    /// [`EVENT_UNMAP`](uffd::Features::EVENT_UNMAP). See
    /// [`UserfaultfdOptions::adopt`](uffd::UserfaultfdOptions::adopt).
    ///
    /// # Examples
    /// ```
    /// use std::fs::File;
    ///
    /// use lazy_restore::{LazyRam, SizedReader};
    /// # if !test_machine::Need::Userfaultfd.met("the example of userfaultfd") { return Ok(()); }
    /// # let Ok(_) = File::open("/dev/userfaultfd") else { return Ok(()); };
    ///
    /// // As a privileged process opens it, and passes it over a Unix socket.
    /// let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    ///
    /// let options = LazyRam::options().userfaultfd(device.into());
    /// let ram = options.start(SizedReader::new(vec![7; 1 << 20], 1 << 20))?;
    /// ram.wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn userfaultfd(mut self, descriptor: OwnedFd) -> Self {
        self.userfaultfd = Some(Arc::new(descriptor));
        self
    }

    /// Sets the maximum number of bytes that one fault reads. The range is aligned to its length.
    /// The number is rounded to a power of two of at least one page. The default is 64 KiB.
    pub fn fault_around(mut self, bytes: u64) -> Self {
        self.fault_around = bytes;
        self
    }
}
