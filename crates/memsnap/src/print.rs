//! Text on stdout and stderr.

use std::io::{self, Write};

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

/// A line on stderr, if anybody takes it.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
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
