//! Resolving the destination: its directory and name.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use crate::directory::Directory;
use crate::error::{Obstacle, OpenError};
use crate::ids::UserId;
use crate::names::{is_record_name, kind_of_name};
use crate::stat::{Stat, stat_of};
use crate::sys;

/// The handling of a destination that is a symbolic link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Symlinks {
    /// Replaces the target of the link and keeps the link, as writing through `open(2)` does.
    ///
    /// This is the default, because [`Replace`](Self::Replace) silently loses the link of an
    /// operator who moved the files to a larger disk. A dangling link is an error: usually a disk
    /// is not mounted. No link is followed in a directory of a mapped user other than this one and
    /// root. In a directory that [others may write to](crate::others_may_write), a link is
    /// followed only if the directory is sticky (`/tmp`) and the link belongs to this user or to
    /// the directory's owner, as with Linux's `fs.protected_symlinks`. Two users that a user
    /// namespace does not map count as [different users](crate::is_same_user). A magic link of
    /// Linux (`/proc/PID/fd/N`, `/dev/stdout`) leads to an open file rather than to a path, and is
    /// [refused](OpenError::MagicLink).
    #[default]
    Follow,
    /// Replaces the link itself by a regular file, as `rename(2)` does, and leaves its target
    /// unchanged. The link may be dangling. Choose this if other users may write to the directory.
    Replace,
}

/// Maximum number of links that are followed: Linux's own limit (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// Checks that a writer could be opened for `path`, as far as this needs no file to be staged.
///
/// [`AtomicWriterOptions::open`](crate::AtomicWriterOptions::open) repeats the checks. Call this
/// before other work that would be in vain.
///
/// # Errors
/// Returns the [`OpenError`] that opening a writer would return for its path: such as
/// [`OpenError::MagicLink`], [`OpenError::NotAFile`] and [`OpenError::CannotReplace`].
///
/// # Examples
/// ```
/// use atomic_file::{OpenError, Symlinks, check_destination};
///
/// let dir = tempfile::tempdir()?;
/// check_destination(dir.path().join("vm.mem"), Symlinks::Follow)?;
/// let error = check_destination(dir.path(), Symlinks::Follow).unwrap_err();
/// assert!(matches!(error, OpenError::NotAFile { is_dir: true, .. }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn check_destination(path: impl AsRef<Path>, symlinks: Symlinks) -> Result<(), OpenError> {
    check_replaceable(&Destination::resolve(path.as_ref(), symlinks)?)
}

#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) dir: Arc<Directory>,
    pub(crate) name: OsString,
    /// The path as the caller passed it.
    pub(crate) path: PathBuf,
    /// The entry at the time of resolving.
    pub(crate) entry: Option<Stat>,
}

impl Destination {
    pub(crate) fn resolve(path: &Path, symlinks: Symlinks) -> Result<Self, OpenError> {
        // Another writer may replace the file between the two looks at it.
        const TRIES: usize = 64;
        let mut misled = None;
        for _ in 0..TRIES {
            let (found, link) = Self::follow(path, symlinks)?;
            match link {
                Some(link) if link.leads_elsewhere(&found) => misled = Some(link.path()),
                _ => return Ok(found),
            }
        }
        Err(OpenError::MagicLink {
            path: path.to_owned(),
            link: misled.unwrap_or_default(),
        })
    }

    /// Resolves the path, and returns the first link that was followed.
    fn follow(path: &Path, symlinks: Symlinks) -> Result<(Self, Option<Link>), OpenError> {
        let (parent, name) = split(path).ok_or_else(|| OpenError::NoFileName {
            path: path.to_owned(),
        })?;
        let dir = Directory::open(parent).map_err(|source| OpenError::OpenDirectory {
            path: parent_to_show(parent),
            source,
        })?;
        let inspect = |source| OpenError::io("inspect", path, source);

        let mut first = None;
        let (mut dir, mut name) = (dir, name.to_owned());
        for _ in 0..=MAX_LINKS {
            let entry = dir.entry(&name).map_err(inspect)?;
            match entry {
                Some(link) if link.is_symlink() && symlinks == Symlinks::Follow => {
                    if !may_follow(&link, &dir.stat, dir.others_may_create()) {
                        return Err(OpenError::UntrustedSymlink {
                            path: dir.path_of(&name),
                            owner: link.uid.raw(),
                        });
                    }
                    if dir.is_magic_link(&name).map_err(inspect)? {
                        return Err(OpenError::MagicLink {
                            path: path.to_owned(),
                            link: dir.path_of(&name),
                        });
                    }
                    let target = dir.read_link(&name).map_err(inspect)?;
                    let next = step(&dir, &target, path)?;
                    first.get_or_insert(Link { dir, name });
                    (dir, name) = next;
                }
                Some(other) if !other.is_file() && !other.is_symlink() => {
                    return Err(OpenError::NotAFile {
                        path: path.to_owned(),
                        is_dir: other.is_dir(),
                    });
                }
                _ if is_record_name(&name) || kind_of_name(&name).is_some() => {
                    return Err(OpenError::ReservedName {
                        path: dir.path_of(&name),
                    });
                }
                entry => {
                    let found = Self {
                        dir: Arc::new(dir),
                        name,
                        path: path.to_owned(),
                        entry,
                    };
                    return Ok((found, first));
                }
            }
        }
        Err(inspect(Errno::ELOOP.into()))
    }
}

