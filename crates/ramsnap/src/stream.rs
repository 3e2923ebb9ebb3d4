//! Streams of images: the bytes of a packed image, compressed by zstd.

mod compression;

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, PipeReader, Read, Seek, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context;
use image_format::{HEADER_PAGE, Header};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_reader::SecretBuffer;
use sparse_file::{FileIdentity, SpaceError, grow};
use zstd::stream::read::Decoder;

use crate::failure::Failure;
use crate::free_space::Place;
use crate::session::Session;
use crate::{print, sys};
use compression::{WINDOW_LOG, encoder};

/// The path that stands for stdin or stdout.
pub const STREAM: &str = "-";

/// Bytes copied at a time.
const PIECE: usize = 1 << 20;

pub fn is_stream(path: &Path) -> bool {
    path == Path::new(STREAM)
}

/// Returns whether an image at `path` is compressed: `-`, or a file of zstd by its name.
pub fn is_compressed(path: &Path) -> bool {
    is_stream(path) || path.extension().is_some_and(|extension| extension == "zst")
}

/// Returns whether a file is named as a compressed image, and is that of a diff.
pub fn is_compressed_diff(path: &Path) -> bool {
    let header = || {
        let mut start = [0; HEADER_PAGE];
        decoder(File::open(path).ok()?)
            .ok()?
            .read_exact(&mut start)
            .ok()?;
        Header::read(&start)
    };
    is_compressed(path) && header().is_some_and(|header| header.is_diff())
}

fn decoder<R: Read>(source: R) -> io::Result<Decoder<'static, BufReader<R>>> {
    let mut stream = Decoder::new(source)?;
    // Limits the memory for back references to the size that every decoder should support.
    stream.window_log_max(WINDOW_LOG)?;
    Ok(stream)
}

/// An image from a stream: a packed image of version 2, whose first page states its length.
pub struct Incoming<'s> {
    session: &'s Session,
    stream: Decoder<'static, BufReader<Source>>,
    start: [u8; HEADER_PAGE],
    header: Header,
}

impl<'s> Incoming<'s> {
    /// Waits for the first page of the stream at `path`, which may be `-`, and refuses anything but
    /// the beginning of an image.
    pub fn begin(session: &'s Session, path: &Path) -> anyhow::Result<Self> {
        let source = Source::open(session, path)?;
        let mut stream = decoder(source).context("cannot begin to decompress the stream")?;
        let mut start = [0; HEADER_PAGE];
        let received = read(session, &mut stream, &mut start)?;
        let header = Header::read(&start).filter(|_| received == HEADER_PAGE);
        Ok(Self {
            session,
            stream,
            start,
            header: header.ok_or(Failure::StreamNotPacked)?,
        })
    }

    /// Returns the header of the image, which is verified once all of the image is received.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Decompresses the image to `file`, which is new and in `dir`. Never writes more bytes than
    /// the header states.
    pub fn write_to(mut self, mut file: &File, dir: &Path) -> anyhow::Result<()> {
        let len = self.header.len();
        let failed = |written, source| full(file, dir, written, len, source);
        // Fails now if the length exceeds the limit of the size of files.
        grow(file, len).map_err(|error| match error {
            SpaceError::Io { source, .. } => failed(0, source),
            other => failed(0, io::Error::other(other)),
        })?;
        let bar = self.session.bar("receiving");
        bar.set_length(len);
        file.write_all(&self.start)
            .map_err(|source| failed(0, source))?;
        let mut received = HEADER_PAGE as u64;
        let mut buffer = SecretBuffer::new();
        let piece = buffer.sized(PIECE);
        while received < len {
            let most = PIECE.min(usize::try_from(len - received).unwrap_or(PIECE));
            let found = read(self.session, &mut self.stream, &mut piece[..most])?;
            if found == 0 {
                return Err(Failure::StreamCut { received, len }.into());
            }
            file.write_all(&piece[..found])
                .map_err(|source| failed(received, source))?;
            received += found as u64;
            bar.set_position(received);
        }
        match read(self.session, &mut self.stream, &mut piece[..1])? {
            0 => Ok(()),
            _ => Err(Failure::StreamTooLong { len }.into()),
        }
    }
}

