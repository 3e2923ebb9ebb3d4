//! Text on stdout, and the format of numbers.

use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use indicatif::BinaryBytes;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::ser::{Serialize, SerializeStruct, Serializer};
use sparse_file::FileIdentity;

use crate::failure::Failure;
use crate::{stderr, sys};

/// Prints a line to stdout. It is not an error if the reader has closed the pipe (`| head`): the
/// exit code still reports the result.
pub fn line(text: &str) -> anyhow::Result<()> {
    try_line(text).context("cannot write to stdout")
}

/// Fails if the process was started with a stdout that is closed, or not open for writing.
pub fn check_stdout() -> Result<(), Failure> {
    match sys::stdout_was_open() {
        true => Ok(()),
        false => Err(Failure::NoStdout),
    }
}

/// Refuses a stdout, if the verb prints to it, or a stderr that is one of `files`: text would
/// overwrite or extend it.
pub fn check_apart(files: &[PathBuf], prints: bool) -> Result<(), Failure> {
    STDOUT_USED.store(prints, Ordering::Relaxed);
    check_is_none_of(|_, stream| files.iter().find(|path| is_file_at(stream, path)).cloned())
}

/// Whether the verb prints to stdout.
static STDOUT_USED: AtomicBool = AtomicBool::new(true);

/// Refuses a stdout or stderr that the verb uses and for which `file` returns the path of a file of
/// the verb.
pub fn check_is_none_of(
    file: impl Fn(&Metadata, &FileIdentity) -> Option<PathBuf>,
) -> Result<(), Failure> {
    let of = |stream: BorrowedFd<'_>| {
        let stream = File::from(stream.try_clone_to_owned().ok()?);
        let metadata = stream.metadata().ok().filter(Metadata::is_file)?;
        file(&metadata, &FileIdentity::of(&stream).ok()?)
    };
    let (stdout, error) = (io::stdout(), io::stderr());
    if sys::stderr_was_open()
        && let Some(path) = of(error.as_fd())
    {
        // The message would be written to the file, too.
        stderr::silence();
        return Err(Failure::StreamIsFile {
            stream: "stderr",
            path,
        });
    }
    if STDOUT_USED.load(Ordering::Relaxed)
        && sys::stdout_was_open()
        && let Some(path) = of(stdout.as_fd())
    {
        return Err(Failure::StreamIsFile {
            stream: "stdout",
            path,
        });
    }
    Ok(())
}

fn is_file_at(stream: &FileIdentity, path: &Path) -> bool {
    FileIdentity::at(path).is_ok_and(|file| file.may_be(stream))
}

/// Returns stdout without the buffer of std, which hides that a stream is closed.
pub fn stdout() -> io::Result<Stdout> {
    match sys::stdout_was_open() {
        true => Ok(Stdout(io::stdout().as_fd().try_clone_to_owned()?.into())),
        false => Err(Errno::EBADF.into()),
    }
}

/// Stdout, whose writes wait for the reader also if another process that shares the pipe has made
/// it nonblocking.
#[derive(Debug)]
pub struct Stdout(File);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Prints a line to stdout, and returns the error of the system.
pub fn try_line(text: &str) -> io::Result<()> {
    match stdout()?.write_all(format!("{text}\n").as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&json_text(value)?)
}

pub fn json_text(value: &impl Serialize) -> anyhow::Result<String> {
    serde_json::to_string_pretty(value).context("cannot make JSON of what was found")
}

/// A path in JSON: a string or, where it is not UTF-8, an object: `text`, in which U+FFFD stands
/// for what is not, and `bytes_hex`, all of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonPath(PathBuf);

impl From<PathBuf> for JsonPath {
    fn from(path: PathBuf) -> Self {
        Self(path)
    }
}

impl Deref for JsonPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Serialize for JsonPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some(text) = self.0.to_str() {
            return serializer.serialize_str(text);
        }
        let mut hex = String::new();
        for byte in self.0.as_os_str().as_bytes() {
            let _ = write!(hex, "{byte:02x}");
        }
        let mut object = serializer.serialize_struct("path", 2)?;
        object.serialize_field("text", &self.0.to_string_lossy())?;
        object.serialize_field("bytes_hex", &hex)?;
        object.end()
    }
}

/// Returns a path as text for a line of a terminal. A path with characters that a terminal acts on
/// or does not show, or with bytes that are not UTF-8, is quoted and escaped, as in errors.
pub fn path(path: &Path) -> String {
    let is_plain = |text: &str| {
        text.chars()
            .all(|c| matches!(c, '\\' | '"' | '\'') || c.escape_debug().eq([c]))
    };
    match path.to_str().filter(|text| is_plain(text)) {
        Some(text) => text.to_owned(),
        None => format!("{path:?}"),
    }
}

/// Formats a size: `1.50 GiB`.
pub fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// Formats a count: `1 page`, `2 pages`.
pub fn count(number: u64, one: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {one}s"),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use rstest::rstest;

    #[rstest]
    #[case::plain(b"dir/full.mem", "dir/full.mem")]
    #[case::quotes_and_spaces(b"a \"b\" 'c' \\d", "a \"b\" 'c' \\d")]
    #[case::other_scripts("\u{65e5}\u{672c}\u{e9}".as_bytes(), "\u{65e5}\u{672c}\u{e9}")]
    #[case::two_lines(b"a\nb", "\"a\\nb\"")]
    #[case::a_sequence_of_a_terminal(b"\x1b[31m", "\"\\u{1b}[31m\"")]
    #[case::a_control_character_of_latin_1("\u{9b}31m".as_bytes(), "\"\\u{9b}31m\"")]
    #[case::written_backwards("\u{202e}mem".as_bytes(), "\"\\u{202e}mem\"")]
    #[case::not_utf8(b"bad\xff", "\"bad\\xFF\"")]
    fn paths_are_escaped_as_in_errors(#[case] path: &[u8], #[case] shown: &str) {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(super::path(OsStr::from_bytes(path).as_ref()), shown);
    }
}
