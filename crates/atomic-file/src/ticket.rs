//! Tickets: they serialize the groups of one user with common destinations, so that these never
//! mix.
//!
//! A group renames its unpublished record to its ticket's name, `.atomic-file-ID.intent`, before it
//! lists the directory. It continues only if the listing contains no active rival: a group of this
//! user with a common destination, published or with a ticket. Of two groups, the one that lists
//! later sees the other's ticket, because both create their tickets first. If both see each other,
//! the one with the larger ID withdraws its ticket and waits. Therefore at most one continues, and
//! one always does.
//!
//! Tickets and records of other users are not waited for: their process can be stopped, or the file
//! be planted. Groups of different users with common destinations may mix.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::directory::Directory;
use crate::error::{CommitStep, RecoverError};
use crate::names::{NameKind, is_record_name, kind_of_name, new_id, protocol_name};
use crate::orphan::remove_if_orphaned;
use crate::records::{list, read};
use crate::recover::{Recovery, recover_pending, with_few_others};
use crate::report::RecoverReport;
use crate::staged_file::StagedFile;
use crate::sys::{Lock, Unlock, file_owner, try_lock};

/// Waits until no other group of this user with a destination in `dests` is in progress and
/// `record` has its ticket's name. Completes interrupted groups.
pub(crate) fn acquire_ticket(
    record: &mut StagedFile,
    id: u64,
    dests: &[&OsStr],
) -> Result<(), (CommitStep, io::Error)> {
    const PAUSE: Duration = Duration::from_millis(1);
    let dir = Arc::clone(record.dir());
    let ticket = protocol_name(OsStr::new(""), id, NameKind::Ticket);
    let of_record = |error| (CommitStep::Record, error);
    let mut shown = false;
    loop {
        let rivals = rivals(&dir, &ticket, dests)
            .map_err(|error| (CommitStep::Recover, io::Error::other(error)))?;
        if rivals.is_empty() {
            if shown {
                return Ok(());
            }
            let show = record.rename_to(ticket.clone());
            show.map_err(|error| of_record(error.of_rename()))?;
            shown = true;
            continue;
        }
        if shown && must_withdraw(&ticket, &rivals) {
            let id = new_id().map_err(of_record)?;
            let name = protocol_name(OsStr::new(""), id, NameKind::Locked);
            let withdraw = record.rename_to(name);
            withdraw.map_err(|error| of_record(error.of_rename()))?;
            shown = false;
        }
        thread::sleep(PAUSE);
    }
}

/// Returns whether a rival's ticket comes before this one. A rival with a record is committing, and
/// is only waited for.
fn must_withdraw(ticket: &OsStr, rivals: &[OsString]) -> bool {
    let mut rivals = rivals.iter();
    rivals.any(|rival| !is_record_name(rival) && **rival < *ticket)
}

/// Returns the names of the records and tickets of other active groups with a destination in
/// `dests`.
fn rivals(dir: &Directory, own: &OsStr, dests: &[&OsStr]) -> Result<Vec<OsString>, RecoverError> {
    let mut rivals = list(dir)?;
    let mut stuck = None;
    let mut wanted = with_few_others(dests);
    rivals.retain(|name| {
        if is_record_name(name) {
            match recover_pending(dir, name, &mut RecoverReport::default(), &mut wanted) {
                Ok(Recovery::InProgress { record, own: true }) => shares(&record, dests),
                Ok(_) => false,
                Err(error) => {
                    if error
                        .dests
                        .iter()
                        .any(|dest| dests.contains(&dest.as_os_str()))
                    {
                        stuck = Some(error.error);
                    }
                    false
                }
            }
        } else {
            name != own && is_active_ticket(dir, name, dests)
        }
    });
    stuck.map_or(Ok(rivals), Err)
}

fn is_active_ticket(dir: &Directory, name: &OsStr, dests: &[&OsStr]) -> bool {
    let own_file = |name| {
        let entry = dir.entry(name).ok()??;
        (entry.is_file() && entry.uid.is(file_owner())).then_some(())?;
        dir.open_file(name).ok()
    };
    if kind_of_name(name) != Some(NameKind::Ticket) {
        return false;
    }
    let Some(file) = own_file(name) else {
        return false;
    };
    match try_lock(&file) {
        Ok(Lock::Taken) => shares(&file, dests),
        Ok(Lock::Held) => {
            drop(Unlock(&file));
            remove_if_orphaned(dir, name);
            false
        }
        Ok(Lock::Unsupported(_)) | Err(_) => false,
    }
}

/// Returns whether a record includes a destination in `dests`. A record that is still being written
/// counts as if it does.
fn shares(record: &std::fs::File, dests: &[&OsStr]) -> bool {
    match read(record) {
        Ok(Ok(members)) => members
            .iter()
            .any(|member| dests.contains(&member.dest.as_os_str())),
        Ok(Err(_)) | Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::names::record_name;

    #[rstest]
    #[case::none(&[], false)]
    #[case::of_a_larger_id(&[ticket(6)], false)]
    #[case::of_a_smaller_id(&[ticket(6), ticket(4)], true)]
    #[case::a_record(&[record_name(4)], false)]
    fn the_ticket_with_the_larger_id_is_withdrawn(
        #[case] rivals: &[OsString],
        #[case] expected: bool,
    ) {
        assert_eq!(must_withdraw(&ticket(5), rivals), expected);
    }

    fn ticket(id: u64) -> OsString {
        protocol_name(OsStr::new(""), id, NameKind::Ticket)
    }
}
