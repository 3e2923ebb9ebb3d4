//! Text on stdout and stderr.

use std::io::{self, Write};
#[cfg(target_os = "linux")]
use std::mem;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use indicatif::BinaryBytes;
use serde::Serialize;

/// A line on stdout. A reader that has seen enough (`| head`) is no failure: what was to be found out still is the exit code.
pub fn line(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to stdout"),
    }
}

pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// The lines that are kept while there is a [`Kept`].
static KEPT: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// A line on stderr, if anybody takes it.
pub fn complain(text: &str) {
    if let Some(kept) = &mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner) {
        kept.push(text.to_owned());
        return;
    }
    let _ = writeln!(io::stderr(), "{text}");
}

/// Keeps the lines for stderr until this is dropped: writing may block for as long as the terminal
/// takes no output, and while this process has stopped another one, that would stand still for as long.
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
            complain(&text);
        }
    }
}

/// `1.50 GiB`.
pub fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// `1 page`, `2 pages`.
pub fn count(number: u64, one: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        _ => format!("{number} {one}s"),
    }
}
