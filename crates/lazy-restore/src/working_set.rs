//! Working sets: the pages that a guest touched after it was restored.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use atomic_file::{AtomicWriter, CommitError, OpenError};
use thiserror::Error;

/// Maximum number of runs in a working set. A guest that touches more runs uses all of its RAM.
const MAX_RUNS: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"RAMSNAPW";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const RUN: usize = 16;

/// The pages that a guest touched after it was restored, in the order of the first touch: the pages
/// to read first at the next restore.
///
/// [`LazyRam`](crate::LazyRam) records it. A working set is only a hint: the content of the guest's
/// RAM does not depend on it. It takes 16 bytes for each run of pages touched in sequence, 16 MiB
/// at most. Later touches are not recorded.
///
/// # The file
/// | bytes, little-endian | content |
/// |---|---|
/// | 0..8 | `RAMSNAPW` |
/// | 8..12 | the version, 1 |
/// | 12..16 | CRC-32 (IEEE) of everything after it |
/// | 16..24 | the size of the guest's RAM in bytes |
/// | then, 16 each | the runs: offset in the RAM and length, in bytes |
///
/// Every run is inside the RAM and not empty. The total length of the runs is at most the size of
/// the RAM.
///
/// # Examples
/// See [`LazyRam`](crate::LazyRam#examples).
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a working set is lost unless it is saved or used"]
pub struct WorkingSet {
    ram_size: u64,
    runs: Vec<Range<u64>>,
}

impl WorkingSet {
    pub(crate) fn of(ram_size: u64) -> Self {
        Self {
            ram_size,
            runs: Vec::new(),
        }
    }

