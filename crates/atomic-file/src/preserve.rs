//! Giving the new file what the replaced one had: owner, group, mode, access control list, extended
//! attributes.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown};
use thiserror::Error;
use xattr::FileExt as _;

use crate::destination::Destination;
use crate::directory::{Directory, Stat, stat_of};
use crate::sys;

/// The attributes of the replaced file that the new file gets. The default is none of them: the new
/// file is as one newly created, with the [mode](crate::Options::mode) asked for.
///
/// They are read from the destination and given to the new file by the commit, after the last write
/// and before the sync. Opening the writer tries it, so that what is not permitted is known before
/// anything is written. A destination that does not exist, or is a symbolic link that is replaced
/// itself, has nothing to preserve.
///
/// **Only a file that was there when the writer was opened** passes anything on. Of one that came
/// to the destination later nothing is preserved: the new file has the
/// [mode](crate::Options::mode) asked for. Where the destination was another file at the opening,
/// the commit fails instead, unless [`if_permitted`](Self::if_permitted) is set: then nothing of it
/// is preserved either.
///
/// **A file that another user may have planted** passes nothing on, which counts as not permitted: the
/// other user could read the new file. In a directory where others may create files, that is a file of
/// another user than this one, root and the directory's owner, or one with several hard links.
///
/// **What is not permitted**: a process without privileges can keep the owner only of its own files,
/// and the group only if it is a member. [`Options::open`](crate::Options::open) then fails with
/// [`OpenError::NotPreserved`](crate::OpenError::NotPreserved). With
/// [`if_permitted`](Self::if_permitted) the attribute is left out, and
/// [`AtomicWriter::not_preserved`](crate::AtomicWriter::not_preserved) says so.
///
/// **A preserved mode never means more than it did.** Where the owner is another than before, the
/// set-user-id bit is left out. Where the group is another, or an access control list was left out,
/// the group gets only what all others have, and the set-group-id bit is left out. A list that the new
/// file inherits from its directory is removed, as the mode would mean more with it.
///
/// # Examples
/// ```
/// use atomic_file::{AtomicWriter, Preserve};
/// use std::os::unix::fs::PermissionsExt as _;
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("vm.mem");
///
/// std::fs::write(&dest, "old")?;
/// std::fs::set_permissions(&dest, std::fs::Permissions::from_mode(0o640))?;
/// let preserve = Preserve::all().if_permitted(true);
/// let writer = AtomicWriter::options().preserve(preserve).open(&dest)?;
/// for lost in writer.not_preserved() {
///     eprintln!("warning: {lost}");
/// }
/// writer.commit()?;
/// assert_eq!(std::fs::metadata(&dest)?.permissions().mode() & 0o7777, 0o640);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Preserve {
    owner: bool,
    group: bool,
    mode: bool,
    acl: bool,
    xattrs: bool,
    if_permitted: bool,
}

impl Preserve {
    /// Preserves nothing.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Preserves everything.
    pub fn all() -> Self {
        Self {
            owner: true,
            group: true,
            mode: true,
            acl: true,
            xattrs: true,
            if_permitted: false,
        }
    }

    /// Whether the new file belongs to the old one's owner.
    pub fn owner(mut self, preserve: bool) -> Self {
        self.owner = preserve;
        self
    }

    /// Whether the new file has the old one's group.
    pub fn group(mut self, preserve: bool) -> Self {
        self.group = preserve;
        self
    }

    /// Whether the new file has the old one's permission bits, rather than those of
    /// [`Options::mode`](crate::Options::mode).
    pub fn mode(mut self, preserve: bool) -> Self {
        self.mode = preserve;
        self
    }

    /// Whether the new file has the old one's access control list, or none if it had none.
    pub fn acl(mut self, preserve: bool) -> Self {
        self.acl = preserve;
        self
    }

    /// Whether the new file has the old one's extended attributes, the security label and file
    /// capabilities among them. Signatures of the old contents (`security.ima`, `security.evm`) are
    /// left out.
    pub fn xattrs(mut self, preserve: bool) -> Self {
        self.xattrs = preserve;
        self
    }

    /// Whether to leave out what is not permitted, rather than to fail. Errors of other kinds are
    /// errors all the same.
    pub fn if_permitted(mut self, if_permitted: bool) -> Self {
        self.if_permitted = if_permitted;
        self
    }

    pub(crate) fn anything(self) -> bool {
        self.owner || self.group || self.mode || self.acl || self.xattrs
    }
}

/// An attribute that a file has beside its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attribute {
    /// The user that it belongs to.
    Owner,
    /// The group that it belongs to.
    Group,
    /// The permission bits.
    Mode,
    /// The access control list.
    Acl,
    /// All extended attributes: they cannot be listed.
    Xattrs,
    /// The extended attribute of this name.
    Xattr(OsString),
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner => f.write_str("owner"),
            Self::Group => f.write_str("group"),
            Self::Mode => f.write_str("mode"),
            Self::Acl => f.write_str("access control list"),
            Self::Xattrs => f.write_str("extended attributes"),
            Self::Xattr(name) => write!(f, "extended attribute {name:?}"),
        }
    }
}

