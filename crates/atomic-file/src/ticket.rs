//! Taking turns: groups of one user over the same destinations, so that they never mix.
//!
//! A group shows its unpublished record under a ticket's name, `.atomic-file-ID.intent`, before it
//! lists the directory. It goes on only if the listing shows no living rival: another group of this
//! user that has one of its destinations, published or with a ticket. Of two groups, the one that
//! lists later sees the other, as both show their tickets first. Of two that see each other, the one
//! with the larger ID withdraws its ticket and waits. So at most one goes on, and one always does.
//!
//! Tickets and records of other users are not waited for: a process can be stopped, and a file be
//! planted. Groups of different users over the same destinations may mix.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::directory::Directory;
use crate::error::{CommitStep, RecoverError};
use crate::record::is_record_name;
use crate::recover::{RecoverReport, Recovery, list, read, recover_pending};
use crate::staged_file::{
    NameKind, StagedFile, kind_of_name, new_id, protocol_name, remove_if_orphaned,
};
use crate::sys::{Lock, Unlock, file_owner, try_lock};

/// Returns once no other group of this user over `dests` is being committed, and `record` has its
/// ticket's name. Completes dead groups on the way.
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
        let withdraws = rivals
            .iter()
            .any(|rival| !is_record_name(rival) && *rival < ticket);
        if shown && withdraws {
            let name = protocol_name(OsStr::new(""), new_id(), NameKind::Locked);
            let withdraw = record.rename_to(name);
            withdraw.map_err(|error| of_record(error.of_rename()))?;
            shown = false;
        }
        thread::sleep(PAUSE);
    }
}

/// The names of other living groups' records and tickets that have one of `dests`.
fn rivals(dir: &Directory, own: &OsStr, dests: &[&OsStr]) -> Result<Vec<OsString>, RecoverError> {
    let mut rivals = list(dir)?;
    let mut stuck = None;
    rivals.retain(|name| {
        if is_record_name(name) {
            match recover_pending(dir, name, &mut RecoverReport::default()) {
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
        (entry.is_file() && entry.uid == file_owner()).then_some(())?;
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

/// Whether a record has one of `dests`. One that is just being written has, for all that is known.
fn shares(record: &std::fs::File, dests: &[&OsStr]) -> bool {
    match read(record) {
        Ok(Ok(members)) => members
            .iter()
            .any(|member| dests.contains(&member.dest.as_os_str())),
        Ok(Err(_)) | Err(_) => true,
    }
}
