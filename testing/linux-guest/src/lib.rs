//! What a Linux guest in QEMU is made of: Debian's packages, an initramfs, QEMU, its console.
//!
//! `fs-matrix`, `crash-states` and `qemu-e2e` use it. It knows no snapshot.

#![allow(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "for the workspace's own tests"
)]

pub mod archive;
pub mod console;
pub mod debian;

use std::path::Path;
use std::process::{Command, Stdio};

/// Returns a command that runs QEMU emulating an x86-64 machine with no default devices. QEMU does
/// not outlive this program, however that ends.
pub fn qemu(cpus: u32) -> Command {
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(["-accel", "tcg,thread=multi", "-smp", &cpus.to_string()])
        .args(["-display", "none", "-nodefaults", "-no-user-config"])
        .arg("-no-reboot")
        .stdin(Stdio::null());
    qemu
}

/// A path inside of an option of QEMU's: a comma ends it unless doubled.
pub fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
