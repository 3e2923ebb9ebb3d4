//! The file behind RAM in another process.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::makedev;
use process_memory::{ProcessMaps, ProcessRegion};
use sparse_file::FileIdentity;

/// A file that a process has mapped.
pub(super) struct MappedFile<'m> {
    /// The mappings, as listed: the kernel splits a mapping, and has a link to the file for each
    /// part. Never empty.
    pub(super) lines: Vec<&'m ProcessRegion>,
}

/// Returns the files that are mapped in `ranges`.
pub(super) fn files_in<'m>(maps: &'m ProcessMaps, ranges: &[Range<u64>]) -> Vec<MappedFile<'m>> {
    let mut files = Vec::<MappedFile<'_>>::new();
    let lines = ranges.iter().flat_map(|range| maps.lines_in(range));
    for line in lines.filter(|line| line.inode != 0) {
        // Parts of one mapping follow each other.
        match files.iter_mut().rfind(|file| is_same(file.lines[0], line)) {
            Some(file) => file.lines.push(line),
            None => files.push(MappedFile { lines: vec![line] }),
        }
    }
    files
}

fn is_same(one: &ProcessRegion, other: &ProcessRegion) -> bool {
    (one.device, one.inode, &one.name) == (other.device, other.inode, &other.name)
}

impl MappedFile<'_> {
    /// Opens the file, for as long as which no restore can write to it. Returns all files that it
    /// may be, and whether it is among them or cannot be restored to.
    ///
    /// It is opened through a mapping, which requires a privilege. Otherwise it is one that the
    /// process has open, or that has the name of the mapping now, with the same inode number.
    /// Devices are not compared: on btrfs and overlayfs, a mapping is listed with another device
    /// than its file.
    pub(super) fn open(&self, pid: u32) -> (Vec<File>, bool) {
        if let Some(link) = self.link(pid) {
            return match open(&link) {
                Ok(file) => (Vec::from_iter(file), true),
                Err(_) => (Vec::new(), false),
            };
        }
        let mut is_known = !self.has_a_path();
        let (mut files, mut seen) = (Vec::new(), HashSet::new());
        for path in self.candidates(pid) {
            if let (Ok(file), Ok(metadata)) = (open(&path), fs::metadata(&path)) {
                is_known |= self.is_named(pid, &path) || self.has_numbers_of(&metadata);
                if seen.insert((metadata.dev(), metadata.ino())) {
                    files.extend(file);
                }
            }
        }
        (files, is_known)
    }

    /// Returns whether the file may be the one of these attributes.
    ///
    /// The file that has the name of the mapping now counts as mapped, because overlayfs lists
    /// mappings with other numbers than files. If no way leads to the file of the mapping, a file
    /// with the same inode number on any device may be it.
    pub(super) fn may_be(&self, pid: u32, metadata: &Metadata, identity: &FileIdentity) -> bool {
        let of_mapping = self.link(pid);
        let is_mapped = |path: &PathBuf| {
            FileIdentity::at(path).is_ok_and(|candidate| candidate.may_be(identity))
        };
        self.has_numbers_of(metadata)
            || of_mapping.iter().chain(&self.name_in(pid)).any(is_mapped)
            || of_mapping.is_none()
                && (self.candidates(pid).iter().any(is_mapped)
                    || self.lines[0].inode == metadata.ino() && !self.open(pid).1)
    }

    /// Returns the path by which the kernel leads to the file, if it can be followed.
    fn link(&self, pid: u32) -> Option<PathBuf> {
        let mut links = self.lines.iter().map(|line| {
            let Range { start, end } = line.addresses;
            PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
        });
        links.find(|link| fs::metadata(link).is_ok())
    }

    /// Returns the path at which the process sees the name of the mapping.
    fn name_in(&self, pid: u32) -> Option<PathBuf> {
        let name = &self.lines[0].name;
        let mut path = format!("/proc/{pid}/root").into_bytes();
        path.extend(name);
        name.starts_with(b"/")
            .then(|| OsString::from_vec(path).into())
    }

    /// Returns paths of files with the inode number of the mapping.
    fn candidates(&self, pid: u32) -> Vec<PathBuf> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
        let descriptors = descriptors.into_iter().flatten().flatten();
        let mut paths: Vec<_> = descriptors.map(|descriptor| descriptor.path()).collect();
        paths.extend(self.name_in(pid));
        paths.retain(|path| {
            fs::metadata(path).is_ok_and(|metadata| metadata.ino() == self.lines[0].inode)
        });
        paths
    }

    /// Returns whether a candidate has the name of the mapping: it is not just another file with
    /// the same inode number.
    fn is_named(&self, pid: u32, candidate: &Path) -> bool {
        let target = fs::read_link(candidate).map(|target| target.into_os_string().into_vec());
        target.is_ok_and(|name| name == self.lines[0].name)
            || self.name_in(pid).as_deref() == Some(candidate)
    }

    /// The numbers of a System V segment may be those of a memfd.
    fn has_numbers_of(&self, file: &Metadata) -> bool {
        let line = self.lines[0];
        let (major, minor) = line.device;
        let device = makedev(major.into(), minor.into());
        !line.name.starts_with(b"/SYSV") && (device, line.inode) == (file.dev(), file.ino())
    }

    /// Returns whether a path may lead to the file. None leads to shared memory without a file.
    fn has_a_path(&self) -> bool {
        let name = &self.lines[0].name[..];
        let is_anonymous =
            [&b"/dev/zero (deleted)"[..], b"/anon_hugepage (deleted)"].contains(&name);
        name.starts_with(b"/") && !name.starts_with(b"/SYSV") && !is_anonymous
    }
}

