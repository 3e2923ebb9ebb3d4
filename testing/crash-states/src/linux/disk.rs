//! File systems on loop devices: made, mounted, and gone when the guards drop.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use scenarios::start::start;
use test_machine::{Need, tool};

/// A file system and the options that it is mounted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum FileSystem {
    Ext4,
    /// ext4 that does not write a file's data out because it was renamed over another
    #[value(name = "ext4-noauto_da_alloc")]
    Ext4NoAutoDaAlloc,
    /// ext4 that journals names before the data they lead to
    #[value(name = "ext4-writeback")]
    Ext4Writeback,
    Xfs,
    Btrfs,
    /// By the FUSE driver. It has no journal, and a rename on it is not atomic
    Exfat,
}

impl FileSystem {
    pub(super) const ALL: [Self; 6] = [
        Self::Ext4,
        Self::Ext4NoAutoDaAlloc,
        Self::Ext4Writeback,
        Self::Xfs,
        Self::Btrfs,
        Self::Exfat,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Ext4NoAutoDaAlloc => "ext4-noauto_da_alloc",
            Self::Ext4Writeback => "ext4-writeback",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Exfat => "exfat",
        }
    }

    pub(super) fn need(self) -> Need {
        match self {
            Self::Ext4 | Self::Ext4NoAutoDaAlloc | Self::Ext4Writeback => Need::Ext4,
            Self::Xfs => Need::Xfs,
            Self::Btrfs => Need::Btrfs,
            Self::Exfat => Need::Exfat,
        }
    }

    /// Whether it promises what the library builds on: that what was synced stays, and that a
    /// rename is atomic over a loss of power.
    pub(super) fn promises(self) -> bool {
        self != Self::Exfat
    }

    /// The smallest that their tools make, and their drivers mount, with room for the scenarios.
    pub(super) fn size(self) -> u64 {
        match self {
            Self::Xfs => 320 << 20,
            Self::Btrfs => 128 << 20,
            _ => 64 << 20,
        }
    }

    fn kernel_name(self) -> &'static str {
        match self {
            Self::Ext4 | Self::Ext4NoAutoDaAlloc | Self::Ext4Writeback => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Exfat => "exfat",
        }
    }

    /// Whether its journal is committed from time to time although nothing is synced.
    pub(super) fn commits_by_itself(self) -> bool {
        self.kernel_name() == "ext4"
    }

    fn options(self, journal: Journal) -> String {
        let options = match self {
            Self::Ext4NoAutoDaAlloc => "noauto_da_alloc",
            Self::Ext4Writeback => "data=writeback",
            _ => "",
        };
        match journal {
            Journal::CommittedAfter(seconds) if self.commits_by_itself() => {
                format!("{options},commit={seconds}")
            }
            _ => options.into(),
        }
    }

    pub(super) fn make(self, device: &Loop) -> anyhow::Result<()> {
        let mut mkfs = tool(&format!("mkfs.{}", self.kernel_name()));
        match self.kernel_name() {
            // Nothing that the driver would do later, of itself.
            "ext4" => mkfs
                .args(["-q", "-F", "-b", "4096"])
                .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]),
            "exfat" => &mut mkfs,
            _ => mkfs.arg("-q"),
        };
        mkfs.arg(&device.device);
        // mkfs.btrfs looks at all loop devices that are mounted, and fails where one goes
        // meanwhile.
        let mut attempts = 0;
        loop {
            match run(&mut mkfs) {
                Err(error) if attempts < 100 && error.to_string().contains(MOUNT_STATUS) => {
                    attempts += 1;
                }
                made => return made.map(drop),
            }
        }
    }
}

/// What mkfs.btrfs says of a loop device of another job.
const MOUNT_STATUS: &str = "cannot check mount status";

/// When the kernel commits the journal although nothing is synced.
#[derive(Clone, Copy, Debug)]
pub(super) enum Journal {
    AsUsual,
    /// After so many seconds.
    CommittedAfter(u32),
}

/// A loop device over the first bytes of a file. The kernel detaches it when it is closed here and
/// no longer mounted, also where this process is killed.
pub(super) struct Loop {
    device: String,
    _open: File,
}

impl Loop {
    pub(super) fn over(file: &Path, bytes: u64) -> anyhow::Result<Self> {
        let device = run(tool("losetup")
            .args(["--find", "--show", "--sizelimit", &bytes.to_string()])
            .arg(file))?;
        let device = device.trim_end().to_owned();
        let open = File::open(&device).with_context(|| format!("can't open {device}"));
        // It is open: the kernel detaches it when the last one closes it.
        run(tool("losetup").args(["--detach", &device]))?;
        Ok(Self {
            device,
            _open: open?,
        })
    }

    pub(super) fn name(&self) -> &str {
        self.device.trim_start_matches("/dev/")
    }
}

/// For a file system that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system mounted on a directory.
pub(super) struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    pub(super) fn new(fs: FileSystem, device: &Loop, dir: &Path) -> anyhow::Result<Self> {
        Self::with(fs, Journal::AsUsual, device, dir)
    }

    pub(super) fn with(
        fs: FileSystem,
        journal: Journal,
        device: &Loop,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        if fs == FileSystem::Exfat {
            run(tool("mount.exfat-fuse").arg(&device.device).arg(dir))?;
        } else {
            mount(
                Some(device.device.as_str()),
                dir,
                Some(fs.kernel_name()),
                MsFlags::empty(),
                Some(fs.options(journal).trim_start_matches(',')),
            )?;
        }
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns when the driver has let go of the device: another file system may be put there.
    pub(super) fn unmount(self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            match umount2(&self.dir, MntFlags::empty()) {
                // FUSE closes files a moment after the process that had them open.
                Err(Errno::EBUSY) if start.elapsed() < PATIENCE => {
                    thread::sleep(Duration::from_millis(2));
                }
                result => {
                    result.with_context(|| format!("can't unmount {}", self.dir.display()))?;
                    std::mem::forget(self);
                    return Ok(());
                }
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().display().to_string();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = start(command)
        .and_then(Child::wait_with_output)
        .with_context(|| format!("can't run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed: {}", said.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
