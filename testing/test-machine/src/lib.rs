//! Checks of the machine's capabilities, for tests. The file systems that tests run on are in
//! `file_systems`, and are exported here too.
//!
//! A test that needs a capability that a machine may lack begins with [`needs!`]. If the capability
//! is missing, the macro prints one line past the test harness's capture, and the test returns. The
//! test fails instead if `RAMSNAP_REQUIRE` lists the capability (comma-separated, or `all`; `cargo
//! xtask test` sets `all` in CI).
//!
//! A test repeats its work a few times, and many times if [`thorough`] returns true: `cargo xtask
//! prove`.

pub use file_systems::FileSystem;
#[cfg(target_os = "linux")]
pub use file_systems::{HugeFs, LoopMount, Overlay, ReadOnlyBind, TinyTmpfs, tool};

mod alone;
#[cfg(target_os = "linux")]
mod user_namespace;

pub use alone::is_alone;
#[cfg(target_os = "linux")]
pub use user_namespace::in_user_namespace;

use std::fmt;
use std::io::Write as _;

/// The environment variable that lists the needs that must be met on this machine.
pub const REQUIRE: &str = "RAMSNAP_REQUIRE";

/// The environment variable that names a file to which each test that is not run appends a line.
///
/// `cargo xtask test` sets it, and prints the file at the end: a test harness hides what a passing
/// test prints.
pub const NOT_RUN: &str = "RAMSNAP_NOT_RUN";

/// The environment variable that makes tests [`thorough`].
pub const THOROUGH: &str = "RAMSNAP_THOROUGH";

/// Returns whether tests repeat their work many times, with other random numbers each time, and
/// wait for races.
///
/// `cargo xtask prove tests` sets `RAMSNAP_THOROUGH=1`. Without it, a test is deterministic.
#[must_use]
pub fn thorough() -> bool {
    std::env::var_os(THOROUGH).is_some_and(|value| value == "1")
}

/// Returns `few`, or `many` if tests are [`thorough`].
#[must_use]
pub fn rounds<T>(few: T, many: T) -> T {
    if thorough() { many } else { few }
}

/// Returns from the calling test unless this machine meets all of its needs.
///
/// Takes variants of [`Need`], and prints the name of the calling function. `=> VALUE` is what the
/// function returns.
///
/// # Examples
/// ```
/// # use test_machine::FileSystem;
/// fn a_page_is_unprotected() {
///     test_machine::needs!(Userfaultfd);
/// }
///
/// fn a_file_on_xfs_has_holes() -> std::io::Result<()> {
///     test_machine::needs!(Root, Mount(FileSystem::XFS) => Ok(()));
///     Ok(())
/// }
/// ```
///
/// # Panics
/// As [`Need::met`].
#[macro_export]
macro_rules! needs {
    ($($need:expr),+ $(,)?) => {
        $crate::needs!($($need),+ => ())
    };
    ($($need:expr),+ => $value:expr) => {
        {
            #[allow(unused_imports)]
            use $crate::Need::*;
            fn here() {}
            let test = $crate::enclosing(here);
            if !([$($need),+].into_iter().all(|need: $crate::Need| need.met(test))) {
                return $value;
            }
        }
    };
}

/// Returns the path of the function that `here` is declared in.
#[doc(hidden)]
#[must_use]
pub fn enclosing<F>(_here: F) -> &'static str {
    let path = std::any::type_name::<F>();
    let path = path.strip_suffix("::here").unwrap_or(path);
    path.trim_end_matches("::{{closure}}")
}

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

/// Reports past the test harness that `test` is not run, and appends the report to the file that
/// `RAMSNAP_NOT_RUN` names.
pub fn not_run(test: &str, why: &str) {
    let line = format!("NOT RUN {test}: {why}\n");
    // Not eprintln!: the harness captures the output of passing tests.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os(NOT_RUN) {
        let list = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        // A single write, so that lines of several processes are not mixed.
        let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
    }
}

/// Returns a new directory on a file system where replaced files are recycled: in the directory for
/// temporary files, or in `/dev/shm` if the former is on another file system (overlayfs in a
/// container).
///
/// # Panics
/// Panics if neither is on such a file system.
#[must_use]
pub fn recycling_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    if recycles(dir.path()) {
        return dir;
    }
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
    assert!(
        recycles(dir.path()),
        "neither the directory for temporary files nor /dev/shm is on ext4, XFS, btrfs or tmpfs: set \
         TMPDIR to a directory on one of them"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_test_is_its_path() {
        fn here() {}
        let inside = || {
            fn here() {}
            enclosing(here)
        };
        let path = "test_machine::tests::the_name_of_a_test_is_its_path";
        assert_eq!(enclosing(here), path);
        assert_eq!(inside(), path);
    }

    /// For `a_test_returns_unless_its_needs_are_met`, which runs it.
    #[test]
    #[ignore = "run by another test"]
    fn a_test_with_an_unmet_need() {
        // No machine mounts it by a loop device: it is not on a disk.
        needs!(Root, Mount(FileSystem::TMPFS));
        unreachable!("the need cannot be met");
    }

    #[test]
    fn a_test_returns_unless_its_needs_are_met() {
        let run = |required: Option<&str>| {
            let mut test = std::process::Command::new(std::env::current_exe().expect("its path"));
            test.args(["--exact", "tests::a_test_with_an_unmet_need", "--ignored"]);
            test.env_remove(NOT_RUN).env_remove(REQUIRE);
            if let Some(required) = required {
                test.env(REQUIRE, required);
            }
            test.output().expect("the test runs")
        };
        let returned = run(None);
        let line = "NOT RUN test_machine::tests::a_test_with_an_unmet_need: this machine has no ";
        let stderr = String::from_utf8_lossy(&returned.stderr);
        assert!(returned.status.success(), "{returned:?}");
        assert!(stderr.contains(line), "{stderr}");
        assert!(!run(Some("all")).status.success());
        assert!(run(Some("kvm")).status.success());
    }
}