/// A link that was followed by its text.
#[derive(Debug)]
struct Link {
    dir: Directory,
    name: OsString,
}

impl Link {
    fn path(&self) -> PathBuf {
        self.dir.path_of(&self.name)
    }

    /// Returns whether the kernel follows the link to another file than the one found by its text.
    /// Returns `false` if the kernel does not follow it (mount option `nosymfollow`).
    fn leads_elsewhere(&self, found: &Destination) -> bool {
        match (self.dir.followed(&self.name), found.entry) {
            (Ok(followed), Some(entry)) => followed.id != entry.id,
            _ => false,
        }
    }
}

/// Fails if a rename onto `dest` is known to fail.
pub(crate) fn check_replaceable(dest: &Destination) -> Result<(), OpenError> {
    match obstacle(&dest.dir, &dest.dir.stat, &dest.name, dest.entry) {
        None => Ok(()),
        Some(obstacle) => Err(OpenError::CannotReplace {
            path: dest.path.clone(),
            obstacle,
        }),
    }
}

/// Fails if a rename onto `dest` is known to fail now, or would replace a directory, device, FIFO
/// or socket. Repeats the checks of `open`, because the destination may have changed since.
pub(crate) fn check_again(dest: &Destination) -> io::Result<()> {
    let entry = dest.dir.entry(&dest.name)?;
    if entry.is_some_and(|entry| entry.is_dir()) {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    check_is_no_special_file(entry.as_ref())?;
    let dir = stat_of(&*dest.dir)?;
    match obstacle(&dest.dir, &dir, &dest.name, entry) {
        None => Ok(()),
        Some(obstacle) => Err(io::Error::new(io::ErrorKind::PermissionDenied, obstacle)),
    }
}

/// Fails if `dest` is a device, FIFO or socket now, which a rename would replace.
pub(crate) fn check_kind_again(dest: &Destination) -> io::Result<()> {
    check_is_no_special_file(dest.dir.entry(&dest.name)?.as_ref())
}

fn check_is_no_special_file(entry: Option<&Stat>) -> io::Result<()> {
    match entry {
        Some(entry) if !entry.is_file() && !entry.is_symlink() && !entry.is_dir() => {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is a device, FIFO or socket now: only a regular file can be replaced",
            ))
        }
        _ => Ok(()),
    }
}

/// Returns why a rename onto `name` in `dir`, which is `entry`, is known to fail.
fn obstacle(
    dir: &Directory,
    dir_stat: &Stat,
    name: &OsStr,
    entry: Option<Stat>,
) -> Option<Obstacle> {
    const STICKY: u32 = 0o1000;
    /// The minimum of `mkswap`, ten pages, in bytes. Smaller files need no check.
    const MIN_SWAP_SIZE: u64 = 10 * 4096;
    let of_dir = obstacle_of_directory(dir);
    let (None, Some(entry)) = (of_dir, entry) else {
        return of_dir;
    };
    let found = dir.restrictions(name);
    if found.mount_point {
        return Some(Obstacle::MountPoint);
    }
    if found.immutable {
        return Some(Obstacle::Immutable);
    }
    if found.append_only {
        return Some(Obstacle::AppendOnly);
    }
    if entry.is_file() && entry.size >= MIN_SWAP_SIZE && sys::is_swap(entry.id) {
        return Some(Obstacle::Swap);
    }
    let others = dir_stat.mode & STICKY != 0 && !sys::may_rename_in_sticky(&entry, dir_stat);
    others.then(|| Obstacle::OthersInStickyDirectory {
        owner: entry.uid.raw(),
    })
}

/// Fails if files in `dir` are known not to be renamable, for the destination `path`.
pub(crate) fn check_directory(dir: &Directory, path: &Path) -> Result<(), OpenError> {
    match obstacle_of_directory(dir) {
        None => Ok(()),
        Some(obstacle) => Err(OpenError::CannotReplace {
            path: path.to_owned(),
            obstacle,
        }),
    }
}

fn obstacle_of_directory(dir: &Directory) -> Option<Obstacle> {
    let found = dir.restrictions(OsStr::new(""));
    if found.immutable {
        Some(Obstacle::ImmutableDirectory)
    } else if found.append_only {
        Some(Obstacle::AppendOnlyDirectory)
    } else {
        None
    }
}

