//! What this machine offers the workspace's tests: its capabilities, and the small file systems
//! that tests run on.
//!
//! A test that needs something a machine may lack asks [`Need::met`] first. Where the thing is
//! missing, one line says so past the test harness's capture, and the test returns. Where it is
//! missing but named in `MEMSNAP_REQUIRE` (comma-separated, or `all`; `cargo xtask test` sets `all`
//! in CI), the test fails.
//!
//! A test repeats what it does a few times, and many times where [`thorough`] says so: `cargo xtask
//! prove`.

#[cfg(target_os = "linux")]
mod loop_mount;
#[cfg(target_os = "linux")]
mod mounts;

#[cfg(target_os = "linux")]
pub use loop_mount::{LoopFs, LoopMount, tool};
#[cfg(target_os = "linux")]
pub use mounts::{HugeFs, Overlay, ReadOnlyBind, TinyTmpfs};

use std::fmt;
use std::io::Write as _;

/// The environment variable that lists the needs that must be met on this machine.
pub const REQUIRE: &str = "MEMSNAP_REQUIRE";

/// The environment variable that names a file to which each test that is not run appends a line.
///
/// `cargo xtask test` sets it, and prints the file at the end: a test harness hides what a passing
/// test prints.
pub const NOT_RUN: &str = "MEMSNAP_NOT_RUN";

/// The environment variable that makes tests [`thorough`].
pub const THOROUGH: &str = "MEMSNAP_THOROUGH";

/// Returns whether tests repeat what they do many times, with other random numbers each time, and
/// wait for races.
///
/// `cargo xtask prove tests` sets `MEMSNAP_THOROUGH=1`. Without it, a test does the same each time.
#[must_use]
pub fn thorough() -> bool {
    std::env::var_os(THOROUGH).is_some_and(|value| value == "1")
}

/// Returns `few`, or `many` where tests are [`thorough`].
#[must_use]
pub fn rounds<T>(few: T, many: T) -> T {
    if thorough() { many } else { few }
}

/// Something that a test needs and a machine may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `/dev/kvm` opens for reading and writing.
    Kvm,
    /// The process may mount file systems and change users: effective user 0 with `CAP_SYS_ADMIN`.
    Root,
    /// `/dev/userfaultfd` opens: page faults of this process, kernel-mode ones too, can be handled
    /// in user space.
    Userfaultfd,
    /// `strace` is installed and may trace: system calls of a child process can be made to fail.
    Strace,
    /// A process may trace its children (ptrace): neither Yama nor a sandbox forbids it.
    Ptrace,
    /// A FUSE file system of a process can be mounted: privilege, `/dev/fuse`.
    Fuse,
    /// An ext4 image can be made and loop-mounted: privilege, loop devices, e2fsprogs.
    Ext4,
    /// An XFS image can be made and loop-mounted: privilege, loop devices, xfsprogs.
    Xfs,
    /// An XFS image in blocks of 16 KiB can be made and loop-mounted: as `Xfs`, and Linux 6.12 or
    /// newer.
    Xfs16k,
    /// A btrfs image can be made and loop-mounted: privilege, loop devices, btrfs-progs.
    Btrfs,
    /// An exFAT image can be made and loop-mounted: privilege, loop devices, FUSE, exfatprogs,
    /// exfat-fuse.
    Exfat,
    /// A Mac of Apple silicon runs virtual machines for processes: `kern.hv_support` is 1.
    Hypervisor,
    /// A program for arm64 can be assembled and emulated: LLVM's tools, QEMU.
    Aarch64,
    /// A Linux guest for x86-64 can be emulated: QEMU, and a Debian of the same kind to download
    /// the kernel from.
    LinuxGuest,
    /// A disk whose every write is logged can be mounted: privilege, loop devices, FUSE, QEMU's
    /// storage daemon.
    LoggedDisk,
    /// hugetlbfs can be mounted and gives huge pages on demand: privilege, and memory for them.
    HugePages,
}

impl Need {
    /// Every need that this crate knows.
    pub const ALL: [Self; 16] = [
        Self::Kvm,
        Self::Root,
        Self::Userfaultfd,
        Self::Strace,
        Self::Ptrace,
        Self::Fuse,
        Self::Ext4,
        Self::Xfs,
        Self::Xfs16k,
        Self::Btrfs,
        Self::Exfat,
        Self::Hypervisor,
        Self::Aarch64,
        Self::LinuxGuest,
        Self::LoggedDisk,
        Self::HugePages,
    ];

