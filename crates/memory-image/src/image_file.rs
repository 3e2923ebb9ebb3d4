//! The bytes of images: files, and readers of the caller.
//!
//! Files that were opened by a path are in a pool, of which a bounded number is open at a time.
//!
//! When the limit is exceeded, the file that was opened first is closed. It is opened again when it
//! is read. A name proves nothing about the file that it leads to, so the reopened file must be the
//! one that was closed: the same inode, length, modification time and last bytes. In a sealed image
//! the last bytes are the checksum of its footer, which covers its random id. A raw image has no
//! such checksum, so its change time must be the same too. A file that cannot be found by its name
//! when it is to be closed stays open.
//!
//! Lock order: the state of a file, then [`POOL`]. A thread that takes a file out of the pool
//! releases the pool before it locks the file's state, and is the only one to close the file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use page_reader::PageReader;

/// Number of bytes at the end of a file that are compared when it is reopened. They include the
/// footer's checksum.
const END: usize = 64;

/// The files that are open and can be closed.
static POOL: Mutex<Pool> = Mutex::new(Pool {
    next: 0,
    open: BTreeMap::new(),
});

struct Pool {
    next: u64,
    /// Keyed by ticket: in the order of opening.
    open: BTreeMap<u64, Arc<Slot>>,
}

/// The source of an image's bytes.
pub(crate) enum ImageSource {
    File(ImageFile),
    Reader(Box<dyn PageReader + Send + Sync>),
}

impl fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => f.debug_tuple("File").field(file).finish(),
            Self::Reader(_) => f.debug_tuple("Reader").finish_non_exhaustive(),
        }
    }
}

/// An image's file, open or not.
#[derive(Debug)]
pub(crate) struct ImageFile(Arc<Slot>);

#[derive(Debug)]
struct Slot {
    path: PathBuf,
    sealed: bool,
    stamp: Stamp,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: Option<Arc<File>>,
    /// The key of the file in the pool. `None` while the pool does not have it.
    ticket: Option<u64>,
    /// How to reopen the file. Set when the file is closed for the first time.
    reopen_target: Option<ReopenTarget>,
}

#[derive(Debug)]
struct ReopenTarget {
    /// An absolute path without symbolic links.
    path: PathBuf,
    end: [u8; END],
}

/// Identifies a file and its version.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    /// `None` for a sealed image: hard links to it may be made, and its mode and owner may be set.
    changed: Option<(i64, i64)>,
}

impl Stamp {
    fn of(metadata: &Metadata, sealed: bool) -> Self {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (!sealed).then_some(changed),
        }
    }
}

/// A reason why a file cannot be reopened.
#[derive(Debug)]
pub(crate) enum ReopenError {
    /// Its path leads nowhere or to another file, or the file was written to since it was opened.
    Replaced,
    /// The error of the operating system.
    Io(io::Error),
}

impl ImageFile {
    /// Opens a file for the first time. Closes files of other images if the process has no
    /// descriptor left.
    pub(crate) fn open(path: &Path) -> io::Result<File> {
        loop {
            // O_NONBLOCK: opening a FIFO must not wait for its writer. It has no effect on a
            // regular file.
            let opened = File::options()
                .read(true)
                .custom_flags(nix::libc::O_NONBLOCK)
                .open(path);
            match opened {
                Err(error) if is_out_of_descriptors(&error) && close_one() => {}
                opened => return opened,
            }
        }
    }

    /// Adds a file that was just opened at `path`.
    pub(crate) fn new(path: &Path, file: File, metadata: &Metadata, sealed: bool) -> Self {
        let slot = Arc::new(Slot {
            path: path.to_owned(),
            sealed,
            stamp: Stamp::of(metadata, sealed),
            state: Mutex::new(State {
                file: None,
                ticket: None,
                reopen_target: None,
            }),
        });
        slot.admit(&mut locked(&slot.state), Arc::new(file));
        close_more_than(open_limit());
        Self(slot)
    }

