//! States in which a file cannot be replaced.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::hostile::{USER, set_mode};

/// An attribute of `chattr` that is cleared on drop.
pub(crate) struct Attribute(&'static str, PathBuf);

impl Attribute {
    pub(crate) fn set(attribute: &'static str, path: &Path) -> Option<Self> {
        chattr(&format!("+{attribute}"), path).then(|| Self(attribute, path.to_owned()))
    }
}

impl Drop for Attribute {
    fn drop(&mut self) {
        assert!(chattr(&format!("-{}", self.0), &self.1));
    }
}

fn chattr(change: &str, path: &Path) -> bool {
    let chattr = Command::new("chattr").arg(change).arg(path).output();
    chattr.is_ok_and(|output| output.status.success())
}

/// Swap space that is disabled on drop.
pub(crate) struct Swap(PathBuf);

impl Swap {
    /// Makes `path` a file of swap space, and enables it. Returns `None` if that is not possible.
    pub(crate) fn enable(path: &Path) -> Option<Self> {
        fs::write(path, vec![0; 1 << 20]).unwrap();
        set_mode(path, 0o600);
        let run = |tool| {
            let output = Command::new(tool).arg(path).output();
            output.is_ok_and(|output| output.status.success())
        };
        (run("mkswap") && run("swapon")).then(|| Self(path.to_owned()))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        assert!(
            Command::new("swapoff")
                .arg(&self.0)
                .status()
                .unwrap()
                .success()
        );
    }
}

/// A mount point that is unmounted on drop.
pub(crate) struct MountPoint(PathBuf);

impl MountPoint {
    pub(crate) fn make(path: &Path) -> Self {
        let (kind, data) = (None::<&str>, None::<&str>);
        mount(Some(path), path, kind, MsFlags::MS_BIND, data).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// A state that ends on drop, if it must end for the directory to be removed.
pub(crate) enum Obstruction {
    Attribute(#[expect(dead_code, reason = "dropped")] Attribute),
    Swap(#[expect(dead_code, reason = "dropped")] Swap),
    MountPoint(#[expect(dead_code, reason = "dropped")] MountPoint),
    Planted,
}

/// States in which `rename(2)` replaces nothing.
pub(crate) const REFUSED_BY_THE_KERNEL: [&str; 8] = [
    "immutable",
    "append-only",
    "in an immutable directory",
    "in an append-only directory",
    "a mount point",
    "swap space",
    "a directory",
    "of another user in a sticky directory",
];

/// Makes the file at `path` irreplaceable for a user other than root and `USER`. Returns `None` if
/// this is not possible here.
pub(crate) fn obstruct(path: &Path, how: &str) -> Option<Obstruction> {
    let dir = path.parent().unwrap();
    let attribute = |name, path| Attribute::set(name, path).map(Obstruction::Attribute);
    match how {
        "immutable" => return attribute("i", path),
        "append-only" => return attribute("a", path),
        "in an immutable directory" => return attribute("i", dir),
        "in an append-only directory" => return attribute("a", dir),
        "a mount point" => return Some(Obstruction::MountPoint(MountPoint::make(path))),
        "swap space" => return Swap::enable(path).map(Obstruction::Swap),
        "of another user in a sticky directory" => {
            set_mode(dir, 0o1777);
            chown(path, Some(USER), Some(USER)).unwrap();
            return Some(Obstruction::Planted);
        }
        _ => fs::remove_file(path).unwrap(),
    }
    match how {
        "a directory" => fs::create_dir(path).unwrap(),
        "a FIFO" => mkfifo(path, Mode::S_IRWXU).unwrap(),
        "a socket" => drop(UnixListener::bind(path).unwrap()),
        other => panic!("no such state: {other}"),
    }
    Some(Obstruction::Planted)
}
