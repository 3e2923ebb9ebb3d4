//! What a guest touched first after it was restored.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use atomic_file::{AtomicWriter, CommitError, OpenError};
use thiserror::Error;

/// Runs of pages in a working set at most. A guest that touches more has no working set but its RAM.
const MAX_RUNS: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"MEMSNAPW";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const RUN: usize = 16;

/// The pages that a guest touched after it was restored, in the order in which it first did: what to bring in first the next time.
///
/// Recorded by a [`LazyRam`](crate::LazyRam). It's advice: whatever it says, the guest's RAM comes out right. Memory: 16 bytes for each run
/// of pages touched one after another, 16 MiB at most; what is touched after that is not recorded.
///
/// # The file
/// | bytes, little-endian | what |
/// |---|---|
/// | 0..8 | `MEMSNAPW` |
/// | 8..12 | the version, 1 |
/// | 12..16 | CRC-32 (IEEE) of everything after it |
/// | 16..24 | the size of the guest's RAM in bytes |
/// | then, 16 each | the runs: offset in the RAM and length, in bytes |
///
/// Every run is inside the RAM and not empty, and together they are no longer than it.
///
/// # Examples
/// See [`LazyRam`](crate::LazyRam#examples).
#[derive(Clone, Debug, PartialEq, Eq)]
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

    /// Adds pages touched for the first time. The last one may end past the RAM, which need not be a whole
    /// number of the host's pages.
    pub(crate) fn touch(&mut self, pages: Range<u64>) {
        let pages = pages.start..pages.end.min(self.ram_size);
        let full = self.runs.len() == MAX_RUNS;
        match self.runs.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ if full => {}
            _ => self.runs.push(pages),
        }
    }

    /// The runs of pages, in bytes from the start of the RAM, in the order of their first touch. Neighbours touched one after the other are one run.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().cloned()
    }

    /// How many bytes are in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// The size of the guest's RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// Writes it to a file, replaced atomically and durably, with mode 0600.
    ///
    /// # Errors
    /// [`WorkingSetError`]; unless it is [`Commit`](WorkingSetError::Commit), which says more, the file is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), WorkingSetError> {
        let mut stage = AtomicWriter::open(path.as_ref())?;
        let written = stage.write_all(&self.encode());
        written.map_err(|source| WorkingSetError::Write {
            path: path.as_ref().to_owned(),
            source,
        })?;
        Ok(stage.commit()?)
    }

    /// Reads it from a file.
    ///
    /// # Errors
    /// [`WorkingSetError::Read`]; [`WorkingSetError::Malformed`] for anything but a working set that was saved.
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
            return Err("it does not begin as one");
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

/// What stands after the checksum, with what stands before it.
fn framed(body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The bytes of a regular file, if there are not more.
fn read_at_most(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    // O_NONBLOCK: opening a FIFO must not wait for its writer. A regular file does not care.
    let nonblock = nix::libc::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(nonblock)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Why a working set could not be saved or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The file can't be read.
    #[error("cannot read the working set {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{path:?} is no working set: {what}; record it again")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The new file could not be staged.
    #[error("the working set was not saved")]
    Stage(#[from] OpenError),
    /// The new file could not be written.
    #[error("the working set {path:?} was not saved")]
    Write {
        /// The destination.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The new file was not committed; the error says whether the destination was replaced.
    #[error("the commit of the working set failed")]
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

    /// A file of these runs, whatever they are, with the right checksum.
    fn file(ram_size: u64, runs: &[[u64; 2]]) -> Vec<u8> {
        let words = std::iter::once(&ram_size).chain(runs.as_flattened());
        framed(
            &words
                .flat_map(|word| word.to_le_bytes())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn neighbours_touched_one_after_the_other_are_one_run() {
        let runs = [
            7 * 4096..10 * 4096,
            3 * 4096..5 * 4096,
            200 * 4096..201 * 4096,
        ];
        assert!(sample().runs().eq(runs));
        assert_eq!(sample().bytes(), 6 * 4096);
    }

    #[test]
    fn what_is_saved_is_loaded_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        std::fs::write(&path, b"old").unwrap();
        sample().save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), sample());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// The layout is a promise: this is a file of version 1.
    #[test]
    fn the_file_is_laid_out_as_documented() {
        let bytes = file(8192, &[[4096, 4096]]);
        assert_eq!(&bytes[..12], b"MEMSNAPW\x01\0\0\0");
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
    fn a_hostile_file_is_refused(#[case] bytes: Vec<u8>, #[case] says: &str) {
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
    fn a_run_cut_in_half_is_refused_whatever_the_checksum() {
        let mut bytes = sample().encode();
        bytes.truncate(bytes.len() - 8);
        assert_eq!(
            WorkingSet::decode(&framed(&bytes[16..])),
            Err("it ends inside a run")
        );
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = sample().encode();
        bytes[8] = 2;
        assert_eq!(WorkingSet::decode(&bytes), Err("its version is not 1"));
    }

    #[test]
    fn what_is_no_regular_file_or_too_large_is_not_read() {
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
    fn a_guest_that_touches_everything_at_random_is_recorded_up_to_a_bound() {
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
        fn any_bytes_are_decoded_or_refused(
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
