//! The files of images, of which a bounded number is open at a time, however many images there are.
//!
//! A file that is over the bound is closed, the one that was opened first before others, and opened again when it is read. A
//! name says nothing about the bytes behind it, so a file that is opened again must be the one that was closed: the same inode, as
//! long and last written at the same time, with the same last bytes. Those are the checksum of a sealed image's footer, in which
//! its random id is. A raw image has none, so its inode must not have been changed either, by whatever means. A file that
//! can't be found by its name when it is to be closed stays open.
//!
//! Lock order: the state of a file, then [`POOL`]. Whoever takes a file out of the pool releases the pool before it takes the
//! file's state, and is the only one to close it.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

/// Bytes at the end of a file that are compared when it is opened again: a footer ends with its checksum in these.
const END: usize = 64;

/// The files that are open and can be closed.
static POOL: Mutex<Pool> = Mutex::new(Pool {
    next: 0,
    open: BTreeMap::new(),
});

struct Pool {
    next: u64,
    /// By ticket: in the order in which they were opened.
    open: BTreeMap<u64, Arc<Slot>>,
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
    /// Its place in the pool, if it is there.
    ticket: Option<u64>,
    /// How to open it again; known since it was closed for the first time.
    way_back: Option<WayBack>,
}

#[derive(Debug)]
struct WayBack {
    /// Absolute, and of no links.
    path: PathBuf,
    end: [u8; END],
}

/// What tells a file from another one, and from itself after a write.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    /// Not of a sealed image: links to it may be made, its mode and owner may be set.
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

/// Why a file can't be opened again.
#[derive(Debug)]
pub(crate) enum ReopenError {
    /// Its path leads to nothing, to another file, or to what was written to meanwhile.
    Replaced,
    /// What the system said.
    Io(io::Error),
}

impl ImageFile {
    /// Opens a file for the first time. Closes files of other images if the process can't have more descriptors.
    pub(crate) fn open(path: &Path) -> io::Result<File> {
        loop {
            // O_NONBLOCK: opening a FIFO must not wait for its writer. A regular file does not care.
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

    /// Takes a file that was just opened at `path`.
    pub(crate) fn new(path: &Path, file: File, metadata: &Metadata, sealed: bool) -> Self {
        let slot = Arc::new(Slot {
            path: path.to_owned(),
            sealed,
            stamp: Stamp::of(metadata, sealed),
            state: Mutex::new(State {
                file: None,
                ticket: None,
                way_back: None,
            }),
        });
        slot.admit(&mut locked(&slot.state), Arc::new(file));
        close_more_than(most());
        Self(slot)
    }

    /// Returns the file, opened again if it was closed.
    pub(crate) fn get(&self) -> Result<Arc<File>, ReopenError> {
        let mut state = locked(&self.0.state);
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.0.reopen(&state)?);
        self.0.admit(&mut state, Arc::clone(&file));
        drop(state);
        close_more_than(most());
        Ok(file)
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        let ticket = locked(&self.0.state).ticket;
        let taken = ticket.and_then(|ticket| locked(&POOL).open.remove(&ticket));
        // Closed when the pool is unlocked.
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

    /// Closes the file, which is not in the pool any more, if it can be opened again. Returns whether it was closed.
    fn close(&self) -> bool {
        let mut state = locked(&self.state);
        state.ticket = None;
        let Some(file) = state.file.take() else {
            return false;
        };
        let way_back = state.way_back.take().or_else(|| self.way_back(&file));
        state.way_back = way_back.filter(|way| self.is_at(&way.path));
        let can_be_closed = state.way_back.is_some();
        if !can_be_closed {
            state.file = Some(file);
        }
        can_be_closed
    }

    fn way_back(&self, file: &File) -> Option<WayBack> {
        let path = fs::canonicalize(&self.path).ok()?;
        let end = end_of(file, self.stamp.len).ok()?;
        Some(WayBack { path, end })
    }

    fn is_at(&self, path: &Path) -> bool {
        let metadata = fs::metadata(path);
        metadata.is_ok_and(|metadata| Stamp::of(&metadata, self.sealed) == self.stamp)
    }

    fn reopen(&self, state: &State) -> Result<File, ReopenError> {
        let way_back = state.way_back.as_ref().ok_or(ReopenError::Replaced)?;
        let file = ImageFile::open(&way_back.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ReopenError::Replaced,
            _ => ReopenError::Io(error),
        })?;
        let metadata = file.metadata().map_err(ReopenError::Io)?;
        if Stamp::of(&metadata, self.sealed) != self.stamp {
            return Err(ReopenError::Replaced);
        }
        match end_of(&file, self.stamp.len).map_err(ReopenError::Io)? == way_back.end {
            true => Ok(file),
            false => Err(ReopenError::Replaced),
        }
    }
}

/// Returns the last bytes of a file of `len` bytes, after zeros if it has fewer.
fn end_of(file: &File, len: u64) -> io::Result<[u8; END]> {
    let mut end = [0; END];
    let bytes = len.min(END as u64);
    file.read_exact_at(&mut end[END - bytes as usize..], len - bytes)?;
    Ok(end)
}

/// Closes the oldest file that can be opened again. Returns false if there is none.
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

/// Takes the oldest file out of the pool if there are more than `most`.
fn take_oldest(most: usize) -> Option<Arc<Slot>> {
    let mut pool = locked(&POOL);
    if pool.open.len() <= most {
        return None;
    }
    pool.open.pop_first().map(|(_, slot)| slot)
}

/// Returns how many files may be open: a quarter of what the process may have, which has use for others.
fn most() -> usize {
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
