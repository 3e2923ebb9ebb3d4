//! The end of filling the memory of another process.
//!
//! Its missing pages must not become zeros, which they are once the last duplicate of the
//! userfaultfd is closed. The process is therefore killed, or its missing pages are poisoned.

use nix::errno::Errno;

use super::Pages;
use crate::error::LazyError;
use crate::ledger::Role;
use crate::pause::Pause;
use crate::peer::Peer;
use crate::server::Reaction;
use crate::userfaultfd::UserfaultfdError;

impl Pages {
    pub(super) fn abort_peer(&self, why: LazyError) {
        if !self.status.is_aborted() && (self.peer_has_exited() || why.is_of_exit()) {
            return self.end_with_peer();
        }
        // Another thread may have found a reason at the same time, or the process was killed.
        if self.status.begin_abort() {
            self.status.record_error(why);
            self.revoke();
            self.status.end_prefetch();
            self.status.stop_handler();
        }
    }

    fn peer_has_exited(&self) -> bool {
        match &self.target {
            super::Target::Own(_) => false,
            super::Target::Peer(peer) => peer.process.has_exited(),
        }
    }

    /// Ends filling because the process that owns the memory has exited.
    pub(crate) fn end_with_peer(&self) {
        self.status.set_exited();
        self.stop_filling();
        self.status.end_prefetch();
        self.status.stop_handler();
    }

    /// Kills the process, or makes accesses to all of its missing pages fail.
    pub(super) fn revoke_peer(&self, peer: &Peer) {
        let why = match self.status.failure() {
            Some(error) => error.to_string(),
            None => "the server ends before all pages are in memory".to_owned(),
        };
        let reaction = peer.end(&why);
        self.status.set_reaction(reaction);
        if reaction == Reaction::Killed {
            return;
        }
        let poisoned = match self.can_poison {
            true => self.poison_missing(),
            false => Err(UserfaultfdError::NotPoisoned { offset: 0 }.into()),
        };
        match poisoned {
            Ok(()) => self.unregister_all(),
            Err(error) if error.is_of_exit() => {}
            Err(error) => {
                self.status.record_error(error);
                self.leave_open();
            }
        }
    }

    fn poison_missing(&self) -> Result<(), LazyError> {
        for range in self.mapped() {
            let mut rest = range;
            let mut pause = Pause::default();
            while let Some(missing) = self.settled.first_missing(rest.clone()) {
                let ledger = self.ledger.lock();
                let Some((address, part)) = self.regions().parts(missing.clone()).next() else {
                    break;
                };
                let poisoned = self.fault.poison(address, part.end - part.start);
                let done = part.start + poisoned.bytes;
                self.settled.add(part.start..done);
                drop(ledger);
                rest.start = done;
                match poisoned.stop {
                    None => {}
                    Some(Errno::EAGAIN) => {
                        self.let_changes_continue(Role::Handler, &mut pause)?;
                    }
                    // A page that is not missing has the bytes of its owner.
                    Some(Errno::EEXIST) => {
                        self.settled.add(done..done + self.page_size);
                        rest.start += self.page_size;
                    }
                    Some(errno) => return Err(super::fill_error(done, errno)),
                }
            }
        }
        Ok(())
    }
}