    /// Adds pages that were touched for the first time. The last page may end past the RAM, whose
    /// size need not be a multiple of the host's page.
    pub(crate) fn touch(&mut self, pages: Range<u64>) {
        let pages = pages.start..pages.end.min(self.ram_size);
        let full = self.runs.len() == MAX_RUNS;
        match self.runs.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ if full => {}
            _ => self.runs.push(pages),
        }
    }

    /// Returns the runs of pages, in bytes from the start of the RAM, in the order of their first
    /// touch. Adjacent pages touched in sequence are one run.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().cloned()
    }

    /// Returns the number of bytes in the runs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// Returns the size of the guest's RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// Writes the working set to a file, which it replaces atomically and durably, with mode 0600.
    ///
    /// # Errors
    /// Returns a [`WorkingSetError`]. The destination is unchanged, except after
    /// [`Commit`](WorkingSetError::Commit), which reports the state of the destination.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), WorkingSetError> {
        let mut stage = AtomicWriter::open(path.as_ref())?;
        let written = stage.write_all(&self.encode());
        written.map_err(|source| WorkingSetError::Write {
            path: path.as_ref().to_owned(),
            source,
        })?;
        Ok(stage.commit()?)
    }

    /// Reads a working set from a file.
    ///
    /// # Errors
    /// Returns [`WorkingSetError::Read`]; [`WorkingSetError::Malformed`] for a file that is not a
    /// saved working set.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, WorkingSetError> {
        let path = path.as_ref();
        let bytes = read_at_most(path, HEADER + MAX_RUNS * RUN);
        let bytes = bytes.map_err(|source| WorkingSetError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::decode(&bytes).map_err(|what| WorkingSetError::Malformed {
            path: path.to_owned(),
            what,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = self.ram_size.to_le_bytes().to_vec();
        for run in &self.runs {
            body.extend(run.start.to_le_bytes());
            body.extend((run.end - run.start).to_le_bytes());
        }
        framed(&body)
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or("it is too short")?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or("it is too short")?;
        let (sum, body) = rest.split_first_chunk::<4>().ok_or("it is too short")?;
        let (ram_size, runs) = body.split_first_chunk::<8>().ok_or("it is too short")?;
        if *magic != MAGIC {
            return Err("it does not begin with RAMSNAPW");
        }
        if u32::from_le_bytes(*version) != VERSION {
            return Err("its version is not 1");
        }
        if u32::from_le_bytes(*sum) != crc32fast::hash(body) {
            return Err("its checksum is wrong");
        }
        let (words, []) = runs.as_chunks::<8>() else {
            return Err("it ends inside a run");
        };
        let (pairs, []) = words.as_chunks::<2>() else {
            return Err("it ends inside a run");
        };
        let ram_size = u64::from_le_bytes(*ram_size);
        let (mut runs, mut left) = (Vec::with_capacity(pairs.len()), ram_size);
        for pair in pairs {
            let [start, len] = pair.map(u64::from_le_bytes);
            let end = start.checked_add(len).filter(|end| *end <= ram_size);
            let end = end.ok_or("a run ends past the RAM")?;
            if len == 0 {
                return Err("a run is empty");
            }
            left = left
                .checked_sub(len)
                .ok_or("its runs are longer than the RAM")?;
            runs.push(start..end);
        }
        Ok(Self { ram_size, runs })
    }
}

/// Prepends the header to the bytes that its checksum covers.
fn framed(body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Reads a regular file of at most `most` bytes.
fn read_at_most(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    // O_NONBLOCK: opening a FIFO must not wait for its writer. It has no effect on a regular file.
    let nonblock = nix::libc::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(nonblock)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// An error returned if a working set could not be saved or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The file cannot be read.
    #[error("failed to read the working set {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file is not a working set.
    #[error("{path:?} is not a valid working set, because {what}: record it again")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The defect, as text.
        what: &'static str,
    },
    /// The new file could not be staged.
    #[error("failed to stage the working set: {0}")]
    Stage(#[from] OpenError),
    /// The new file could not be written.
    #[error("failed to write the working set {path:?}: {source}")]
    Write {
        /// The destination.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The new file was not committed. The error reports whether the destination was replaced.
    #[error("failed to commit the working set: {0}")]
    Commit(#[from] CommitError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn sample() -> WorkingSet {
        let mut set = WorkingSet::of(1 << 20);
        for page in [7, 8, 9, 3, 4, 200] {
            set.touch(page * 4096..(page + 1) * 4096);
        }
        set
    }

    /// Encodes these runs, valid or not, with the right checksum.
    fn file(ram_size: u64, runs: &[[u64; 2]]) -> Vec<u8> {
        let words = std::iter::once(&ram_size).chain(runs.as_flattened());
        framed(
            &words
                .flat_map(|word| word.to_le_bytes())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn adjacent_pages_touched_in_sequence_form_one_run() {
        let runs = [
            7 * 4096..10 * 4096,
            3 * 4096..5 * 4096,
            200 * 4096..201 * 4096,
        ];
        assert!(sample().runs().eq(runs));
        assert_eq!(sample().bytes(), 6 * 4096);
    }

    #[test]
    fn saved_working_set_is_loaded_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        std::fs::write(&path, b"old").unwrap();
        sample().save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), sample());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// The layout is stable: this is a file of version 1.
    #[test]
    fn file_layout_matches_the_documentation() {
        let bytes = file(8192, &[[4096, 4096]]);
        assert_eq!(&bytes[..12], b"RAMSNAPW\x01\0\0\0");
        assert_eq!(
            &bytes[16..],
            [
                0, 32, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0
            ]
        );
        assert_eq!(bytes[12..16], 0x8298_c539_u32.to_le_bytes());
    }

    #[rstest]
    #[case::past_the_ram(file(8192, &[[4096, 4097]]), "past the RAM")]
    #[case::past_the_last_address(file(8192, &[[u64::MAX, 2]]), "past the RAM")]
    #[case::empty_run(file(8192, &[[4096, 0]]), "empty")]
    #[case::a_page_twice(file(8192, &[[0, 8192], [0, 1]]), "longer than the RAM")]
    #[case::half_a_run(file(8192, &[[0, 1]])[..HEADER + 8].to_vec(), "checksum")]
    #[case::another_file(vec![7; 1000], "begin")]
    #[case::no_bytes(vec![], "short")]
    fn malformed_file_is_refused(#[case] bytes: Vec<u8>, #[case] says: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        std::fs::write(&path, bytes).unwrap();
        let error = WorkingSet::load(&path).unwrap_err();
        assert!(
            matches!(&error, WorkingSetError::Malformed { what, .. } if what.contains(says)),
            "{error}"
        );
    }

    #[test]
    fn truncated_run_with_a_valid_checksum_is_refused() {
        let mut bytes = sample().encode();
        bytes.truncate(bytes.len() - 8);
        assert_eq!(
            WorkingSet::decode(&framed(&bytes[16..])),
            Err("it ends inside a run")
        );
    }

    #[test]
    fn unknown_version_is_refused() {
        let mut bytes = sample().encode();
        bytes[8] = 2;
        assert_eq!(WorkingSet::decode(&bytes), Err("its version is not 1"));
    }

    #[test]
    fn irregular_or_oversized_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, huge) = (dir.path().join("fifo"), dir.path().join("huge"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        File::create(&huge).unwrap().set_len(1 << 40).unwrap();
        for path in [fifo, huge, dir.path().to_owned(), dir.path().join("none")] {
            let error = WorkingSet::load(&path).unwrap_err();
            assert!(matches!(error, WorkingSetError::Read { .. }), "{error:?}");
        }
    }

    #[test]
    fn number_of_recorded_runs_is_bounded() {
        let mut set = WorkingSet::of(u64::MAX);
        for page in 0..MAX_RUNS as u64 + 10 {
            set.touch(page * 8192..page * 8192 + 4096);
        }
        assert_eq!(set.runs().count(), MAX_RUNS);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        set.save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), set);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_decoded_or_refused(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                prop::collection::vec(any::<u8>(), 0..200).prop_map(|body| framed(&body)),
                (any::<u64>(), prop::collection::vec([0..9_u64, 0..9_u64], 0..6)).prop_map(|(size, runs)| file(size, &runs)),
            ],
        ) {
            if let Ok(set) = WorkingSet::decode(&bytes) {
                prop_assert_eq!(set.encode(), bytes);
            }
        }
    }
}
