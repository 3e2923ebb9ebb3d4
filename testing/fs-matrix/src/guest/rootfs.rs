//! What a guest is made of: Debian packages unpacked under `target/`, the module of APFS built, an
//! initramfs.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use file_systems::{Disk, InGuest, Storage};
use harness::packages::Package;
use linux_guest::archive::Archive;
use linux_guest::console::Console;
use linux_guest::debian::{only_entry, only_entry_with};
use xshell::{Shell, cmd};

use super::unpack;
use crate::kind::Kind;

/// What this machine needs to run guests and to build a kernel module.
pub(crate) const PACKAGES: &[Package] = &[
    Package::new("qemu-system-x86", "qemu-system-x86_64"),
    Package::new("qemu-utils", "qemu-img"),
    Package::new("gcc-12", "gcc-12"),
    Package::new("binutils", "strip"),
    Package::new("make", "make"),
    Package::new("xz-utils", "xz"),
    Package::new("strace", "strace"),
];

/// Changes whenever what is unpacked or built does.
const EDITION: &str = "2";

/// A directory with all that it takes to boot.
pub(crate) struct Kit {
    dir: PathBuf,
    /// How many CPUs each guest has.
    pub cpus: u32,
    release: String,
    debian: String,
    apfs: String,
    /// Two runs would overwrite each other's images.
    _lock: File,
}

impl Kit {
    /// Takes what an earlier run unpacked under `dir`, or downloads, unpacks and builds it.
    /// `may_download` or fail.
    pub(crate) fn prepare(
        sh: &Shell,
        dir: &Path,
        cpus: u32,
        may_download: bool,
        say: &dyn Fn(&str),
    ) -> anyhow::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            bail!(
                "the guest is an x86-64 machine with this machine's programs: this one is another"
            );
        }
        fs::create_dir_all(dir)?;
        let lock = File::create(dir.join("lock"))?;
        lock.try_lock()
            .context("another fs-matrix is running in this work tree")?;
        let ready = dir.join("ready");
        if fs::read_to_string(&ready).ok().as_deref() != Some(EDITION) {
            if !may_download {
                bail!(
                    "the guest's kernel and tools are not under {} yet, and --no-install forbids downloading them",
                    dir.display()
                );
            }
            unpack::make(sh, dir, say)?;
            fs::write(&ready, EDITION)?;
        }
        let release = only_entry(&dir.join("kernel/lib/modules"))?;
        let apfs = only_entry_with(&dir.join("kernel/usr/src"), "linux-apfs-rw-")?;
        let image = format!("linux-image-{release}_");
        let debian = only_entry_with(&dir.join("packages"), &image)?;
        let debian = debian.trim_start_matches(&image);
        let kit = Self {
            debian: debian.split('_').next().unwrap_or_default().to_owned(),
            dir: dir.to_owned(),
            cpus,
            release,
            apfs,
            _lock: lock,
        };
        kit.freshen(sh)?;
        Ok(kit)
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }

    /// The images and logs of one run.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// What the kernel of the guest of this name says.
    pub(crate) fn console(&self, name: &str) -> Console {
        Console(self.run_dir().join(format!("{name}.log")))
    }

    /// Whose code runs when `kind` is mounted in the guest.
    pub(crate) fn driver(&self, kind: Kind) -> String {
        let kernel = format!("Debian's Linux {} ({})", self.release, self.debian);
        match kind.storage {
            Storage::Nfs { exports, .. } => format!(
                "client and knfsd over {exports} through a TCP proxy on the loopback, both in {kernel}, QEMU"
            ),
            Storage::Disk(Disk {
                guest: Some(InGuest {
                    out_of_tree: true, ..
                }),
                ..
            }) => format!("{}, in {kernel}, QEMU", self.apfs),
            Storage::Disk(_) | Storage::Memory | Storage::Overlay(_) => format!("{kernel}, QEMU"),
        }
    }

    /// What may change from run to run: this program, and the initramfs.
    fn freshen(&self, sh: &Shell) -> anyhow::Result<()> {
        let place = self.tree().join("fs-matrix");
        fs::create_dir_all(&place)?;
        let program = place.join("fs-matrix");
        let _ = fs::remove_file(&program);
        // A copy: a concurrent build must not change it under the guests. They load it often, and
        // use no symbols. Not by its name, which a build may have given to another program.
        fs::copy("/proc/self/exe", &program).context("can't copy this program")?;
        cmd!(sh, "strip {program}")
            .quiet()
            .run()
            .context("can't strip the copy of this program")?;
        let _ = fs::remove_dir_all(self.run_dir());
        fs::create_dir_all(self.run_dir())?;

        let file = BufWriter::new(File::create(self.initramfs())?);
        let mut archive = Archive::new(file);
        for dir in [
            "bin", "proc", "sys", "dev", "host", "tree", "upper", "root", "lib",
        ] {
            archive.directory(dir)?;
        }
        archive.program(
            "bin/busybox",
            &fs::read(self.tree().join("usr/bin/busybox"))?,
        )?;
        archive.program("init", include_bytes!("init.sh"))?;
        archive.tree("lib/modules", &self.dir.join("modules"))?;
        archive.finish()?;
        Ok(())
    }
}
