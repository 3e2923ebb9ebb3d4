//! The existing file that RAM is restored into.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::is_same_user;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::geteuid;

use crate::failure::Failure;
use crate::{ram_lock, save};

/// The largest number of links that are followed, as in Linux.
const LINKS: usize = 40;
const STICKY: Mode = Mode::S_ISVTX;
const ROOT: u32 = 0;

/// Opens the file at `path` to write RAM to it, and [locks](ram_lock) it until it is closed, though
/// the processes in `ignored` hold the lock.
///
/// A link is followed only if `atomic-file` would follow it: in a directory of this user or root.
/// If [others may write to](atomic_file::others_may_write) the directory, it must be sticky, and
/// the link must be this user's or the directory owner's. Unless `force` is set, the file must
/// belong to this user, and must be private if others may write to its directory. A file named by
/// its descriptor in /proc is exempt from both rules: only its process controls it, and no other
/// user can replace it.
pub fn open_and_lock(path: &Path, force: bool, ignored: &[u32]) -> anyhow::Result<File> {
    let opening = || format!("cannot open {path:?} to restore to");
    let mut at = path.to_owned();
    for _ in 0..LINKS {
        let dir_path = save::dir_of(&at).to_owned();
        let Some(name) = at.file_name().map(OsStr::to_owned) else {
            return Err(Errno::EISDIR).with_context(opening);
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = open(&dir_path, flags, Mode::empty()).with_context(opening)?;
        let by_descriptor = is_on_procfs(&dir);
        let shared = !by_descriptor && atomic_file::others_may_write(&dir).with_context(opening)?;
        let dir_stat = fstat(&dir).with_context(opening)?;
        let found = fstatat(&dir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        let found = found.with_context(opening)?;
        if is(&found, SFlag::S_IFLNK) && !by_descriptor {
            if !may_follow(&found, &dir_stat, shared) {
                let (path, link) = (path.to_owned(), at);
                return Err(Failure::ForeignLink { path, link }.into());
            }
            let to = readlinkat(&dir, name.as_os_str()).with_context(opening)?;
            at = dir_path.join(PathBuf::from(to));
            continue;
        }
        let file = match open_in(&dir, &name, by_descriptor, path) {
            Err(why @ (Errno::EACCES | Errno::EPERM)) if !is_of_this_user(&found) => {
                return Err(Failure::TargetDenied {
                    path: path.to_owned(),
                    owner: found.st_uid,
                    source: why.into(),
                }
                .into());
            }
            file => file.with_context(opening)?,
        };
        let file = file.ok_or_else(|| Failure::NotRam {
            path: path.to_owned(),
        })?;
        let stat = fstat(&file).with_context(opening)?;
        if !(force || by_descriptor || is_own(&stat, shared)) {
            let (path, owner) = (path.to_owned(), stat.st_uid);
            return Err(Failure::TargetNotPrivate { path, owner }.into());
        }
        ram_lock::lock_to_restore(&file, path, ignored)?;
        return Ok(file);
    }
    Err(Errno::ELOOP).with_context(opening)
}

/// Returns `None` if the file is neither a regular file nor a block device, as opening it may have
/// effects.
fn open_in(
    dir: &OwnedFd,
    name: &OsStr,
    by_descriptor: bool,
    path: &Path,
) -> nix::Result<Option<File>> {
    let (stat, link) = match by_descriptor {
        true => (nix::sys::stat::stat(path)?, OFlag::empty()),
        false => {
            let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            (stat, OFlag::O_NOFOLLOW)
        }
    };
    // A device that is mounted, or in use otherwise, is refused.
    let (kind, exclusive) = match is(&stat, SFlag::S_IFBLK) {
        true => (SFlag::S_IFBLK, OFlag::O_EXCL),
        false => (SFlag::S_IFREG, OFlag::empty()),
    };
    if !is(&stat, kind) {
        return Ok(None);
    }
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | link | exclusive;
    let file = openat(dir, name, flags, Mode::empty())?;
    let opened = fstat(&file)?;
    Ok(is(&opened, kind).then(|| File::from(file)))
}

fn is(stat: &FileStat, kind: SFlag) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == kind.bits()
}

fn may_follow(link: &FileStat, dir: &FileStat, others_may_write: bool) -> bool {
    let mode = Mode::from_bits_truncate(dir.st_mode);
    let trusted = is_of_this_user(link) || is_same_user(link.st_uid, dir.st_uid);
    // The owner of a directory may exchange any link in it. One that this user namespace does not
    // map, and so is not the same as itself, may be root.
    let dir_is_trusted = is_of_this_user(dir)
        || is_same_user(dir.st_uid, ROOT)
        || !is_same_user(dir.st_uid, dir.st_uid);
    dir_is_trusted && (!others_may_write || (mode.contains(STICKY) && trusted))
}

fn is_own(file: &FileStat, others_may_write_to_its_dir: bool) -> bool {
    let others = Mode::S_IRWXG | Mode::S_IRWXO;
    let open = Mode::from_bits_truncate(file.st_mode).intersects(others);
    is_of_this_user(file) && !(open && others_may_write_to_its_dir)
}

fn is_of_this_user(file: &FileStat) -> bool {
    is_same_user(file.st_uid, geteuid().as_raw())
}

#[cfg(target_os = "linux")]
fn is_on_procfs(dir: &impl AsFd) -> bool {
    use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
    fstatfs(dir).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC)
}

/// On other systems, `/dev/fd` has no links.
#[cfg(not(target_os = "linux"))]
fn is_on_procfs(_: &impl AsFd) -> bool {
    false
}
