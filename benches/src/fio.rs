//! Runs fio, a widely known benchmark, on the same disk for comparison.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

/// The name of the program and of its contender.
pub const NAME: &str = "fio";

/// Returns whether fio is installed. Debian's package is `fio`.
#[must_use]
pub fn is_installed() -> bool {
    let output = Command::new(NAME).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
}

/// Writes `size` random bytes to a new file `dest`, as a full dump does: in order, 1 MiB each,
/// direct, 32 in flight, with the file's size set first, and synced at the end. Returns the time by
/// fio's own clock, without its start.
///
/// # Errors
/// fio can't be run, or it failed.
pub fn write(dest: &Path, size: u64) -> anyhow::Result<Duration> {
    let (Some(dir), Some(name)) = (dest.parent(), dest.file_name()) else {
        bail!("{} is not the path of a file", dest.display());
    };
    // fio splits `--filename` at colons, so it has only the name of the file and not its directory.
    let output = Command::new(NAME)
        .current_dir(dir)
        .args(
            "--name=dump --rw=write --bs=1M --direct=1 --ioengine=io_uring --iodepth=32".split(' '),
        )
        .args("--fallocate=truncate --end_fsync=1 --output-format=json".split(' '))
        .arg(format!("--size={size}"))
        .arg(format!("--filename={}", name.display()))
        .output()
        .context("failed to run fio")?;
    if !output.status.success() {
        bail!(
            "fio failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let found: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("fio printed a report that is not JSON")?;
    let written = &found["jobs"][0]["write"];
    match (written["io_bytes"].as_u64(), written["runtime"].as_u64()) {
        (Some(bytes), Some(milliseconds)) if bytes == size => {
            Ok(Duration::from_millis(milliseconds))
        }
        other => bail!(
            "fio did not report {size} bytes written; it reported (bytes, milliseconds): {other:?}"
        ),
    }
}