/// An attribute of the replaced file that the new file cannot get.
#[derive(Debug, Error)]
#[error("the {attribute} of the replaced file cannot be preserved")]
pub struct NotPreserved {
    /// The attribute.
    pub attribute: Attribute,
    /// What the system said.
    pub source: io::Error,
}

/// Gives `file` the permission bits `mode`, and those attributes of the file at `dest` that are to be
/// preserved. What was not permitted and may be left out is returned.
pub(crate) fn apply(
    file: &File,
    dest: &Destination,
    preserve: Preserve,
    mode: u32,
) -> Result<Vec<NotPreserved>, NotPreserved> {
    let mode_of = |source| NotPreserved {
        attribute: Attribute::Mode,
        source,
    };
    let mut copy = AttributeCopy {
        file,
        preserve,
        lost: Vec::new(),
    };
    // Any bits of the group's would give it something.
    sys::remove_acl(file).map_err(mode_of)?;
    let at_open = dest.entry.filter(|_| preserve.anything());
    let now = match at_open {
        Some(_) => look(dest, preserve).map_err(mode_of)?,
        None => None,
    };
    let Some((old, opened)) = now else {
        sys::set_mode(file, mode).map_err(mode_of)?;
        return Ok(Vec::new());
    };
    if at_open.map(|entry| entry.id) != Some(old.id) {
        if !preserve.if_permitted {
            return Err(mode_of(io::Error::other(
                "the destination was replaced since the writer was opened",
            )));
        }
        sys::set_mode(file, mode).map_err(mode_of)?;
        return Ok(Vec::new());
    }
    if is_untrusted(&old, &dest.dir) {
        copy.nothing(&old)?;
        sys::set_mode(file, mode).map_err(mode_of)?;
        return Ok(copy.lost);
    }
    copy.ownership(&old)?;
    let has_acl = match opened {
        Some(opened) => copy.extended(opened)?,
        None => false,
    };
    let mode = match preserve.mode {
        true => narrowed(&old, &stat_of(file).map_err(mode_of)?, has_acl),
        false => mode,
    };
    sys::set_mode(file, mode).map_err(mode_of)?;
    Ok(copy.lost)
}

