//! Helpers for tests with another user.

use std::ffi::OsString;
use std::fs::{self};
use std::io::{self};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread;

use atomic_file::AtomicWriter;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, mkfifo, setfsgid, setfsuid};

pub(crate) const MEMBERS: [&str; 2] = ["vm.mem", "vm.state"];

pub(crate) const SECRET: &[u8] = b"the guest's keys";

pub(crate) const OTHER_USER: u32 = 12345;

/// A user other than root and `OTHER_USER`.
pub(crate) const USER: u32 = 12346;

pub(crate) const PRECIOUS: &[u8] = b"precious";

/// A directory `dir`, in a parent directory that all users may write to, and a directory `ours`
/// that must not change. Saves write `dir/dest`.
pub(crate) struct Place {
    root: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new(mode: u32) -> Self {
        let root = tempfile::tempdir().unwrap();
        let place = Self { root };
        for (name, mode) in [("dir", mode), ("ours", 0o755)] {
            fs::create_dir(place.path(name)).unwrap();
            set_mode(&place.path(name), mode);
        }
        set_mode(place.root.path(), 0o777);
        for name in ["ours/dest", "ours/victim"] {
            fs::write(place.path(name), PRECIOUS).unwrap();
        }
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn assert_ours_untouched(&self) {
        assert_eq!(super::names(&self.path("ours")), ["dest", "victim"]);
        for name in ["ours/dest", "ours/victim"] {
            let stat = fs::metadata(self.path(name)).unwrap();
            assert_eq!(fs::read(self.path(name)).unwrap(), PRECIOUS, "{name}");
            assert_eq!((stat.mode() & 0o7777, stat.nlink()), (0o644, 1), "{name}");
        }
    }
}

pub(crate) fn open_to_all(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Sets the file system IDs of this thread to those of the other user.
pub(crate) fn become_other_user() {
    become_user(OTHER_USER);
}

pub(crate) fn become_user(uid: u32) {
    setfsgid(Gid::from_raw(uid));
    setfsuid(Uid::from_raw(uid));
    // The call returns the current user.
    assert_eq!(setfsuid(Uid::from_raw(uid)).as_raw(), uid);
}

/// Returns the paths of staged and recycled files.
pub(crate) fn staged_files(place: &Place) -> Vec<PathBuf> {
    let is_stage = |name: &OsString| name.to_string_lossy().starts_with(".atomic-file-");
    let names = super::names(&place.path("dir")).into_iter();
    let dir = place.path("dir");
    names.filter(is_stage).map(|name| dir.join(name)).collect()
}

/// Replaces names as another user in a shared directory. Each call may fail.
pub(crate) fn plant(place: &Place, names: &[PathBuf], what: &str) {
    for name in names {
        let _ = fs::remove_file(name);
        let _ = match what {
            "a link" => symlink(place.path("ours/victim"), name),
            "a hard link" => fs::hard_link(place.path("ours/victim"), name),
            "a file" => fs::write(name, "planted").and_then(|()| open_to_all(name)),
            "a fifo" => mkfifo(name, Mode::from_bits_truncate(0o666)).map_err(Into::into),
            other => panic!("unknown entry: {other}"),
        };
    }
}

/// Runs `attack` as the other user.
pub(crate) fn as_other_user<T: Send>(attack: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let other_user = scope.spawn(|| {
            become_other_user();
            attack()
        });
        other_user.join().unwrap()
    })
}

/// Runs as that user.
pub(crate) fn as_user<T: Send>(uid: u32, job: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let user = scope.spawn(|| {
            become_user(uid);
            job()
        });
        user.join().unwrap()
    })
}

/// The hash in the names of the files staged for `dest`.
pub(crate) fn hash_of(dest: &Path) -> String {
    let writer = AtomicWriter::open(dest).unwrap();
    let name = writer.staged_path().file_name().unwrap().to_str().unwrap();
    name.split('-').nth(2).unwrap().to_owned()
}

/// Runs `job`, and kills it at its `nth` call of `call`.
pub(crate) fn die_at(job: &str, dir: &Path, call: &str, nth: usize) {
    let kill = format!("inject={call}:signal=KILL:when={nth}");
    let args = ["-o", "/dev/null", "-e", &kill];
    assert_eq!(super::under_strace(job, dir, &args), None);
}

/// A directory of the other user with the file `dir/dest`.
pub(crate) fn other_users_place(names: &[&str]) -> Place {
    let place = Place::new(0o755);
    let dir = place.path("dir");
    for name in names {
        fs::write(dir.join(name), "old").unwrap();
        set_mode(&dir.join(name), 0o644);
        std::os::unix::fs::chown(dir.join(name), Some(OTHER_USER), None).unwrap();
    }
    std::os::unix::fs::chown(&dir, Some(OTHER_USER), None).unwrap();
    place
}

/// Returns a record for files that the other user staged.
pub(crate) fn forged(dir: &Path, dest: &str) -> Vec<u8> {
    forged_for(dir, ".atomic-file-01234567-0123456789abcdef.stage", dest)
}

/// Returns a record for a file that is staged under this name.
pub(crate) fn forged_for(dir: &Path, staged: &str, dest: &str) -> Vec<u8> {
    fs::write(dir.join(staged), "forged").unwrap();
    let mut bytes = b"ATOMGRP\n\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend(fs::metadata(dir.join(staged)).unwrap().ino().to_le_bytes());
    bytes.extend(6u64.to_le_bytes());
    for name in [staged, dest] {
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}
