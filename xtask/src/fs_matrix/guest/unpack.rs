//! Downloads, unpacks and builds what guests are made of.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use xshell::{Shell, cmd};

/// What is unpacked and not installed. `hfsprogs` is in the component non-free.
const UNPACKED: [&str; 11] = [
    "linux-image-amd64",
    "linux-headers-amd64",
    "apfs-dkms",
    "apfsprogs",
    "hfsprogs",
    "exfatprogs",
    "e2fsprogs",
    "xfsprogs",
    "btrfs-progs",
    "nfs-kernel-server",
    "busybox-static",
];

/// The modules that a guest may load, each with what it depends on. crc32c_generic is nobody's dependency and libcrc32c's need.
const MODULES: [&str; 19] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32c_generic",
    "nls_utf8",
    "ext4",
    "xfs",
    "btrfs",
    "apfs",
    "hfsplus",
    "exfat",
    "nfsd",
    "nfs",
    "nfsv3",
    "nfsv4",
    "loop",
];

/// Fills the empty or stale `dir`.
pub fn make(sh: &Shell, dir: &Path, say: &dyn Fn(&str)) -> anyhow::Result<()> {
    for stale in ["tree", "kernel", "modules", "packages", "lists", "sources"] {
        let _ = fs::remove_dir_all(dir.join(stale));
    }
    say("downloading Debian's kernel and file system tools");
    download(sh, dir)?;
    say("unpacking them");
    unpack(sh, dir)?;
    say("building the module of APFS");
    build_apfs(sh, dir)?;
    pick_modules(sh, dir)?;
    unpack_kernel(sh, dir)
}

/// Downloads with package lists and a source list of our own: nothing of this machine's configuration is touched.
fn download(sh: &Shell, dir: &Path) -> anyhow::Result<()> {
    let (sources, lists) = (dir.join("sources"), dir.join("lists"));
    let packages = dir.join("packages");
    for dir in [&sources, &lists.join("partial"), &packages.join("partial")] {
        fs::create_dir_all(dir)?;
    }
    let mut found = false;
    for file in configured_sources() {
        let (Ok(text), Some(name)) = (fs::read_to_string(&file), file.file_name()) else {
            continue;
        };
        let text = with_components(&text);
        found |= !text.is_empty();
        fs::write(sources.join(name), text)?;
    }
    if !found {
        bail!("no Debian package source is configured in /etc/apt");
    }
    let options = [
        format!("Dir::Etc::sourceparts={}", sources.display()),
        "Dir::Etc::sourcelist=/dev/null".into(),
        format!("Dir::State::lists={}", lists.display()),
        format!("Dir::Cache={}", dir.join("cache").display()),
        format!("Dir::Cache::archives={}", packages.display()),
        // Only lists and archives of our own are written.
        "Debug::NoLocking=1".into(),
        // apt's own user may not be able to enter this directory.
        "APT::Sandbox::User=root".into(),
    ];
    let options = options.iter().flat_map(|option| ["-o", option]);
    let options: &Vec<_> = &options.collect();
    let packages = UNPACKED;
    cmd!(sh, "apt-get {options...} --quiet --quiet update")
        .quiet()
        .run()
        .context("can't get the package lists")?;
    cmd!(
        sh,
        "apt-get {options...} --quiet --quiet --yes --no-install-recommends --download-only --reinstall install {packages...}"
    )
    .quiet()
    .ignore_stdout()
    .run()
    .context("can't download the packages")
}

fn configured_sources() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d");
    let parts = parts.into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files
}

/// The sources of Debian itself, with the components contrib and non-free. Others are left out.
fn with_components(text: &str) -> String {
    let one_line = |line: &str| line.trim_start().starts_with("deb ");
    if text.lines().any(one_line) {
        let debian = text
            .lines()
            .filter(|line| one_line(line) && line.contains("/debian"));
        return debian
            .map(|line| format!("{line} contrib non-free\n"))
            .collect();
    }
    let stanzas = text.split("\n\n").filter(|stanza| {
        stanza
            .lines()
            .any(|line| line.starts_with("URIs:") && line.contains("/debian"))
    });
    stanzas
        .map(|stanza| {
            let lines = stanza
                .lines()
                .map(|line| match line.strip_prefix("Components:") {
                    Some(components) => format!("Components:{components} contrib non-free\n"),
                    None => format!("{line}\n"),
                });
            lines.collect::<String>() + "\n"
        })
        .collect()
}

/// The kernel's packages go to `kernel`, the others to `tree`, which is laid over the root: with its directories where the root has them.
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
        let contents = cmd!(sh, "dpkg-deb --fsys-tarfile {package}");
        let contents = contents.quiet().output()?.stdout;
        cmd!(
            sh,
            "tar --extract --keep-directory-symlink --directory {to}"
        )
        .quiet()
        .stdin(contents)
        .run()
        .with_context(|| format!("can't unpack {name}"))?;
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
    for module in MODULES {
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

/// Takes the kernel out of its compressed image: to do so is two of the five seconds of a boot in an emulator. QEMU starts it by the
/// PVH entry. The fields are those of the kernel's `Documentation/arch/x86/boot.rst`.
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

pub fn only_entry(dir: &Path) -> anyhow::Result<String> {
    only_entry_with(dir, "")
}

pub fn only_entry_with(dir: &Path, prefix: &str) -> anyhow::Result<String> {
    let entries = fs::read_dir(dir).with_context(|| format!("can't list {}", dir.display()))?;
    let mut names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(prefix));
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name),
        _ => bail!("{} should have one entry {prefix}*", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_own_sources_get_the_components_and_others_are_left_out() {
        let stanzas = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main\n\nTypes: deb\nURIs: https://other/node\nSuites: x\nComponents: main\n";
        let with = with_components(stanzas);
        assert!(
            with.contains("Components: main contrib non-free\n"),
            "{with}"
        );
        assert!(!with.contains("node"), "{with}");
        let lines =
            "# a comment\ndeb http://mirror/debian bookworm main\ndeb http://other/ x main\n";
        assert_eq!(
            with_components(lines),
            "deb http://mirror/debian bookworm main contrib non-free\n"
        );
    }
}