/// Fills `buffer`, or the start of it if the stream ends.
fn read(session: &Session, stream: &mut impl Read, buffer: &mut [u8]) -> anyhow::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) => {
                session.check("nothing was written")?;
                if error.raw_os_error().is_some() {
                    return Err(error).context("cannot read the stream");
                }
                // The message of the library is about the format of zstd.
                return Err(Failure::StreamBroken.into());
            }
        }
    }
    Ok(filled)
}

/// Returns the error for a stream that cannot be stored. If the file system is full, the error
/// names it and the free space; the free space does not count for a quota.
fn full(file: &File, dir: &Path, written: u64, len: u64, source: io::Error) -> anyhow::Error {
    match (Place::of(file, dir), source.kind()) {
        (Ok(place), io::ErrorKind::QuotaExceeded) => Failure::SpoolOverQuota {
            dir: dir.to_owned(),
            mount: place.mount,
            file_system: place.file_system,
            written,
            len,
            source,
        }
        .into(),
        (Ok(place), io::ErrorKind::StorageFull) => Failure::SpoolFull {
            dir: dir.to_owned(),
            mount: place.mount,
            file_system: place.file_system,
            written,
            len,
            available: place.available,
            source,
        }
        .into(),
        _ => anyhow::Error::from(source).context(format!(
            "cannot keep the {len} bytes of the stream in {dir:?}"
        )),
    }
}

/// Stdin or a file, whose reads fail once a signal has come while something is staged.
#[derive(Debug)]
struct Source {
    file: File,
    cancelled: PipeReader,
}