    /// The name used in `MEMSNAP_REQUIRE`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Root => "root",
            Self::Userfaultfd => "userfaultfd",
            Self::Strace => "strace",
            Self::Ptrace => "ptrace",
            Self::Fuse => "fuse",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Xfs16k => "xfs16k",
            Self::Btrfs => "btrfs",
            Self::Exfat => "exfat",
            Self::Hypervisor => "hypervisor",
            Self::Aarch64 => "aarch64",
            Self::LinuxGuest => "linux-guest",
            Self::LoggedDisk => "logged-disk",
            Self::HugePages => "huge-pages",
        }
    }

    /// Whether this machine has it, without a word.
    #[must_use]
    pub fn is_met(self) -> bool {
        let opens = |path| {
            std::fs::File::options()
                .read(true)
                .write(true)
                .open(path)
                .is_ok()
        };
        match self {
            Self::Kvm => opens("/dev/kvm"),
            Self::Userfaultfd => opens("/dev/userfaultfd"),
            // In a virtual machine of its own, macOS has none; nor has any other system.
            Self::Hypervisor => std::process::Command::new("sysctl")
                .args(["-n", "kern.hv_support"])
                .stderr(std::process::Stdio::null())
                .output()
                .is_ok_and(|output| output.stdout == b"1\n" && cfg!(target_arch = "aarch64")),
            Self::Aarch64 => run(&["llvm-mc", "llvm-objcopy", "qemu-system-aarch64"]),
            Self::LinuxGuest => {
                let system = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
                cfg!(target_arch = "x86_64")
                    && system.lines().any(|line| line == "ID=debian")
                    && run(&["qemu-system-x86_64", "apt-get", "dpkg-deb"])
            }
            Self::LoggedDisk => {
                Self::Root.is_met()
                    && opens("/dev/fuse")
                    && opens("/dev/loop-control")
                    && run(&["qemu-storage-daemon", "losetup", "setpriv"])
            }
            Self::HugePages => Self::Root.is_met() && gives_huge_pages(),
            Self::Strace => std::process::Command::new("strace")
                .args(["-qq", "-e", "trace=none", "true"])
                .status()
                .is_ok_and(|status| status.success()),
            Self::Ptrace => can_trace(),
            Self::Fuse => cfg!(target_os = "linux") && Self::Root.is_met() && opens("/dev/fuse"),
            Self::Root => nix::unistd::geteuid().is_root() && can_mount(),
            Self::Ext4 | Self::Xfs | Self::Xfs16k | Self::Btrfs | Self::Exfat => {
                Self::Root.is_met() && self.has_tools()
            }
        }
    }

    /// Whether this machine has it; says so on a line of its own, with the name of the asking
    /// `test`, where not.
    ///
    /// # Panics
    /// Panics where the need is not met and `MEMSNAP_REQUIRE` names it.
    #[must_use]
    pub fn met(self, test: &str) -> bool {
        let met = self.is_met();
        if !met {
            let required = std::env::var(REQUIRE).unwrap_or_default();
            let required = required
                .split(',')
                .any(|name| name == "all" || name == self.name());
            assert!(
                !required,
                "{test}: this machine has no {self}, and {REQUIRE} demands it"
            );
            not_run(test, &format!("this machine has no {self}"));
        }
        met
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reports that `test` is not run, past the test harness, and appends it to the file that
/// `MEMSNAP_NOT_RUN` names.
pub fn not_run(test: &str, why: &str) {
    let line = format!("NOT RUN {test}: {why}\n");
    // Not eprintln!: the harness would keep the line of a passing test to itself.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os(NOT_RUN) {
        let list = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        // One write: lines of several processes do not mix.
        let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
    }
}

/// Returns a new directory on a file system where replaced files are recycled: the directory for
/// temporary files, or `/dev/shm` where that is on another file system (overlayfs in a container).
///
/// # Panics
/// Panics where neither is on such a file system.
#[must_use]
pub fn recycling_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    if recycles(dir.path()) {
        return dir;
    }
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
    assert!(
        recycles(dir.path()),
        "neither the directory for temporary files nor /dev/shm is on ext4, XFS, btrfs or tmpfs: set TMPDIR"
    );
    dir
}

#[cfg(target_os = "linux")]
fn recycles(dir: &std::path::Path) -> bool {
    use nix::sys::statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
    };

    let known = [
        EXT4_SUPER_MAGIC,
        XFS_SUPER_MAGIC,
        BTRFS_SUPER_MAGIC,
        TMPFS_MAGIC,
    ];
    statfs(dir).is_ok_and(|it| known.contains(&it.filesystem_type()))
}

#[cfg(not(target_os = "linux"))]
fn recycles(_: &std::path::Path) -> bool {
    true
}

/// Whether all the tools are there.
fn run(tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        std::process::Command::new(tool)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    })
}

#[cfg(target_os = "linux")]
impl Need {
    fn has_tools(self) -> bool {
        match self {
            Self::Ext4 => LoopFs::Ext4.has_tools(),
            Self::Xfs => LoopFs::Xfs.has_tools(),
            Self::Xfs16k => LoopFs::Xfs16k.has_tools() && LoopMount::new(LoopFs::Xfs16k).is_ok(),
            Self::Btrfs => LoopFs::Btrfs.has_tools(),
            Self::Exfat => LoopFs::Exfat.has_tools(),
            _ => true,
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Need {
    fn has_tools(self) -> bool {
        false
    }
}

#[cfg(target_os = "linux")]
fn can_trace() -> bool {
    use nix::sys::ptrace;

    let Ok(mut child) = std::process::Command::new("sleep").arg("60").spawn() else {
        return false;
    };
    let id = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let seized = ptrace::seize(id, ptrace::Options::empty());
    let _ = child.kill();
    let _ = child.wait();
    seized.is_ok()
}

#[cfg(not(target_os = "linux"))]
fn can_trace() -> bool {
    false
}

#[cfg(target_os = "linux")]
fn can_mount() -> bool {
    TinyTmpfs::new(64 * 1024).is_ok()
}

/// Allows huge pages on demand, for good: tests of several processes use them at the same time.
#[cfg(target_os = "linux")]
fn gives_huge_pages() -> bool {
    const ON_DEMAND: &str = "/proc/sys/vm/nr_overcommit_hugepages";
    const ENOUGH: u64 = 64;
    let allowed = || {
        let allowed = std::fs::read_to_string(ON_DEMAND).ok()?;
        allowed.trim().parse::<u64>().ok()
    };
    if allowed().is_some_and(|allowed| allowed < ENOUGH) {
        let _ = std::fs::write(ON_DEMAND, ENOUGH.to_string());
    }
    // By default a mapping reserves its pages.
    allowed() >= Some(ENOUGH) && mounts::HugeFs::new(None).is_ok_and(|fs| fs.has_pages(8))
}

#[cfg(not(target_os = "linux"))]
fn gives_huge_pages() -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn can_mount() -> bool {
    true
}
