//! What every task is made of that runs a Linux guest in QEMU: Debian's packages, an initramfs, QEMU itself.

pub mod archive;
pub mod debian;

use std::path::Path;
use std::process::{Command, Stdio};

/// QEMU emulating an x86-64 machine with two CPUs and nothing else that was not asked for. It must not outlive this program, however
/// that ends.
pub fn qemu() -> Command {
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(["-accel", "tcg,thread=multi", "-smp", "2"])
        .args(["-display", "none", "-nodefaults", "-no-user-config"])
        .arg("-no-reboot")
        .stdin(Stdio::null());
    qemu
}

/// A path inside of an option of QEMU's: a comma ends it unless doubled.
pub fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
