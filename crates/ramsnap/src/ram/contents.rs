//! A warning if a file that is saved as RAM looks like another file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use image_format::{Footer, FooterError};
use vmm_files::Format;

use crate::stderr;

/// The first bytes of a frame of zstd.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Warns if `file` begins like a file of another VMM, or is an image. It is saved as RAM all the
/// same: a guest can write any bytes to its RAM.
pub(super) fn warn_if_known(path: &Path, file: &File) {
    if let Some((name, input)) = look_at(path, file) {
        stderr::line(&format!(
            "warning: {path:?} looks like {name}, and is saved as if all of its bytes were RAM: if it is one, \
             `ramsnap convert {input} -o OUT` reads the RAM in it"
        ));
    }
}

/// Returns what the file looks like, and the input of the conversion.
fn look_at(path: &Path, file: &File) -> Option<(&'static str, &'static str)> {
    // RAM is a multiple of 512 bytes, and no image of today is: it was cut off or padded.
    if let Ok(_) | Err(FooterError::Truncated { .. } | FooterError::Trailing { .. }) =
        Footer::read_id(file)
    {
        return Some(("a sealed or packed image", "FILE"));
    }
    let mut first = [0; 4];
    if file.read_exact_at(&mut first, 0).is_ok() && first == ZSTD {
        return Some(("a compressed image", "FILE.zst"));
    }
    Some(match Format::detect(path).ok()?? {
        Format::Elf => ("an ELF core", "elf:FILE"),
        Format::Qemu => ("a migration file of QEMU", "qemu:FILE"),
        Format::Libvirt => ("a save file of libvirt", "libvirt:FILE"),
        Format::CloudHypervisor => ("a snapshot of Cloud Hypervisor", "cloud-hypervisor:DIR"),
        Format::Vmware => ("a state file of VMware", "vmware:FILE"),
        _ => return None,
    })
}
