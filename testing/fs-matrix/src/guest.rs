//! Debian's kernel in QEMU, with file systems that this machine's kernel may not have.
//!
//! Nothing is installed in the guest: its root is this machine's, shared read-only over 9p, with a
//! second share laid over it that has the unpacked packages this machine lacks. What the guest
//! finds comes back line by line through a virtio serial port.

pub(crate) mod in_guest;
mod rootfs;
mod unpack;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;

pub(crate) use rootfs::{Kit, PACKAGES};

use super::kind::Kind;
use harness::interrupt::Interrupt;
use harness::process::Process;
use linux_guest::{escaped, qemu};

/// The name of the port that the guest writes its findings to.
const PORT: &str = "findings";

/// A disk image, removed when dropped unless it is to be kept.
pub(crate) struct Disk {
    pub path: PathBuf,
    keep: bool,
}

impl Disk {
    /// A sparse image of `size` bytes.
    pub(crate) fn new(path: PathBuf, size: u64, keep: bool) -> anyhow::Result<Self> {
        let file = File::create(&path).with_context(|| format!("can't make {}", path.display()))?;
        file.set_len(size)?;
        Ok(Self { path, keep })
    }

    /// An image that is there already.
    pub(crate) fn existing(path: PathBuf, keep: bool) -> Self {
        Self { path, keep }
    }

    /// Zeros that the guest writes become holes: an image never takes more than its data.
    fn drive(&self) -> String {
        let path = escaped(&self.path);
        format!("file={path},format=raw,if=virtio,cache=unsafe,discard=unmap,detect-zeroes=unmap")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The disks of a mount to check: one with room for a file over 4 GiB, and a small one.
pub(crate) fn disks(kind: Kind, dir: &Path, keep: bool) -> anyhow::Result<Vec<Disk>> {
    let disk =
        |size: u64, name| Disk::new(dir.join(format!("{}-{name}.img", kind.name)), size, keep);
    let below = kind.disk_below();
    let small = below.with_context(|| format!("{kind} is not on a disk"))?;
    Ok(vec![disk(6 << 30, "main")?, disk(small.min_size, "small")?])
}

/// Boots a guest that runs this program with `arguments`.
pub(crate) fn boot(
    kit: &Kit,
    name: &str,
    disks: &[Disk],
    arguments: &[String],
    interrupt: &Interrupt,
) -> anyhow::Result<Process> {
    let drives = disks.iter().map(Disk::drive);
    let drives = drives.flat_map(|drive| ["-drive".into(), drive]).collect();
    boot_with(kit, name, drives, arguments, interrupt)
}

/// As [`boot`], with QEMU's options for the disks.
pub(crate) fn boot_with(
    kit: &Kit,
    name: &str,
    drives: Vec<String>,
    arguments: &[String],
    interrupt: &Interrupt,
) -> anyhow::Result<Process> {
    let share = |path: &Path, tag: &str| {
        let path = escaped(path);
        let options = format!(
            "local,path={path},mount_tag={tag},security_model=none,readonly=on,multidevs=remap"
        );
        ["-virtfs".to_owned(), options]
    };
    let quoted = arguments.iter().map(|argument| format!("\"{argument}\""));
    let quoted: Vec<_> = quoted.collect();
    // The words after "--" are the arguments of the first process.
    let append = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check cryptomgr.notests -- {}",
        quoted.join(" ")
    );
    let mut qemu = qemu(kit.cpus);
    // Emulated, an instruction that fills or copies a block goes byte by byte: without ERMS and
    // FSRM the kernel takes one that goes by words.
    qemu.args(["-machine", "q35", "-cpu", "max,-erms,-fsrm", "-m", "1G"])
        .arg("-serial")
        .arg(format!("file:{}", kit.console(name).0.display()))
        .arg("-kernel")
        .arg(kit.kernel())
        .arg("-initrd")
        .arg(kit.initramfs())
        .arg("-append")
        .arg(append)
        .args(share(Path::new("/"), "host"))
        .args(share(&kit.tree(), "tree"))
        .args(["-device", "virtio-serial"])
        .args(["-chardev", &format!("file,id={PORT},path=/dev/stdout")])
        .args([
            "-device",
            &format!("virtserialport,chardev={PORT},name={PORT}"),
        ])
        .args(drives);
    Process::start(qemu, interrupt)
}
