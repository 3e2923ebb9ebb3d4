//! Whether two names of a directory refer to one file.

use std::ffi::OsStr;
use std::io;

use crate::directory::Directory;
use crate::stat::Stat;
#[cfg(any(target_os = "linux", target_os = "android"))]
use crate::stat::stat_of;

/// Returns whether two names refer to the same file, which has only one link: the directory takes
/// them for spellings of one name.
///
/// Identities from different times are not enough for this. Between the two looks, another program
/// may have replaced the first file, and the second name may be that of a new file with its inode
/// number.
pub(super) fn is_one_file(dir: &Directory, one: &OsStr, other: &OsStr) -> io::Result<bool> {
    // Both are kept open, so that their inode numbers are not reused.
    let (Some(first), Some(second)) = (Held::open(dir, one)?, Held::open(dir, other)?) else {
        return Ok(false);
    };
    is_held_by_both(dir, [one, other], [&first, &second])
}

/// Returns whether both names still refer to the file that was found under each of them.
fn is_held_by_both(
    dir: &Directory,
    names: [&OsStr; 2],
    [first, second]: [&Held; 2],
) -> io::Result<bool> {
    let stat = second.stat()?;
    // Two names of a file with several links are different destinations.
    if first.stat()?.id != stat.id || stat.links != 1 {
        return Ok(false);
    }
    // The file may have been renamed from the first name to the second one in between.
    for name in names {
        if dir.entry(name)?.map(|entry| entry.id) != Some(stat.id) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A file whose inode number is not reused while this exists.
struct Held {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    file: std::fs::File,
    /// APFS and HFS+ do not reuse inode numbers.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    stat: Stat,
}

#[cfg(any(target_os = "linux", target_os = "android"))]
impl Held {
    fn open(dir: &Directory, name: &OsStr) -> io::Result<Option<Self>> {
        use nix::fcntl::OFlag;

        // `O_PATH` requires no permission on the file and does not open it.
        match dir.open_for(OFlag::O_PATH, name) {
            Ok(file) => Ok(Some(Self { file })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn stat(&self) -> io::Result<Stat> {
        stat_of(&self.file)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
impl Held {
    fn open(dir: &Directory, name: &OsStr) -> io::Result<Option<Self>> {
        Ok(dir.entry(name)?.map(|stat| Self { stat }))
    }

    // On Linux, this fails if `fstat(2)` does.
    #[allow(clippy::unnecessary_wraps)]
    fn stat(&self) -> io::Result<Stat> {
        Ok(self.stat)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn same(dir: &Path, one: &str, other: &str) -> bool {
        let dir = Directory::open(dir).unwrap();
        is_one_file(&dir, one.as_ref(), other.as_ref()).unwrap()
    }

    #[test]
    fn spellings_of_one_name_are_one_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!same(dir.path(), "vm.mem", "./vm.mem"), "there is no file");
        std::fs::write(dir.path().join("vm.mem"), "").unwrap();
        std::fs::write(dir.path().join("vm.state"), "").unwrap();
        assert!(same(dir.path(), "vm.mem", "./vm.mem"));
        assert!(!same(dir.path(), "vm.mem", "vm.state"));
    }

    /// The file is renamed between the two looks.
    #[test]
    fn a_file_that_is_renamed_meanwhile_has_one_name() {
        let held = tempfile::tempdir().unwrap();
        let dir = Directory::open(held.path()).unwrap();
        let [one, other] = ["one", "other"].map(|name| held.path().join(name));
        let names = ["one", "other"].map(OsStr::new);
        let open = |name| Held::open(&dir, name).unwrap().unwrap();
        std::fs::write(&one, "").unwrap();
        let first = open(names[0]);
        std::fs::rename(&one, &other).unwrap();
        let second = open(names[1]);
        assert!(!is_held_by_both(&dir, names, [&first, &second]).unwrap());
        // The first name is that of another file by now.
        std::fs::write(&one, "").unwrap();
        assert!(!is_held_by_both(&dir, names, [&first, &second]).unwrap());
        let names = ["other", "./other"].map(OsStr::new);
        assert!(is_held_by_both(&dir, names, [&first, &second]).unwrap());
    }

    #[test]
    fn links_and_missing_files_are_different() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        std::fs::write(&one, "").unwrap();
        assert!(!same(dir.path(), "one", "other"));
        std::fs::hard_link(&one, &other).unwrap();
        assert!(!same(dir.path(), "one", "other"));
        std::fs::remove_file(&one).unwrap();
        std::os::unix::fs::symlink("other", &one).unwrap();
        assert!(!same(dir.path(), "one", "other"));
    }
}
