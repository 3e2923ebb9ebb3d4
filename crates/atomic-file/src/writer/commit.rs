//! Committing a writer.

use std::io;

use super::AtomicWriter;
use crate::attribute::NotPreserved;
use crate::destination::{Destination, check_kind_again};
use crate::durability::Durability;
use crate::error::{CommitError, CommitStep, Leftover};
use crate::locked_file::LockedFile;
use crate::preserve;
use crate::records::list;
use crate::recover::recover_pending_for;
use crate::recycle;
use crate::rename::PublishError;
use crate::staged_file::{STAGED_MODE, StagedFile};
use crate::version::FileVersion;
use crate::{sys, trace};

impl AtomicWriter {
    /// Syncs the file, renames it onto the destination, and syncs the directory.
    ///
    /// [`Durability`] selects which syncs take place. If several writers commit to one destination,
    /// the last one wins. Waits while a group that includes the destination is being completed.
    /// Empty files are committed like any other.
    ///
    /// # Order
    /// 1. The bytes are synced while the file has mode 0600. This step is omitted if the file keeps
    ///    that mode and no attributes are preserved.
    /// 2. The mode and the attributes are set, and the file is synced.
    /// 3. The name of the staged file is checked. Interrupted groups that include the destination
    ///    are recovered.
    /// 4. The old file is locked, if it will be recycled or must be a certain
    ///    [version](crate::AtomicWriterOptions::replace_only). The version is compared, as before
    ///    step 1. A device, FIFO or socket that is at the destination by now is refused.
    /// 5. The staged file is renamed onto the destination. If the old file will be recycled, the
    ///    two names are exchanged.
    /// 6. The locks are released. Groups that were published during steps 3 to 5 are recovered.
    /// 7. The directory is synced, with [`Durability::Full`].
    /// 8. The old file gets the name of a recycled file, if it will be recycled.
    ///
    /// If the process is killed, the destination is the old file before step 5, and the new file
    /// after it. If the power fails, it is either of the two between steps 5 and 7, and the new
    /// file after step 7. Before step 5, the staged file may remain in both cases. The
    /// [crate](crate#what-may-be-on-the-medium-after-a-crash) describes what is left in the
    /// directory.
    ///
    /// # Errors
    /// Returns a [`CommitError`] that states which of the two files the destination is now. It is
    /// never a mixture.
    pub fn commit(self) -> Result<(), CommitError> {
        // Check before the sync, which can take long.
        let changed = |version: &FileVersion| version.is_at(&self.dest).is_ok_and(|is| !is);
        if self.replace_only.as_ref().is_some_and(changed) {
            return Err(destination_changed(self.staged, self.dest));
        }
        let finished = self.finish(self.durability);
        let Self {
            mut staged,
            dest,
            mode: _,
            preserve: _,
            not_preserved: _,
            durability,
            no_clobber,
            replace_only,
            recycle,
            recycled: _,
        } = self;
        // An older pending group would later replace the file that is committed now.
        let recover_pending = || {
            list(&dest.dir)
                .and_then(|names| recover_pending_for(&dest.dir, &dest.name, &names, true))
        };
        let ready = finished
            .and_then(|()| staged.check().map_err(|error| (CommitStep::Check, error)))
            .and_then(|_| {
                recover_pending().map_err(|error| (CommitStep::Recover, io::Error::other(error)))
            });
        if let Err((step, source)) = ready {
            return Err(not_replaced(staged, dest, step, source));
        }
        // The old file may be overwritten only if the directory was synced: otherwise a power loss
        // could restore it as the destination. A version to replace is open, so it is not kept;
        // locking it here would exclude this writer itself.
        let keeps_old = durability == Durability::Full && !no_clobber && replace_only.is_none();
        if recycle.is_some() && !keeps_old {
            let why = "that takes Durability::Full, and neither no_clobber nor replace_only";
            trace::old_file_not_kept(&dest.path, &io::Error::other(why));
        }
        let old = recycle
            .filter(|_| keeps_old)
            .and_then(|max_bytes| recycle::lock_old(&dest.dir, &dest.name, max_bytes));
        // From here to the rename, the lock excludes other writers that have read the same file.
        let compare = |version| -> io::Result<_> {
            let mut turn = FileVersion::lock_for_commit(version, &dest)?;
            if let Some(turn) = &mut turn {
                turn.exclude_writers();
            }
            Ok((turn, version.is_at(&dest)?))
        };
        let turn = match replace_only.as_ref().map(compare) {
            None => None,
            Some(Ok((turn, true))) => turn,
            Some(Ok((_, false))) => return Err(destination_changed(staged, dest)),
            Some(Err(source)) => {
                return Err(not_replaced(staged, dest, CommitStep::Compare, source));
            }
        };
        // With `no_clobber`, the rename itself refuses any file.
        if !no_clobber && let Err(source) = check_kind_again(&dest) {
            return Err(not_replaced(staged, dest, CommitStep::Destination, source));
        }
        let replaced = match publish(&mut staged, &dest, no_clobber, old) {
            Ok(replaced) => replaced,
            Err(PublishError::NotPublished(source)) => {
                return Err(not_replaced(staged, dest, CommitStep::Rename, source));
            }
            Err(PublishError::Unknown { rename, look }) => {
                return Err(CommitError::Unknown {
                    dest: dest.path,
                    rename,
                    source: look,
                });
            }
        };
        drop(turn);
        // Release the lock: it would block the next writer.
        drop(staged);
        // A group may have been published between the check and the rename, and its process have
        // died. Its record names the file that was here then, so no later recovery replaces the new
        // file. A recovery that checked before the rename must end before this commit returns.
        // Other failures do not concern this file.
        let _ = recover_pending();
        let synced = match durability {
            Durability::Full => dest.dir.sync(durability),
            Durability::Barrier | Durability::None => Ok(()),
        };
        let leftover = match replaced {
            Replaced::Removed(leftover) => leftover,
            Replaced::Exchanged(old) if synced.is_ok() => recycle::retain(old, &dest.name).err(),
            Replaced::Exchanged(old) => recycle::remove_replaced(old).err(),
        };
        match (synced, leftover) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(source)) => Err(CommitError::ReplacedCleanupFailed {
                dest: dest.path,
                source,
            }),
            (Err(source), leftover) => Err(CommitError::ReplacedDurabilityUnknown {
                dest: dest.path,
                source,
                leftover,
            }),
        }
    }

    /// Syncs the staged file, sets its final mode and attributes, and syncs it again. No writes may
    /// follow.
    ///
    /// The first sync can take long. Until it is complete the file stays private, so that no other
    /// user can open it, also if this process is killed.
    pub(crate) fn finish(&self, durability: Durability) -> Result<(), (CommitStep, io::Error)> {
        let sync = || sys::sync(self.file(), durability).map_err(|error| (CommitStep::Sync, error));
        if self.mode != STAGED_MODE || self.preserve.anything() {
            sync()?;
        }
        self.give_attributes()
            .map_err(|error| (CommitStep::Attributes, error))?;
        sync()
    }

    fn give_attributes(&self) -> io::Result<()> {
        let Self {
            staged,
            dest,
            preserve,
            mode,
            ..
        } = self;
        let lost =
            preserve::apply(staged.file(), dest, *preserve, *mode).map_err(io::Error::other)?;
        // The destination may have changed since `not_preserved` was returned to the caller.
        let is_known = |lost: &NotPreserved| {
            let mut known = self.not_preserved.iter();
            known.any(|known| known.attribute == lost.attribute)
        };
        match lost.into_iter().find(|lost| !is_known(lost)) {
            Some(unknown) => Err(io::Error::other(unknown)),
            None => Ok(()),
        }
    }
}

