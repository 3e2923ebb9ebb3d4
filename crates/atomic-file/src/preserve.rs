//! Copying attributes of the replaced file to the new file: owner, group, mode, access control
//! list, extended attributes.

mod narrow;

use std::ffi::OsStr;
use std::fs::File;
use std::io;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown};
use xattr::FileExt as _;

use crate::acl::Acl;
use crate::attribute::{Attribute, NotPreserved};
use crate::destination::Destination;
use crate::directory::Directory;
use crate::ids::UserId;
use crate::retry::retry;
use crate::stat::{Stat, stat_of};
use crate::sys;

use narrow::narrowed;

/// The attributes of the replaced file that the new file receives.
///
/// The default is none: the new file has the attributes of a newly created file, with the requested
/// [mode](crate::AtomicWriterOptions::mode).
///
/// The commit reads them from the destination and sets them on the new file after the last write
/// and before the sync. `open` tries this, so that missing permissions are detected before data is
/// written. A destination that does not exist, or is a symbolic link to be replaced, has no
/// attributes to preserve.
///
/// **Only a file that existed when the writer was opened** is a source of attributes. If the
/// destination was created later, nothing is preserved, and the new file has the requested
/// [mode](crate::AtomicWriterOptions::mode). If the destination was replaced by another file since,
/// the commit fails, unless [`if_permitted`](Self::if_permitted) is set: then nothing is preserved.
///
/// **A file that another user may have planted** is not a source of attributes, because that user
/// could read the new file. This counts as not permitted. In a directory where other users may
/// create files, such a file belongs to a user other than this one, root and the directory's owner,
/// or has several hard links.
///
/// **In a user namespace of Linux**, an owner or group that the namespace does not map is shown as
/// the overflow id (65534). Setting that id counts as not permitted: the namespace may map it to
/// another user. See [`is_same_user`](crate::is_same_user).
///
/// **Missing permissions**: an unprivileged process can preserve the owner only of its own files,
/// and the group only if it is a member.
/// [`AtomicWriterOptions::open`](crate::AtomicWriterOptions::open) then fails with
/// [`OpenError::NotPreserved`](crate::OpenError::NotPreserved). With
/// [`if_permitted`](Self::if_permitted) the attribute is omitted, and
/// [`AtomicWriter::not_preserved`](crate::AtomicWriter::not_preserved) lists it.
///
/// **A preserved mode never grants more than before**: a user who could not read or write the old
/// file cannot read or write the new one, unless that user is its new owner.
/// - If the owner differs, the set-user-id bit is dropped. The old owner now counts as a member of
///   the group or as another user, so both receive only permissions that the owner had.
/// - If the group differs, the set-group-id bit is dropped. The new group and all other users
///   receive only the permissions that the old group and all other users had: with the mode 0604,
///   the members of the old group would otherwise become other users, who may read.
/// - If an access control list was omitted, the group and all other users receive only permissions
///   that every entry of it granted. If it cannot be read, they receive none.
/// - A list that the new file inherits from its directory is removed, because it would grant more.
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
#[must_use = "it has no effect until it is passed to `AtomicWriterOptions::preserve`"]
pub struct Preserve {
    owner: bool,
    group: bool,
    mode: bool,
    acl: bool,
    xattrs: bool,
    if_permitted: bool,
}

impl Preserve {
    /// Returns a set of no attributes.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Returns a set of all attributes.
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

    /// Sets whether to preserve the owner.
    pub fn owner(mut self, preserve: bool) -> Self {
        self.owner = preserve;
        self
    }

    /// Sets whether to preserve the group.
    pub fn group(mut self, preserve: bool) -> Self {
        self.group = preserve;
        self
    }

    /// Sets whether to preserve the permission bits, instead of those of
    /// [`AtomicWriterOptions::mode`](crate::AtomicWriterOptions::mode).
    pub fn mode(mut self, preserve: bool) -> Self {
        self.mode = preserve;
        self
    }

    /// Sets whether to preserve the access control list. If the old file has none, the new one has
    /// none.
    pub fn acl(mut self, preserve: bool) -> Self {
        self.acl = preserve;
        self
    }

    /// Sets whether to preserve the extended attributes, including the security label and file
    /// capabilities. Signatures of the old contents (`security.ima`, `security.evm`) are never
    /// copied.
    pub fn xattrs(mut self, preserve: bool) -> Self {
        self.xattrs = preserve;
        self
    }

    /// Sets whether to omit attributes that this process is not permitted to set, instead of
    /// failing. Other errors still fail.
    pub fn if_permitted(mut self, if_permitted: bool) -> Self {
        self.if_permitted = if_permitted;
        self
    }