    /// Keeps a file of the caller open. It has no path to open it again, so it is not in the pool.
    pub(crate) fn held(name: &Path, file: File, metadata: &Metadata, sealed: bool) -> Self {
        Self(Arc::new(Slot {
            path: name.to_owned(),
            sealed,
            stamp: Stamp::of(metadata, sealed),
            state: Mutex::new(State {
                file: Some(Arc::new(file)),
                ticket: None,
                reopen_target: None,
            }),
        }))
    }

    /// Returns the file, reopened if it was closed.
    pub(crate) fn get(&self) -> Result<Arc<File>, ReopenError> {
        let mut state = locked(&self.0.state);
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.0.reopen(&state)?);
        self.0.admit(&mut state, Arc::clone(&file));
        drop(state);
        close_more_than(open_limit());
        Ok(file)
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        let ticket = locked(&self.0.state).ticket;
        let taken = ticket.and_then(|ticket| locked(&POOL).open.remove(&ticket));
        // Closed after the pool is unlocked.
        drop(taken);
    }
}

impl Slot {
    fn admit(self: &Arc<Self>, state: &mut State, file: Arc<File>) {
        let mut pool = locked(&POOL);
        let ticket = pool.next;
        pool.next += 1;
        pool.open.insert(ticket, Arc::clone(self));
        state.file = Some(file);
        state.ticket = Some(ticket);
    }

    /// Closes the file, which is no longer in the pool, if it can be reopened. Returns whether it
    /// was closed.
    fn close(&self) -> bool {
        let mut state = locked(&self.state);
        state.ticket = None;
        let Some(file) = state.file.take() else {
            return false;
        };
        let reopen_target = state
            .reopen_target
            .take()
            .or_else(|| self.reopen_target(&file));
        state.reopen_target = reopen_target.filter(|target| self.is_at(&target.path));
        let can_be_closed = state.reopen_target.is_some();
        if !can_be_closed {
            state.file = Some(file);
        }
        can_be_closed
    }

    fn reopen_target(&self, file: &File) -> Option<ReopenTarget> {
        let path = fs::canonicalize(&self.path).ok()?;
        let end = end_of(file, self.stamp.len).ok()?;
        Some(ReopenTarget { path, end })
    }

    fn is_at(&self, path: &Path) -> bool {
        let metadata = fs::metadata(path);
        metadata.is_ok_and(|metadata| Stamp::of(&metadata, self.sealed) == self.stamp)
    }

    fn reopen(&self, state: &State) -> Result<File, ReopenError> {
        let reopen_target = state.reopen_target.as_ref().ok_or(ReopenError::Replaced)?;
        let file = ImageFile::open(&reopen_target.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ReopenError::Replaced,
            _ => ReopenError::Io(error),
        })?;
        let metadata = file.metadata().map_err(ReopenError::Io)?;
        if Stamp::of(&metadata, self.sealed) != self.stamp {
            return Err(ReopenError::Replaced);
        }
        match end_of(&file, self.stamp.len).map_err(ReopenError::Io)? == reopen_target.end {
            true => Ok(file),
            false => Err(ReopenError::Replaced),
        }
    }
}

/// Returns the last bytes of a file of `len` bytes, padded with leading zeros.
fn end_of(file: &File, len: u64) -> io::Result<[u8; END]> {
    let mut end = [0; END];
    let bytes = len.min(END as u64);
    file.read_exact_at(&mut end[END - bytes as usize..], len - bytes)?;
    Ok(end)
}

/// Closes the oldest file that can be reopened. Returns false if there is none.
fn close_one() -> bool {
    while let Some(oldest) = take_oldest(0) {
        if oldest.close() {
            return true;
        }
    }
    false
}

fn close_more_than(most: usize) {
    while let Some(oldest) = take_oldest(most) {
        oldest.close();
    }
}

/// Removes the oldest file from the pool if there are more than `most`.
fn take_oldest(most: usize) -> Option<Arc<Slot>> {
    let mut pool = locked(&POOL);
    if pool.open.len() <= most {
        return None;
    }
    pool.open.pop_first().map(|(_, slot)| slot)
}

/// Returns the limit of open files: a quarter of the process's limit, which leaves descriptors for
/// other uses.
fn open_limit() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    usize::try_from(limit / 4).map_or(usize::MAX, |quarter| quarter.max(1))
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
