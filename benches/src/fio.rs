//! fio, where it is installed: what a benchmark that many know says of the same disk.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

/// What it is called, as a contender.
pub const NAME: &str = "fio";

/// Whether it can be run here. Debian's package is `fio`.
#[must_use]
pub fn is_installed() -> bool {
    let output = Command::new(NAME).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
}

/// Writes `size` random bytes to a new file `dest` as a full dump does: in order, 1 MiB each, direct, 32 in flight, the file's size set
/// first, synced at the end. What it took is by fio's own clock, which its start is not in.
///
/// # Errors
/// It can't be run, or it failed.
pub fn write(dest: &Path, size: u64) -> anyhow::Result<Duration> {
    let (Some(dir), Some(name)) = (dest.parent(), dest.file_name()) else {
        bail!("{} is no file", dest.display());
    };
    // A colon in `--filename` would part two names: only the file's own is there.
    let output = Command::new(NAME)
        .current_dir(dir)
        .args(
            "--name=dump --rw=write --bs=1M --direct=1 --ioengine=io_uring --iodepth=32".split(' '),
        )
        .args("--fallocate=truncate --end_fsync=1 --output-format=json".split(' '))
        .arg(format!("--size={size}"))
        .arg(format!("--filename={}", name.display()))
        .output()
        .context("can't run fio")?;
    if !output.status.success() {
        bail!("fio: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let found: serde_json::Value = serde_json::from_slice(&output.stdout)
        .context("fio says something else than what was found")?;
    let written = &found["jobs"][0]["write"];
    match (written["io_bytes"].as_u64(), written["runtime"].as_u64()) {
        (Some(bytes), Some(milliseconds)) if bytes == size => {
            Ok(Duration::from_millis(milliseconds))
        }
        other => bail!(
            "fio should have written {size} bytes, and says of bytes and milliseconds: {other:?}"
        ),
    }
}
