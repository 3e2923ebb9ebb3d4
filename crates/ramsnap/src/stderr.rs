//! Lines on stderr.

use std::io::{self, Write};
#[cfg(target_os = "linux")]
use std::mem;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The lines that are held back while a [`Kept`] exists.
static KEPT: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// Whether nothing more is printed.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Drops all further lines: stderr is a file of the verb.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Prints a line to stderr. Errors are ignored.
pub fn line(text: &str) {
    if SILENT.load(Ordering::Relaxed) {
        return;
    }
    if let Some(kept) = &mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner) {
        kept.push(text.to_owned());
        return;
    }
    let _ = writeln!(io::stderr(), "{text}");
}

/// Prints a line to stderr if it accepts output within a second, for a thread that must not block.
pub fn line_at_once(text: &str) {
    line_within(1000, text);
}

/// Writes a line as [`line_at_once`] does, and omits it if the terminal takes no output now.
pub fn line_if_ready(text: &str) {
    line_within(0, text);
}

fn line_within(milliseconds: u16, text: &str) {
    if SILENT.load(Ordering::Relaxed) {
        return;
    }
    let stderr = io::stderr();
    let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::from(milliseconds)).is_ok_and(|ready| ready > 0) {
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
            line(&text);
        }
    }
}