/// State of the replaced file after the rename.
enum Replaced {
    /// Unlinked. The name of the staged file may remain.
    Removed(Option<Leftover>),
    /// Linked under the name of the staged file.
    Exchanged(StagedFile),
}

/// Renames the staged file onto the destination, or exchanges it with `old` if that is given and
/// the file system supports it.
fn publish(
    staged: &mut StagedFile,
    dest: &Destination,
    no_clobber: bool,
    old: Option<LockedFile>,
) -> Result<Replaced, PublishError> {
    if let Some(old) = old {
        match staged.exchange(old) {
            Ok(old) => return Ok(Replaced::Exchanged(old)),
            // The exchange changed nothing: fall back to a rename.
            Err(PublishError::NotPublished(why)) => trace::old_file_not_kept(&dest.path, &why),
            Err(unknown @ PublishError::Unknown { .. }) => return Err(unknown),
        }
    }
    staged
        .publish(&dest.dir, &dest.name, no_clobber)
        .map(Replaced::Removed)
}

fn destination_changed(staged: StagedFile, dest: Destination) -> CommitError {
    CommitError::DestinationChanged {
        dest: dest.path,
        leftover: staged.discard().err(),
    }
}

fn not_replaced(
    staged: StagedFile,
    dest: Destination,
    step: CommitStep,
    source: io::Error,
) -> CommitError {
    CommitError::NotReplaced {
        dest: dest.path,
        step,
        source,
        leftover: staged.discard().err(),
    }
}
