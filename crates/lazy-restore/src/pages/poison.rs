//! Pages that are not filled from the images: discarded, unreadable, or filled by something else.

use std::ops::Range;

use nix::errno::Errno;

use super::{Pages, fill_error};
use crate::counters::FillReason;
use crate::error::LazyError;
use crate::ledger::{Ledger, Role};
use crate::memory::Memory;
use crate::pause::Pause;
use crate::target::Target;
use crate::userfaultfd::UserfaultfdError;

impl Pages {
    /// Handles a fault on a page that is not filled from the images: a page that was discarded,
    /// which is zeros now; a page that was filled after the fault was received; or a page outside
    /// the guest's RAM, by which its mapping has grown.
    pub(crate) fn handle_settled(&self, address: u64, page: Option<u64>) -> Result<(), LazyError> {
        let mut pause = Pause::default();
        loop {
            let ledger = self.ledger.lock();
            let is_inaccessible = page.is_some_and(|page| ledger.inaccessible.contains(&page));
            let stop = match is_inaccessible {
                true => Some(Errno::EEXIST),
                false => self.fault.zero(address, self.page_size).stop,
            };
            drop(ledger);
            match stop {
                Some(Errno::EAGAIN) => self.let_changes_continue(Role::Handler, &mut pause)?,
                None => return Ok(()),
                // The page is present, or no longer registered: the access continues.
                Some(Errno::EEXIST | Errno::ENOENT) => {
                    let woken = self.fault.wake(address, self.page_size);
                    return woken.map_err(|errno| fill_error(page.unwrap_or_default(), errno));
                }
                Some(errno) => return Err(fill_error(page.unwrap_or_default(), errno)),
            }
        }
    }

    /// Handles a page that `error` has prevented from being filled: records the error and poisons
    /// the page.
    ///
    /// # Errors
    /// Returns the error if filling must end because of it.
    pub(crate) fn give_up(&self, page: Range<u64>, error: LazyError) -> Result<(), LazyError> {
        if self.target.must_end(&error) {
            return Err(error);
        }
        self.status.record_error(error);
        self.poison(page)
    }

    /// Makes accesses to a page that cannot be filled fail, instead of waiting forever or finding
    /// zeros.
    pub(crate) fn poison(&self, page: Range<u64>) -> Result<(), LazyError> {
        let mut pause = Pause::default();
        loop {
            let mut ledger = self.ledger.lock();
            let Some((address, _)) = self.regions().parts(page.clone()).next() else {
                return Ok(());
            };
            if self.settled.contains(page.start) {
                drop(ledger);
                return self.handle_settled(address, Some(page.start));
            }
            let stop = match self.can_poison {
                true => self.fault.poison(address, self.page_size).stop,
                // As if something were in its place.
                false => Some(Errno::EEXIST),
            };
            match stop {
                None => {
                    self.counters
                        .add_filled(FillReason::Poisoned, self.page_size);
                    ledger.inaccessible.insert(page.start);
                    self.settled.add(page);
                    return Ok(());
                }
                Some(Errno::EAGAIN) => {
                    drop(ledger);
                    self.let_changes_continue(Role::Handler, &mut pause)?;
                }
                Some(Errno::EEXIST) => {
                    return match &self.target {
                        Target::Own(memory) => {
                            self.make_inaccessible(memory, &mut ledger, page.start)
                        }
                        Target::Peer(_) => {
                            let offset = page.start;
                            Err(UserfaultfdError::NotPoisoned { offset }.into())
                        }
                    };
                }
                Some(errno) => return Err(fill_error(page.start, errno)),
            }
        }
    }

    /// Makes one page inaccessible, regardless of its content, and wakes accesses that wait for it.
    pub(super) fn make_inaccessible(
        &self,
        memory: &Memory,
        ledger: &mut Ledger,
        page: u64,
    ) -> Result<(), LazyError> {
        let failed = |errno| fill_error(page, errno);
        memory
            .make_inaccessible(page..page + self.page_size)
            .map_err(failed)?;
        ledger.inaccessible.insert(page);
        self.settled.add(page..page + self.page_size);
        let mut parts = self.regions().parts(page..page + self.page_size);
        parts.try_for_each(|(address, _)| self.fault.wake(address, self.page_size).map_err(failed))
    }
}
