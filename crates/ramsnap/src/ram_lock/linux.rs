//! The lock, and the byte of restores that ignore its holders.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use nix::libc;

use super::byte_lock::{AT, conflict, is, is_without_locks, request, set};
use super::holders::Holders;
use crate::failure::Failure;
use crate::stderr;

/// The bytes of which a restore that ignores readers locks one. It takes the first one that no
/// other process has locked.
const BESIDE: Range<libc::off_t> = AT + 0x1000..AT + 0x10_0000;
/// The most bytes tried in [`BESIDE`].
const TRIES: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// For reading the RAM.
    Shared,
    /// For restoring to the RAM.
    Exclusive,
}

/// The holder of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    /// This process, until the file is closed.
    Us,
    /// `ramsnap restore`, or a program that takes its lock.
    Restore,
    /// A ramsnap that reads the RAM, or a program that takes its lock.
    Reader,
    /// A program that has locked all of the file; or the file system has no such locks.
    Unknown,
}

/// Refuses RAM that a `ramsnap restore` is writing to. No restore can begin while `file` is open.
pub fn check_not_restored(file: &File, ram: &str) -> anyhow::Result<()> {
    let locking = || format!("cannot lock {ram}");
    let is_restored = match lock(file, Mode::Shared).with_context(locking)? {
        Holder::Restore => true,
        Holder::Unknown => false,
        // In this order: a restore that ignores readers takes its byte before it looks for them.
        Holder::Us | Holder::Reader => {
            beside_readers(file).with_context(locking)? == Holder::Restore
        }
    };
    match is_restored {
        false => Ok(()),
        true => Err(Failure::RamBeingRestored {
            ram: ram.to_owned(),
            by: Holders::of(file, &[AT..AT + 1, BESIDE]).named(),
        }
        .into()),
    }
}

/// Takes the lock for a restore until `file` is closed, or refuses the RAM at `path`. Processes in
/// `ignored` may hold the lock.
pub fn lock_to_restore(file: &File, path: &Path, ignored: &[u32]) -> anyhow::Result<()> {
    let locking = || format!("cannot lock {path:?}");
    let busy = || {
        Err(Failure::TargetBusy {
            path: path.to_owned(),
            by: Holders::of(file, &[AT..AT + 1, BESIDE]).named(),
        }
        .into())
    };
    match lock(file, Mode::Exclusive).with_context(locking)? {
        Holder::Us | Holder::Unknown => return Ok(()),
        Holder::Restore => return busy(),
        Holder::Reader => {}
    }
    // No restore can take the lock exclusively from here on.
    match lock(file, Mode::Shared).with_context(locking)? {
        Holder::Us => {}
        Holder::Restore => return busy(),
        Holder::Reader | Holder::Unknown => return Ok(()),
    }
    // No reader can begin from here on.
    let beside = lock_beside(file).with_context(locking)?;
    if beside == Holder::Restore {
        return busy();
    }
    let holders = Holders::of(file, &[AT..AT + 1]);
    if beside == Holder::Us && holders.are_all_in(ignored) {
        if holders.exist() {
            stderr::line(&format!(
                "warning: a lock on {path:?} is ignored: {}",
                holders.named()
            ));
        }
        return Ok(());
    }
    Err(Failure::TargetRead {
        path: path.to_owned(),
        by: holders.named(),
        remedy: holders.remedy(ignored),
    }
    .into())
}

/// Locks a byte of [`BESIDE`] exclusively. Returns `Reader` if none can be locked.
fn lock_beside(file: &File) -> nix::Result<Holder> {
    let mut at = BESIDE.start;
    for _ in 0..TRIES {
        let wanted = request(libc::F_WRLCK, at..at + 1);
        if set(file, &wanted)? == Some(true) {
            return match beside_readers(file)? {
                Holder::Restore => Ok(Holder::Restore),
                _ => Ok(Holder::Us),
            };
        }
        let Some(found) = conflict(file, &wanted)? else {
            // Released in the meantime.
            continue;
        };
        match found.l_len {
            0 => break,
            len => at = found.l_start.saturating_add(len),
        }
        if is(&found, libc::F_WRLCK) {
            return Ok(Holder::Restore);
        }
        if !BESIDE.contains(&at) {
            break;
        }
    }
    Ok(Holder::Reader)
}

/// Returns `Restore` if another process has a byte of [`BESIDE`] exclusively, and `Us` otherwise.
fn beside_readers(file: &File) -> nix::Result<Holder> {
    let found = match conflict(file, &request(libc::F_RDLCK, BESIDE)) {
        Err(errno) if is_without_locks(errno) => None,
        found => found?,
    };
    let inside = |lock: libc::flock| lock.l_len == 1 && BESIDE.contains(&lock.l_start);
    Ok(match found.is_some_and(inside) {
        true => Holder::Restore,
        false => Holder::Us,
    })
}

/// Requests the lock without waiting.
fn lock(file: &File, mode: Mode) -> nix::Result<Holder> {
    let kind = match mode {
        Mode::Shared => libc::F_RDLCK,
        Mode::Exclusive => libc::F_WRLCK,
    };
    let wanted = request(kind, AT..AT + 1);
    loop {
        match set(file, &wanted)? {
            Some(true) => return Ok(Holder::Us),
            Some(false) => {}
            None => return Ok(Holder::Unknown),
        }
        // Otherwise released in the meantime.
        if let Some(found) = conflict(file, &wanted)? {
            return Ok(match (found.l_start, found.l_len) {
                (AT, 1) if is(&found, libc::F_WRLCK) => Holder::Restore,
                (AT, 1) => Holder::Reader,
                _ => Holder::Unknown,
            });
        }
    }
}