/// Resolves the target of a link, which must exist.
fn step(dir: &Directory, target: &Path, path: &Path) -> Result<(Directory, OsString), OpenError> {
    let dangling = || OpenError::DanglingSymlink {
        path: path.to_owned(),
        target: target.to_owned(),
    };
    let (parent, name) = split(target).ok_or_else(|| OpenError::NotAFile {
        path: path.to_owned(),
        is_dir: true,
    })?;
    let next = dir
        .open_below(parent)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => dangling(),
            _ => OpenError::OpenDirectory {
                path: parent_to_show(parent),
                source,
            },
        })?;
    match next.entry(name) {
        Ok(Some(_)) => Ok((next, name.to_owned())),
        Ok(None) => Err(dangling()),
        Err(source) => Err(OpenError::io("inspect", path, source)),
    }
}

/// Splits a path into directory and file name; `None` if it can only name a directory. (`Path`
/// ignores a trailing slash.)
fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.ends_with(b"/") || bytes.ends_with(b"/.") {
        return None;
    }
    Some((path.parent()?, path.file_name()?))
}

fn parent_to_show(parent: &Path) -> PathBuf {
    if parent.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        parent.to_owned()
    }
}

/// Returns whether a link may be followed.
///
/// This is Linux's rule for links in a directory that all users may write to,
/// `fs.protected_symlinks`. The kernel applies it to links that it follows itself, but this crate
/// follows links itself. The rule here is stricter: it applies wherever other users may write,
/// sticky or not. If the directory is not sticky, other users may exchange a link after its owner
/// was checked, so no link is followed. The owner of a directory may exchange any link, so no link
/// is followed in a directory of a user other than this one and root. An owner that this user
/// namespace does not map may be root: `/tmp` has such an owner in many containers.
fn may_follow(link: &Stat, dir: &Stat, others_may_write: bool) -> bool {
    const STICKY: u32 = 0o1000;
    let me = UserId::new(nix::unistd::geteuid().as_raw());
    let trusted = || link.uid.is_any_of(&[me, dir.uid]);
    let dir_is_trusted = dir.uid.is_any_of(&[me, UserId::ROOT]) || !dir.uid.is_mapped();
    dir_is_trusted && (!others_may_write || (dir.mode & STICKY != 0 && trusted()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Directory;

    /// Stands for root, which may be this user.
    const ROOT: u32 = u32::MAX;

    #[rstest::rstest]
    #[case::another_users_in_a_private_directory(0o755, false, 1, 0, true)]
    #[case::another_users_in_a_private_directory_of_root(0o755, false, 1, ROOT, true)]
    #[case::own_in_a_private_directory_of_another_user(0o755, false, 0, 2, false)]
    #[case::own_in_a_shared_sticky_directory(0o1777, true, 0, ROOT, true)]
    #[case::of_root_in_a_shared_sticky_directory_of_root(0o1777, true, ROOT, ROOT, true)]
    #[case::own_in_a_shared_sticky_directory_of_another_user(0o1777, true, 0, 2, false)]
    #[case::of_the_directory_owner(0o1777, true, 2, 2, false)]
    #[case::another_users(0o1777, true, 1, ROOT, false)]
    #[case::own_in_a_shared_directory(0o777, true, 0, 0, false)]
    #[case::another_users_where_a_group_may_write(0o1775, true, 1, 0, false)]
    #[case::own_where_a_group_may_write(0o2775, true, 0, 0, false)]
    fn only_links_of_trusted_users_are_followed(
        #[case] mode: u32,
        #[case] others_may_write: bool,
        #[case] link_of: u32,
        #[case] dir_of: u32,
        #[case] followed: bool,
    ) {
        let here = Directory::open(Path::new("/")).unwrap().stat;
        let me = nix::unistd::geteuid().as_raw();
        // Three different users; 0 is this one.
        let uid = |number: u32| match number {
            ROOT => UserId::ROOT,
            number => UserId::new(me.wrapping_add(number)),
        };
        let link = Stat {
            uid: uid(link_of),
            ..here
        };
        let dir = Stat {
            mode,
            uid: uid(dir_of),
            ..here
        };
        assert_eq!(may_follow(&link, &dir, others_may_write), followed);
    }

    #[test]
    fn a_link_that_the_kernel_follows_elsewhere_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("one"), "").unwrap();
        std::fs::write(path("other"), "").unwrap();
        std::os::unix::fs::symlink("one", path("link")).unwrap();
        let link = Link {
            dir: Directory::open(dir.path()).unwrap(),
            name: "link".into(),
        };
        let resolve = |name| Destination::resolve(&path(name), Symlinks::Follow).unwrap();
        assert!(!link.leads_elsewhere(&resolve("one")));
        assert!(link.leads_elsewhere(&resolve("other")));
        let (_, first) = Destination::follow(&path("link"), Symlinks::Follow).unwrap();
        assert_eq!(first.unwrap().path(), path("link"));
    }
}
