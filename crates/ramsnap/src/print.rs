//! Text on stdout and stderr.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
#[cfg(target_os = "linux")]
use std::mem;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use indicatif::BinaryBytes;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::failure::Failure;
use crate::sys;

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

/// Returns stdout without the buffer of std, which hides that a stream is closed.
pub fn stdout() -> io::Result<File> {
    match sys::stdout_was_open() {
        true => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
        false => Err(Errno::EBADF.into()),
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
#[derive(Clone, Debug)]
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

/// The lines that are held back while a [`Kept`] exists.
static KEPT: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// Prints a line to stderr. Errors are ignored.
pub fn to_stderr(text: &str) {
    if let Some(kept) = &mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner) {
        kept.push(text.to_owned());
        return;
    }
    let _ = writeln!(io::stderr(), "{text}");
}

/// Prints a line to stderr if it accepts output within a second, for a thread that must not block.
pub fn to_stderr_at_once(text: &str) {
    const PATIENCE: u16 = 1000;
    let stderr = io::stderr();
    let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::from(PATIENCE)).is_ok_and(|ready| ready > 0) {
        // Bypasses the lock of stderr: a thread that waits for the terminal may hold it.
        let _ = nix::unistd::write(stderr.as_fd(), format!("{text}\n").as_bytes());
    }
}

/// Holds back the lines for stderr until this is dropped. Writing blocks while the terminal takes
/// no output, which would keep a process stopped that this process has stopped.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub struct Kept(());

#[cfg(target_os = "linux")]
impl Kept {
    pub fn from_now_on() -> Self {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get_or_insert_default();
        Self(())
    }
}

#[cfg(target_os = "linux")]
impl Drop for Kept {
    fn drop(&mut self) {
        let kept = mem::take(&mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner));
        for text in kept.into_iter().flatten() {
            to_stderr(&text);
        }
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