/// What is at the destination: a file, and that file opened to read its attributes, where they are
/// asked for; `None` where there is no file.
///
/// Other writers may replace it meanwhile. What was opened is one file, and all is taken from that.
fn look(
    dest: &Destination,
    preserve: Preserve,
) -> io::Result<Option<(Stat, Option<io::Result<File>>)>> {
    /// How often it may be gone between the look and the opening, which only removing it and putting
    /// another in place brings about.
    const TRIES: u32 = 100;
    for _ in 0..TRIES {
        let entry = dest.dir.entry(&dest.name)?;
        let Some(entry) = entry.filter(Stat::is_file) else {
            return Ok(None);
        };
        if !(preserve.mode || preserve.acl || preserve.xattrs) {
            return Ok(Some((entry, None)));
        }
        match dest.dir.open_for(OFlag::O_RDONLY, &dest.name) {
            Ok(file) => {
                let stat = stat_of(&file)?;
                if stat.is_file() {
                    return Ok(Some((stat, Some(Ok(file)))));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Ok(Some((entry, Some(Err(error))))),
        }
    }
    Ok(None)
}

/// Whether a user whom the new file is not meant for may have put the file `old` into `dir`.
fn is_untrusted(old: &Stat, dir: &Directory) -> bool {
    const ROOT: u32 = 0;
    let trusted = [sys::file_owner(), ROOT, dir.stat.uid];
    dir.others_may_create() && (!trusted.contains(&old.uid) || old.links != 1)
}

/// The old file's permission bits, less what would mean more for another owner or group.
fn narrowed(old: &Stat, new: &Stat, acl_left_out: bool) -> u32 {
    const SET_USER_ID: u32 = 0o4000;
    const SET_GROUP_ID: u32 = 0o2000;
    const GROUP: u32 = 0o070;
    let mut mode = old.mode & 0o7777;
    if old.uid != new.uid {
        mode &= !SET_USER_ID;
    }
    if old.gid != new.gid {
        mode &= !SET_GROUP_ID;
    }
    // With a list, the group's bits are the most that anyone in it may do.
    if old.gid != new.gid || acl_left_out {
        mode &= !GROUP | (mode & 0o007) << 3;
    }
    mode
}

struct AttributeCopy<'f> {
    file: &'f File,
    preserve: Preserve,
    lost: Vec<NotPreserved>,
}

impl AttributeCopy<'_> {
    fn result(&mut self, attribute: Attribute, result: io::Result<()>) -> Result<(), NotPreserved> {
        let Err(source) = result else {
            return Ok(());
        };
        let not_permitted = matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied
                | io::ErrorKind::Unsupported
                | io::ErrorKind::InvalidInput
        );
        let lost = NotPreserved { attribute, source };
        if !(self.preserve.if_permitted && not_permitted) {
            return Err(lost);
        }
        self.lost.push(lost);
        Ok(())
    }

    /// Leaves out all that was asked for.
    fn nothing(&mut self, old: &Stat) -> Result<(), NotPreserved> {
        let Preserve {
            owner,
            group,
            mode,
            acl,
            xattrs,
            if_permitted: _,
        } = self.preserve;
        let asked_for = [
            (owner, Attribute::Owner),
            (group, Attribute::Group),
            (mode, Attribute::Mode),
            (acl, Attribute::Acl),
            (xattrs, Attribute::Xattrs),
        ];
        for (_, attribute) in asked_for.into_iter().filter(|(asked_for, _)| *asked_for) {
            let reason = format!(
                "it belongs to user {} and has {} hard links, in a directory where others may \
                 create files: who put it there could read the new file",
                old.uid, old.links
            );
            let refused = io::Error::new(io::ErrorKind::PermissionDenied, reason);
            self.result(attribute, Err(refused))?;
        }
        Ok(())
    }

    fn ownership(&mut self, old: &Stat) -> Result<(), NotPreserved> {
        let own = stat_of(self.file);
        let own = own.map_err(|source| NotPreserved {
            attribute: Attribute::Owner,
            source,
        })?;
        // The group first: who gives the file away may no longer change it.
        if self.preserve.group && own.gid != old.gid {
            let gid = Gid::from_raw(old.gid);
            let given = sys::retry(|| fchown(self.file, None, Some(gid)));
            self.result(Attribute::Group, given)?;
        }
        if self.preserve.owner && own.uid != old.uid {
            let uid = Uid::from_raw(old.uid);
            let given = sys::retry(|| fchown(self.file, Some(uid), None));
            self.result(Attribute::Owner, given)?;
        }
        Ok(())
    }

    /// Whether the old file has an access control list that the new one did not get.
    fn extended(&mut self, opened: io::Result<File>) -> Result<bool, NotPreserved> {
        let Preserve { acl, xattrs, .. } = self.preserve;
        let listed = opened.and_then(|old| {
            let names: Vec<_> = match old.list_xattr() {
                Ok(names) => names.collect(),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Vec::new(),
                Err(error) => return Err(error),
            };
            Ok((old, names))
        });
        let (old, names) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                if acl || xattrs {
                    self.result(Attribute::Xattrs, Err(error))?;
                }
                // For all that is known.
                return Ok(true);
            }
        };
        let mut acl_left_out = false;
        if acl {
            let before = self.lost.len();
            self.result(Attribute::Acl, sys::copy_acl(&old, self.file))?;
            acl_left_out = self.lost.len() > before;
        } else {
            acl_left_out |= names.iter().any(|name| sys::is_acl(name));
        }
        for name in names {
            if xattrs && !sys::is_acl(&name) && !describes_contents(&name) {
                let copied = copy_xattr(&old, self.file, &name);
                self.result(Attribute::Xattr(name), copied)?;
            }
        }
        Ok(acl_left_out)
    }
}

/// Whether an extended attribute speaks of a file's bytes, which the new file does not have.
fn describes_contents(name: &OsStr) -> bool {
    name == "security.ima" || name == "security.evm"
}

pub(crate) fn copy_xattr(from: &File, to: &File, name: &OsStr) -> io::Result<()> {
    let value = from.get_xattr(name)?;
    let there = to.get_xattr(name).ok().flatten();
    match value {
        // The label that a new file gets is often the same, and may not be set.
        Some(value) if there.as_ref() == Some(&value) => Ok(()),
        Some(value) => to.set_xattr(name, &value),
        None if there.is_some() => to.remove_xattr(name),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::the_same(0o6775, false, false, false, 0o6775)]
    #[case::another_owner(0o6775, true, false, false, 0o2775)]
    #[case::another_group(0o6774, false, true, false, 0o4744)]
    #[case::a_list_left_out(0o2771, false, false, true, 0o2711)]
    #[case::others_may_more_than_the_group(0o0607, false, true, false, 0o0607)]
    fn a_preserved_mode_never_means_more_than_it_did(
        #[case] mode: u32,
        #[case] other_owner: bool,
        #[case] other_group: bool,
        #[case] acl_left_out: bool,
        #[case] expected: u32,
    ) {
        let here = Directory::open(Path::new("/")).unwrap().stat;
        let old = Stat { mode, ..here };
        let new = Stat {
            uid: here.uid + u32::from(other_owner),
            gid: here.gid + u32::from(other_group),
            ..here
        };
        assert_eq!(narrowed(&old, &new, acl_left_out), expected);
    }
}
