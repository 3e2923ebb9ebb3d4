//! The administrator's tools.

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::start::start;

/// Returns a command for an administrator's tool. Also looks in the directories where Debian
/// installs them.
#[must_use]
pub fn tool(name: &str) -> Command {
    Command::new(find_tool(name).unwrap_or_else(|| name.into()))
}

/// Returns the path of a tool, from `PATH` and from the administrator's directories of Debian,
/// which `PATH` may lack.
pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Runs a tool and returns its output. The error has what the tool reported.
pub(crate) fn run(command: &mut Command) -> io::Result<String> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = start(command)
        .and_then(Child::wait_with_output)
        .map_err(|error| {
            io::Error::new(error.kind(), format!("cannot run {command:?}: {error}"))
        })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(io::Error::other(format!(
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    )))
}