/// Opens a regular file, or returns `None` for another one.
fn open(path: &Path) -> std::io::Result<Option<File>> {
    // Other files may be devices, which opening has an effect on.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    // O_NONBLOCK: opening a FIFO must not wait for its writer.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    Ok(file.metadata()?.is_file().then_some(file))
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    /// Returns a mapping of the file that no link of the kernel leads to.
    fn line_of(path: &Path) -> ProcessRegion {
        let maps = ProcessMaps::of_this_process().unwrap();
        let mut line = maps.regions()[0].clone();
        let metadata = fs::metadata(path).unwrap();
        line.addresses = 1..2;
        line.inode = metadata.ino();
        // On btrfs, no mapping has the device of its file.
        line.device = (0, u32::from(u16::MAX));
        line.name = path.as_os_str().as_encoded_bytes().to_vec();
        line
    }

    /// Returns the number of files opened, and whether the file is among them.
    fn found(line: &ProcessRegion) -> (usize, bool) {
        let (files, is_known) = MappedFile { lines: vec![line] }.open(process::id());
        (files.len(), is_known)
    }

    fn may_be(line: &ProcessRegion, path: &Path) -> bool {
        MappedFile { lines: vec![line] }.may_be(
            process::id(),
            &fs::metadata(path).unwrap(),
            &FileIdentity::at(path).unwrap(),
        )
    }

    #[test]
    fn a_file_is_found_by_its_name_or_a_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let [ram, link] = ["ram", "link"].map(|name| dir.path().join(name));
        let file = File::create_new(&ram).unwrap();
        let mut line = line_of(&ram);
        assert_eq!(found(&line), (1, true));
        drop(file);
        assert_eq!(found(&line), (1, true));
        assert!(may_be(&line, &ram));

        let file = File::open(&ram).unwrap();
        fs::hard_link(&ram, &link).unwrap();
        fs::remove_file(&ram).unwrap();
        line.name.extend(b" (deleted)");
        assert_eq!(found(&line), (1, true));
        assert!(may_be(&line, &link));
        drop(file);
        assert_eq!(found(&line), (0, false));
    }

    #[test]
    fn missing_file_may_be_one_with_the_same_inode_number() {
        let dir = tempfile::tempdir().unwrap();
        let [ram, other] = ["ram", "other"].map(|name| dir.path().join(name));
        File::create_new(&ram).unwrap();
        File::create_new(&other).unwrap();
        let mut line = line_of(&ram);
        line.name = b"/no such file".to_vec();
        assert_eq!(found(&line), (0, false));
        assert!(may_be(&line, &ram));
        assert!(!may_be(&line, &other));
        // Its descriptor may be that of another file.
        let file = File::open(&ram).unwrap();
        assert_eq!(found(&line), (1, false));
        drop(file);
    }

    /// The number of a segment may be that of a memfd.
    #[test]
    fn shared_memory_without_a_path_is_no_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let mut line = line_of(path);
        let metadata = fs::metadata(path).unwrap();
        let device = metadata.dev();
        line.device = (
            nix::sys::stat::major(device) as u32,
            nix::sys::stat::minor(device) as u32,
        );
        for name in [
            "/SYSV00000000 (deleted)",
            "/dev/zero (deleted)",
            "[anon_shmem:ram]",
        ] {
            line.name = name.into();
            assert!(found(&line).1, "{name}");
        }
        line.name = b"/SYSV00000000 (deleted)".to_vec();
        let mapped = MappedFile { lines: vec![&line] };
        assert!(!mapped.has_numbers_of(&metadata));
        line.name = b"/other".to_vec();
        let mapped = MappedFile { lines: vec![&line] };
        assert!(mapped.has_numbers_of(&metadata));
    }
}
