//! Prints the events of the libraries to stderr, if requested.

mod plain;

use std::ffi::OsString;
use std::io::{self, Write};

use console::colors_enabled_stderr;
use tracing_subscriber::EnvFilter;

use crate::failure::Failure;
use crate::stderr;

/// The environment variable that names the events to print, and overrides `--verbose`.
pub const VARIABLE: &str = "RAMSNAP_LOG";

/// Prints events from now on, if `-v` was given `verbose` times or the variable is set. Returns
/// whether any may be printed.
pub fn start(verbose: u8) -> Result<bool, Failure> {
    let Some(filter) = filter(verbose)? else {
        return Ok(false);
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colors_enabled_stderr())
        .with_writer(Line::default);
    // The variable names modules, so its lines have them too.
    let set = match variable().is_some() {
        true => lines.try_init(),
        false => lines.event_format(plain::Plain).try_init(),
    };
    Ok(set.is_ok())
}

/// Returns the value of the variable, unless it is empty.
fn variable() -> Option<OsString> {
    std::env::var_os(VARIABLE).filter(|value| !value.is_empty())
}

/// Returns the events to print, or `None` if none was requested.
fn filter(verbose: u8) -> Result<Option<EnvFilter>, Failure> {
    let directives = match variable() {
        Some(value) => value.into_string().map_err(|value| Failure::EventFilter {
            value: value.to_string_lossy().into_owned(),
        })?,
        None => match verbose {
            0 => return Ok(None),
            1 => "info".to_owned(),
            2 => "debug".to_owned(),
            3.. => "trace".to_owned(),
        },
    };
    // Without regular expressions, which could take long to match.
    let filter = EnvFilter::builder().with_regex(false).parse(&directives);
    filter
        .map(Some)
        .map_err(|_| Failure::EventFilter { value: directives })
}

/// A line, which is printed when this is dropped: as other lines it is held back while a process is
/// stopped, and dropped if stderr is a file of the verb.
#[derive(Debug, Default)]
struct Line(Vec<u8>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.0);
        for line in text.lines() {
            stderr::line(line);
        }
    }
}
