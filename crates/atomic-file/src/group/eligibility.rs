//! Which writers can be members of a group.

use std::ffi::{OsStr, OsString};

use super::add_error::Ineligible;
use super::same_file::is_one_file;
use super::{AtomicGroup, len_in_record};
use crate::destination::Destination;
use crate::directory::Directory;
use crate::records::MAX_RECORD_LEN;
use crate::sys;
use crate::writer::AtomicWriter;

impl AtomicGroup {
    /// Returns the reason why `writer` cannot be a member; `None` if it can.
    pub(super) fn ineligible(&self, writer: &AtomicWriter) -> Option<Ineligible> {
        let dir = &writer.dest.dir;
        let others = || self.members.iter().map(|member| &member.dest);
        if writer.staged.dir().stat.id != dir.stat.id {
            Some(Ineligible::StagedElsewhere)
        } else if others().any(|other| other.dir.stat.id != dir.stat.id) {
            Some(Ineligible::OtherDirectory)
        } else if others().any(|other| other.name == writer.dest.name) {
            Some(Ineligible::SameDestination)
        } else if others().any(|other| names_same_file(writer, other)) {
            Some(Ineligible::SameFile)
        } else if self.record_len + len_in_record(writer) > MAX_RECORD_LEN {
            Some(Ineligible::TooManyMembers)
        } else if writer.no_clobber {
            Some(Ineligible::NoClobber)
        } else if writer.replace_only.is_some() {
            Some(Ineligible::ReplaceOnly)
        } else if !writer.staged.is_locked() {
            Some(Ineligible::NoLocks)
        } else if !sys::has_lasting_inode_numbers(dir).unwrap_or(false) {
            Some(Ineligible::NoInodeNumbers)
        } else if dir
            .generation(writer.staged.name())
            .is_ok_and(|found| found == 0)
        {
            Some(Ineligible::NoGenerations)
        } else {
            None
        }
    }
}

/// Returns whether the destinations, which have different names in one directory, are known to be
/// the same file: by the inode number of an existing file, or by case.
///
/// Names that differ only in Unicode composition ("é" as one or two code points) are not
/// recognized while neither file exists. The commit compares the files again.
fn names_same_file(writer: &AtomicWriter, other: &Destination) -> bool {
    let dest = &writer.dest;
    let ids = [dest, other].map(|dest| dest.entry.map(|entry| (entry.id, entry.links)));
    // Two names of a file with several links are different destinations.
    if let [Some((one, 1)), Some((another, 1))] = ids
        && one == another
        // The commit fails if it cannot tell either.
        && is_one_file(&dest.dir, &dest.name, &other.name).unwrap_or(false)
    {
        return true;
    }
    case_folded(&dest.name) == case_folded(&other.name)
        && ignores_case(&dest.dir, writer.staged.name())
}

/// Looks up the staged file's name, which is random and lower-case, in upper case. Inode numbers
/// are not compared: a FUSE server may return a different one for each spelling.
fn ignores_case(dir: &Directory, staged: &OsStr) -> bool {
    dir.entry(&staged.to_ascii_uppercase())
        .is_ok_and(|entry| entry.is_some())
}

/// Returns the name as a case-insensitive directory compares it.
fn case_folded(name: &OsStr) -> OsString {
    match name.to_str() {
        // Convert to upper case first: some lower-case letters become several upper-case ones.
        Some(name) => name.to_uppercase().to_lowercase().into(),
        None => name.to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn names_of_one_file_match_if_the_directory_ignores_case() {
        const NAMES: [(&str, &str, bool); 4] = [
            ("vm.mem", "VM.MEM", true),
            ("\u{e9}tat", "\u{c9}tat", true),
            ("vm.mem", "vm.state", false),
            ("vm.mem", "vm-mem", false),
        ];
        let same = |dir: &std::path::Path, one: &str, other: &str| {
            let open = |name| AtomicWriter::open(dir.join(name)).unwrap();
            names_same_file(&open(one), &open(other).dest)
        };
        let dir = tempfile::tempdir().unwrap();
        for (one, other, _) in NAMES {
            assert!(!same(dir.path(), one, other), "{one} {other}");
        }
        test_machine::needs!(Mount(test_machine::FileSystem::EXFAT));
        let disk = test_machine::LoopMount::new(test_machine::FileSystem::EXFAT).unwrap();
        for (one, other, expected) in NAMES {
            assert_eq!(same(disk.path(), one, other), expected, "{one} {other}");
        }
    }

    /// A commit between the two calls of `open` frees the inode number that the first one saw.
    #[test]
    fn a_reused_inode_number_does_not_make_one_file_of_two() {
        let dir = tempfile::tempdir().unwrap();
        let mut open = ["vm.mem", "vm.state"].map(|name| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            AtomicWriter::open(path).unwrap()
        });
        open[0].dest.entry = open[1].dest.entry;
        let [memory, state] = open;
        let mut group = AtomicGroup::new();
        group.add(memory).unwrap();
        group.add(state).unwrap();
        group.commit().unwrap();
    }

    /// As when another program creates the file once both writers are members, in a directory that
    /// takes their names for spellings of one name.
    #[test]
    fn the_commit_refuses_two_spellings_of_one_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.mem");
        let [one, mut other] = [(); 2].map(|()| AtomicWriter::open(&path).unwrap());
        other.dest.name = "./vm.mem".into();
        let mut group = AtomicGroup::new();
        group.add(one).unwrap();
        group.add(other).unwrap();
        std::fs::write(&path, "old").unwrap();
        let error = group.commit().unwrap_err();
        let crate::GroupCommitError::NothingReplaced { step, source, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!(step, crate::CommitStep::Destination);
        assert!(source.to_string().contains("names of one file"), "{source}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    /// In a directory that takes the names for spellings of one name.
    #[test]
    fn two_spellings_of_the_name_of_a_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.mem");
        std::fs::write(&path, "old").unwrap();
        let [one, mut other] = [(); 2].map(|()| AtomicWriter::open(&path).unwrap());
        other.dest.name = "./vm.mem".into();
        assert!(names_same_file(&one, &other.dest));
        let mut group = AtomicGroup::new();
        group.add(one).unwrap();
        assert!(matches!(
            group.ineligible(&other),
            Some(Ineligible::SameFile)
        ));
    }

    /// A file with several links may have both names.
    #[test]
    fn hard_links_are_different_destinations() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        std::fs::write(&one, "").unwrap();
        std::fs::hard_link(&one, &other).unwrap();
        let open = |path| AtomicWriter::open(path).unwrap();
        assert!(!names_same_file(&open(&one), &open(&other).dest));
    }
}