impl Source {
    fn open(session: &Session, path: &Path) -> anyhow::Result<Self> {
        let file = match is_stream(path) {
            true => io::stdin().as_fd().try_clone_to_owned()?.into(),
            false => File::open(path).with_context(|| format!("cannot open {path:?}"))?,
        };
        let cancelled = session.hangs_up()?;
        Ok(Self { file, cancelled })
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = [
                PollFd::new(self.file.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.cancelled.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => _ = polled?,
            }
            if ready[1].any() == Some(true) {
                return Err(io::Error::other("interrupted"));
            }
            match self.file.read(buffer) {
                // Another process that shares the file may have made it nonblocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }
}

/// Creates a file without a name in `dir`, of mode 0600, for an image that is being checked.
pub fn spool(dir: &Path) -> anyhow::Result<File> {
    let file = nameless(dir).map_or_else(
        || tempfile::NamedTempFile::new_in(dir).map(tempfile::NamedTempFile::into_file),
        Ok,
    );
    file.with_context(|| format!("cannot keep the stream in {dir:?}"))
}

/// Creates a file that never has a name, if the file system supports such files.
#[cfg(target_os = "linux")]
fn nameless(dir: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    // O_EXCL: the file cannot be linked to a name.
    let flags = nix::libc::O_TMPFILE | nix::libc::O_EXCL;
    let mut options = File::options();
    let options = options.read(true).write(true).mode(0o600);
    options.custom_flags(flags).open(dir).ok()
}

#[cfg(not(target_os = "linux"))]
fn nameless(_: &Path) -> Option<File> {
    None
}

/// Returns a path by which an open file is opened again.
pub fn path_of(file: &File) -> PathBuf {
    format!("/dev/fd/{}", file.as_raw_fd()).into()
}

/// Fails if an open file cannot be opened again, before a stream is read into it.
pub fn check_path_of(file: &File) -> anyhow::Result<()> {
    let path = path_of(file);
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) => Err(error).with_context(|| {
            format!("cannot open the received image by {path:?}, which needs /proc: mount it; nothing was read")
        }),
    }
}

/// Refuses a closed stdin, before a file is staged.
pub fn check_stdin() -> Result<(), Failure> {
    match sys::stdin_was_open() {
        true => Ok(()),
        false => Err(Failure::NoStdin),
    }
}

/// Refuses a closed stdout and a terminal, before anything is read.
pub fn check_stdout() -> Result<(), Failure> {
    print::check_stdout()?;
    match io::stdout().is_terminal() {
        true => Err(Failure::StreamToTerminal),
        false => Ok(()),
    }
}

/// Refuses an output that is the file on stdin: `ramsnap convert - --zstd -o FILE < FILE`.
pub fn check_is_not_stdin(output: &Path) -> Result<(), Failure> {
    match is_file_of(io::stdin().as_fd(), output) {
        true => Err(Failure::OutputIsInput {
            path: output.to_owned(),
        }),
        false => Ok(()),
    }
}

fn is_file_of(stream: BorrowedFd<'_>, path: &Path) -> bool {
    let (Ok(stream), Ok(file)) = (FileIdentity::of(stream), FileIdentity::at(path)) else {
        return false;
    };
    file.is_file() && file.may_be(&stream)
}

/// Compresses `image`, the packed image at `path`, to stdout.
pub fn to_stdout(session: &Session, image: File, path: &Path) -> anyhow::Result<()> {
    send(session, image, path, print::stdout).context("the stream was not sent whole")
}

/// Compresses `image`, the packed image at `path`, to a staged file. Returns its length.
pub fn to_file(session: &Session, image: File, path: &Path, staged: &File) -> anyhow::Result<u64> {
    send(session, image, path, || staged.try_clone())?;
    Ok(staged.metadata()?.len())
}

fn send<W: Write>(
    session: &Session,
    mut image: File,
    path: &Path,
    to: impl FnOnce() -> io::Result<W>,
) -> anyhow::Result<()> {
    let mut begin = || -> io::Result<u64> {
        image.rewind()?;
        Ok(image.metadata()?.len())
    };
    let len = begin().with_context(|| format!("cannot read {path:?}"))?;
    let bar = session.bar("sending");
    bar.set_length(len);
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut stream = encoder(to()?, len, threads)?;
    copy(image, len, &mut stream, path, |piece| {
        bar.inc(piece);
        session.check("nothing was written")
    })?;
    Ok(stream.finish()?.flush()?)
}

/// Copies all `len` bytes of the image at `path`.
fn copy(
    mut image: impl Read,
    len: u64,
    to: &mut impl Write,
    path: &Path,
    progress: impl Fn(u64) -> Result<(), Failure>,
) -> anyhow::Result<()> {
    let mut buffer = SecretBuffer::new();
    let piece = buffer.sized(PIECE);
    let mut sent = 0;
    loop {
        let read = image.read(piece);
        let read = read.with_context(|| format!("cannot read {path:?}"))?;
        sent += read as u64;
        if (read == 0 && sent < len) || sent > len {
            let path = path.to_owned();
            return Err(Failure::SentResized { path }.into());
        }
        if read == 0 {
            return Ok(());
        }
        to.write_all(&piece[..read])?;
        progress(read as u64)?;
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::as_it_was(100, true)]
    #[case::cut(99, false)]
    #[case::grown(101, false)]
    fn an_image_that_changes_its_size_is_not_sent_as_whole(#[case] now: usize, #[case] sent: bool) {
        let (image, mut to) = (vec![7; now], Vec::new());
        let copied = copy(&image[..], 100, &mut to, Path::new("it"), |_| Ok(()));
        let resized = |error: &anyhow::Error| {
            matches!(error.downcast_ref(), Some(Failure::SentResized { .. }))
        };
        match copied {
            Ok(()) => assert!(sent && to == image),
            Err(error) => assert!(!sent && resized(&error), "{error:?}"),
        }
    }

    #[rstest]
    #[case::quota(io::ErrorKind::QuotaExceeded, "quota", "available")]
    #[case::full(io::ErrorKind::StorageFull, "is full", "quota")]
    fn the_error_says_whether_a_quota_or_the_disk_is_full(
        #[case] kind: io::ErrorKind,
        #[case] says: &str,
        #[case] not: &str,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(&dir).unwrap();
        let error = full(&file, dir.path(), 1, 2, kind.into()).to_string();
        assert!(error.contains(says) && !error.contains(not), "{error}");
        assert!(error.contains("1 of 2 bytes of the stream"), "{error}");
    }
}