    pub(crate) fn anything(self) -> bool {
        self.owner || self.group || self.mode || self.acl || self.xattrs
    }
}

/// Sets the permission bits `mode` on `file`, and the attributes of the file at `dest` that are to
/// be preserved. Returns the attributes that were omitted.
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
    // Remove an inherited list first: with it, the group bits would grant access to its entries.
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
    let new = stat_of(file).map_err(mode_of)?;
    // The file is opened if the mode is to be preserved.
    let mode = match opened {
        Some(opened) => copy.extended(opened, |acl, kept| match preserve.mode {
            true => narrowed(&old, &new, acl, kept),
            false => mode,
        })?,
        None => mode,
    };
    sys::set_mode(file, mode).map_err(mode_of)?;
    Ok(copy.lost)
}

/// Returns the file at the destination, opened for reading if its attributes are requested; `None`
/// if there is no file.
///
/// Other writers may replace the file concurrently. All attributes are taken from the one opened
/// file.
fn look(
    dest: &Destination,
    preserve: Preserve,
) -> io::Result<Option<(Stat, Option<io::Result<File>>)>> {
    /// Upper bound on attempts: the file may be removed and replaced between the two calls.
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

/// Returns whether another user may have put the file `old` into `dir`.
fn is_untrusted(old: &Stat, dir: &Directory) -> bool {
    let trusted = [sys::file_owner(), UserId::ROOT, dir.stat.uid];
    dir.others_may_create() && (!old.uid.is_any_of(&trusted) || old.links != 1)
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

    /// Omits all requested attributes.
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
                "it belongs to {} and has {} hard links, in a directory where other users may \
                 create files: the user who created it could read the new file",
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
        // Set the group first: after a change of the owner, this process may not set it.
        if self.preserve.group && !own.gid.is(old.gid) {
            let gid = Gid::from_raw(old.gid.raw());
            let given = match old.gid.is_mapped() {
                true => retry(|| fchown(self.file, None, Some(gid))),
                false => Err(not_mapped("group", gid.as_raw())),
            };
            self.result(Attribute::Group, given)?;
        }
        if self.preserve.owner && !own.uid.is(old.uid) {
            let uid = Uid::from_raw(old.uid.raw());
            let given = match old.uid.is_mapped() {
                true => retry(|| fchown(self.file, Some(uid), None)),
                false => Err(not_mapped("user", uid.as_raw())),
            };
            self.result(Attribute::Owner, given)?;
        }
        Ok(())
    }

    /// Copies the access control list and the extended attributes. Returns the permission bits of
    /// the new file, which `mode` returns for the old list and whether the new file has it.
    fn extended(
        &mut self,
        opened: io::Result<File>,
        mode: impl Fn(&Acl, bool) -> u32,
    ) -> Result<u32, NotPreserved> {
        let Preserve { acl, xattrs, .. } = self.preserve;
        let listed = opened.and_then(|old| {
            let names: Vec<_> = match old.list_xattr() {
                Ok(names) => names.collect(),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Vec::new(),
                Err(error) => return Err(error),
            };
            let list = sys::acl_of(&old)?;
            Ok((old, names, list))
        });
        let (old, names, list) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                if acl || xattrs {
                    self.result(Attribute::Xattrs, Err(error))?;
                }
                return Ok(mode(&Acl::Unknown, false));
            }
        };
        let mut mode_now = mode(&list, list == Acl::Absent);
        if acl {
            let with_list = mode(&list, true);
            let before = self.lost.len();
            // The list has the bits of the mode: it grants nothing else until the mode is set.
            self.result(
                Attribute::Acl,
                sys::copy_acl(&old, &list, self.file, with_list),
            )?;
            if self.lost.len() == before {
                mode_now = with_list;
            }
        }
        for name in names {
            if xattrs && !sys::is_acl(&name) && !describes_contents(&name) {
                let copied = sys::copy_xattr(&old, self.file, &name);
                self.result(Attribute::Xattr(name), copied)?;
            }
        }
        Ok(mode_now)
    }
}

/// Returns the error of giving a file to an id that stands for all ids without a mapping: the file
/// would belong to the one user or group that has this id in the namespace.
fn not_mapped(what: &str, id: u32) -> io::Error {
    let reason = format!(
        "it is shown as {what} {id}, which stands for all ids that this user namespace does not map"
    );
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

/// Returns whether an extended attribute depends on the contents of the file.
fn describes_contents(name: &OsStr) -> bool {
    name == "security.ima" || name == "security.evm"
}
