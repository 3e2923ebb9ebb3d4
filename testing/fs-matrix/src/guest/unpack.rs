//! Downloads, unpacks and builds what guests are made of.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use file_systems::{FileSystem, InGuest};
use linux_guest::debian::{download, only_entry, only_entry_with, unpack_package};
use xshell::{Shell, cmd};

use super::in_guest::{CRC32C, NFS_MODULES};

/// What is unpacked and not installed, beside the file systems' packages.
const UNPACKED: [&str; 4] = [
    "linux-image-amd64",
    "linux-headers-amd64",
    "nfs-kernel-server",
    "busybox-static",
];

/// The modules that a guest may load, each with its dependencies, beside those of the file systems.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "loop",
    CRC32C,
];

/// Returns `first`, and those of `of` that each file system of a guest has, each once.
fn with_file_systems(
    first: impl IntoIterator<Item = &'static str>,
    of: fn(InGuest) -> &'static [&'static str],
) -> Vec<&'static str> {
    let mut names: Vec<_> = first.into_iter().collect();
    let guests = FileSystem::ALL
        .into_iter()
        .filter_map(|fs| fs.disk()?.guest);
    for name in guests.flat_map(of) {
        if !names.contains(name) {
            names.push(name);
        }
    }
    names
}

/// Fills the empty or stale `dir`.
pub(super) fn make(sh: &Shell, dir: &Path, say: &dyn Fn(&str)) -> anyhow::Result<()> {
    for stale in ["tree", "kernel", "modules", "packages", "lists", "sources"] {
        let _ = fs::remove_dir_all(dir.join(stale));
    }
    say("downloading Debian's kernel and file system tools");
    download(
        sh,
        dir,
        &with_file_systems(UNPACKED, |guest| guest.packages),
    )?;
    say("unpacking them");
    unpack(sh, dir)?;
    say("building the module of APFS");
    build_apfs(sh, dir)?;
    pick_modules(sh, dir)?;
    unpack_kernel(sh, dir)
}

/// The kernel's packages go to `kernel`, the others to `tree`, which is laid over the root: with
/// its directories where the root has them.
fn unpack(sh: &Shell, dir: &Path) -> anyhow::Result<()> {
    let (kernel, tree) = (dir.join("kernel"), dir.join("tree"));
    fs::create_dir_all(&kernel)?;
    for name in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(tree.join("usr").join(name))?;
        std::os::unix::fs::symlink(format!("usr/{name}"), tree.join(name))?;
    }
    for entry in fs::read_dir(dir.join("packages"))? {
        let package = entry?.path();
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let of_kernel = [
            "linux-image-",
            "linux-headers-",
            "linux-kbuild-",
            "apfs-dkms",
        ];
        let to = if of_kernel.iter().any(|prefix| name.starts_with(prefix)) {
            &kernel
        } else if name.ends_with(".deb") && !name.starts_with("linux-") {
            &tree
        } else {
            continue;
        };
        unpack_package(sh, &package, to)?;
    }
    Ok(())
}

fn build_apfs(sh: &Shell, dir: &Path) -> anyhow::Result<()> {
    let release = only_entry(&dir.join("kernel/lib/modules"))?;
    let sources = dir.join("kernel/usr/src");
    let headers = sources.join(format!("linux-headers-{release}"));
    let common = release.trim_end_matches("-amd64");
    let common = sources.join(format!("linux-headers-{common}-common"));
    // What is installed at /usr/src has its absolute path in this one line.
    fs::write(
        headers.join("Makefile"),
        format!("include {}/Makefile\n", common.display()),
    )?;
    let apfs = sources.join(only_entry_with(&sources, "linux-apfs-rw-")?);
    let jobs = std::thread::available_parallelism()?.to_string();
    cmd!(
        sh,
        "make --silent --jobs {jobs} -C {headers} M={apfs} modules"
    )
    .quiet()
    .ignore_stdout()
    .ignore_stderr()
    .run()
    .context("can't build the module of APFS")?;
    let module = apfs.join("apfs.ko");
    cmd!(sh, "strip --strip-debug {module}").quiet().run()?;
    let extra = dir.join(format!("kernel/lib/modules/{release}/extra"));
    fs::create_dir_all(&extra)?;
    fs::copy(module, extra.join("apfs.ko"))?;
    Ok(())
}

/// Copies the modules that guests load, and all that those depend on, to a directory of their own.
fn pick_modules(sh: &Shell, dir: &Path) -> anyhow::Result<()> {
    let kernel = dir.join("kernel");
    let release = only_entry(&kernel.join("lib/modules"))?;
    let busybox = dir.join("tree/usr/bin/busybox");
    cmd!(sh, "{busybox} depmod -b {kernel} {release}")
        .quiet()
        .run()
        .context("can't list the modules' dependencies")?;
    let (from, to) = (
        kernel.join("lib/modules").join(&release),
        dir.join("modules").join(&release),
    );
    let dependencies = fs::read_to_string(from.join("modules.dep"))?;
    fs::create_dir_all(&to)?;
    for list in ["modules.dep", "modules.alias", "modules.symbols"] {
        fs::copy(from.join(list), to.join(list))?;
    }
    for module in with_file_systems(MODULES.into_iter().chain(NFS_MODULES), |guest| {
        guest.modules
    }) {
        let line = dependencies.lines().find(|line| {
            line.split(':')
                .next()
                .is_some_and(|path| path.ends_with(&format!("/{module}.ko")))
        });
        let line = line.with_context(|| format!("this kernel has no module {module}"))?;
        for file in line.split([':', ' ']).filter(|file| !file.is_empty()) {
            let copy = to.join(file);
            fs::create_dir_all(copy.parent().context("a file in a directory")?)?;
            fs::copy(from.join(file), copy)?;
        }
    }
    Ok(())
}

/// Takes the kernel out of its compressed image: to do so is two of the five seconds of a boot in
/// an emulator. QEMU starts it by the PVH entry. The fields are those of the kernel's
/// `Documentation/arch/x86/boot.rst`.
fn unpack_kernel(sh: &Shell, dir: &Path) -> anyhow::Result<()> {
    const SETUP_SECTORS: usize = 0x1f1;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let release = only_entry(&dir.join("kernel/lib/modules"))?;
    let image = fs::read(dir.join(format!("kernel/boot/vmlinuz-{release}")))?;
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..)?.first_chunk()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    let payload = || {
        let code = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * 512;
        let start = code + word(PAYLOAD_OFFSET)?;
        // The last word is the size of what is packed.
        image.get(start..start + word(PAYLOAD_LENGTH)? - 4)
    };
    let payload = payload().context("the kernel's image has no payload")?;
    let packed = dir.join("vmlinux.xz");
    fs::write(&packed, payload)?;
    let kernel = cmd!(sh, "xz --decompress --stdout {packed}")
        .quiet()
        .output()
        .context("can't unpack the kernel's image")?;
    fs::remove_file(packed)?;
    if !kernel.stdout.starts_with(b"\x7fELF") {
        bail!("the kernel's image has no ELF file packed by xz");
    }
    fs::write(dir.join("vmlinux"), kernel.stdout)?;
    Ok(())
}
