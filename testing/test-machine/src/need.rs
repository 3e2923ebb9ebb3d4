//! Capabilities of the machine.

use std::fmt;

use file_systems::FileSystem;
#[cfg(target_os = "linux")]
use file_systems::{HugeFs, LoopMount, TinyTmpfs};

use crate::not_run::not_run;

/// The environment variable that lists the needs that must be met on this machine.
pub const REQUIRE: &str = "RAMSNAP_REQUIRE";

/// A capability that a test needs and a machine may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `/dev/kvm` opens for reading and writing.
    Kvm,
    /// The process may mount file systems and change users: effective user 0 with `CAP_SYS_ADMIN`.
    Root,
    /// `/dev/userfaultfd` opens: page faults of this process, including kernel-mode ones, can be
    /// handled in user space.
    Userfaultfd,
    /// `strace` is installed and may trace: system calls of a child process can be made to fail.
    Strace,
    /// A process may trace its children (ptrace): neither Yama nor a sandbox forbids it.
    Ptrace,
    /// A FUSE file system of a process can be mounted: privilege, `/dev/fuse`.
    Fuse,
    /// An image of the file system can be created and loop-mounted: privilege, loop devices, the
    /// file system's tools and, for a FUSE driver, FUSE.
    Mount(&'static FileSystem),
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
    /// A user namespace can be created and mapped: privilege, `setpriv` and `unshare` installed.
    UserNamespace,
    /// hugetlbfs can be mounted and provides huge pages on demand: privilege, and memory for them.
    HugePages,
    /// The debugger `gdb` is installed.
    Gdb,
    /// The debugger `drgn` is installed.
    Drgn,
}

impl Need {
    /// Returns the name used in `RAMSNAP_REQUIRE`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Root => "root",
            Self::Userfaultfd => "userfaultfd",
            Self::Strace => "strace",
            Self::Ptrace => "ptrace",
            Self::Fuse => "fuse",
            Self::Mount(fs) => fs.name,
            Self::Hypervisor => "hypervisor",
            Self::Aarch64 => "aarch64",
            Self::LinuxGuest => "linux-guest",
            Self::LoggedDisk => "logged-disk",
            Self::UserNamespace => "user-namespace",
            Self::HugePages => "huge-pages",
            Self::Gdb => "gdb",
            Self::Drgn => "drgn",
        }
    }

    /// Returns whether this machine meets the need. Prints nothing.
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
            // The framework is that of testing/fake-hvf.
            Self::Hypervisor if cfg!(hvf_fake) => true,
            // macOS inside a virtual machine supports no hypervisor; nor does any other system.
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
            Self::UserNamespace => Self::Root.is_met() && has_user_namespaces(),
            Self::HugePages => Self::Root.is_met() && gives_huge_pages(),
            Self::Gdb => run(&["gdb"]),
            Self::Drgn => run(&["drgn"]),
            Self::Strace => std::process::Command::new("strace")
                .args(["-qq", "-e", "trace=none", "true"])
                .status()
                .is_ok_and(|status| status.success()),
            Self::Ptrace => can_trace(),
            Self::Fuse => cfg!(target_os = "linux") && Self::Root.is_met() && opens("/dev/fuse"),
            Self::Root => nix::unistd::geteuid().is_root() && can_mount(),
            Self::Mount(fs) => Self::Root.is_met() && can_loop_mount(fs),
        }
    }

    /// Returns whether this machine meets the need. If not, prints a line with the name of the
    /// calling `test`.
    ///
    /// # Panics
    /// Panics if the need is not met and `RAMSNAP_REQUIRE` lists it.
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

/// Returns whether all the tools are installed.
fn run(tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        std::process::Command::new(tool)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    })
}

/// Returns whether the tools are there and, if the kernel may be too old, whether it mounts the
/// file system.
#[cfg(target_os = "linux")]
fn can_loop_mount(fs: &FileSystem) -> bool {
    let Some(disk) = fs.disk() else { return false };
    let any_kernel = disk.local.is_some_and(|local| local.since.is_none());
    disk.has_tools() && (any_kernel || LoopMount::new(fs).is_ok())
}

#[cfg(not(target_os = "linux"))]
fn can_loop_mount(_: &FileSystem) -> bool {
    false
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

/// Returns whether the machine provides huge pages. Permits them on demand and never revokes this,
/// because tests of several processes use them at the same time.
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
    // A mapping reserves its pages by default.
    allowed() >= Some(ENOUGH) && HugeFs::new(None).is_ok_and(|fs| fs.has_pages(8))
}

#[cfg(not(target_os = "linux"))]
fn gives_huge_pages() -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn can_mount() -> bool {
    true
}

#[cfg(target_os = "linux")]
fn has_user_namespaces() -> bool {
    std::process::Command::new("setpriv")
        .args(["--reuid=12345", "--regid=12345", "--clear-groups"])
        .args(["unshare", "-U", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(not(target_os = "linux"))]
fn has_user_namespaces() -> bool {
    false
}
