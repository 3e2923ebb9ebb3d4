//! The table of file systems.

use std::fmt;

/// A file system, as the library meets it, and everything that tests know about it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// The name on command lines and in `RAMSNAP_REQUIRE`.
    pub name: &'static str,
    /// The name in reports.
    pub title: &'static str,
    /// Where its files are.
    pub storage: Storage,
    /// Who mounts it in the matrix on Linux; `None` if it has no place there.
    pub linux: Option<LinuxHost>,
    /// How it is mounted in the matrix on macOS; `None` if it has no place there.
    pub macos: Option<MacOs>,
    /// The checks of the matrix that take a minute on it in an emulated guest.
    pub slow: &'static [SlowCheck],
    /// Its part in the crash states; `None` if it has none.
    pub crash_states: Option<CrashStates>,
}

/// Where the files of a file system are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// On a block device.
    Disk(Disk),
    /// In memory.
    Memory,
    /// In a file system below, which this one is an overlay of.
    Overlay(&'static FileSystem),
    /// On a server that exports a file system on a disk by NFS.
    Nfs {
        /// What the server exports.
        exports: &'static FileSystem,
        /// The mount option that selects the protocol.
        version: &'static str,
    },
}

/// A file system on a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The program that makes it, and its arguments before the device.
    pub mkfs: &'static [&'static str],
    /// Further arguments with which the driver has nothing to initialize later.
    pub mkfs_eager: &'static [&'static str],
    /// The name of the kernel's driver, as in `mount -t NAME`.
    pub driver: &'static str,
    /// The options that this machine mounts it with.
    pub options: &'static str,
    /// How this machine mounts it; `None` if only the guest does.
    pub local: Option<Local>,
    /// How Debian's kernel in QEMU mounts it; `None` if only this machine does.
    pub guest: Option<InGuest>,
    /// The smallest disk that its tools make and its driver mounts, with room for the scenarios.
    pub min_size: u64,
    /// The size of the image for a test.
    pub test_size: u64,
    /// Whether it promises what the library builds on: what was synced stays, and a rename is
    /// atomic over a loss of power, by a journal or because blocks in use are never overwritten.
    pub survives_power_loss: bool,
    /// Whether the kernel commits its journal from time to time although nothing is synced. It then
    /// takes the mount option `commit=SECONDS`.
    pub commits_by_itself: bool,
}

/// How this machine mounts a file system on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// What its tools are in.
    pub packages: &'static [ToolPackage],
    /// The program that mounts it by FUSE; `None` for the kernel's driver.
    pub fuse: Option<&'static str>,
    /// The first Linux that mounts it; `None` if every one in use does.
    pub since: Option<&'static str>,
}

/// How Debian's kernel in QEMU mounts a file system on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InGuest {
    /// The Debian packages with its tools, and with its module if that is built.
    pub packages: &'static [&'static str],
    /// The kernel modules that it takes, apart from their dependencies.
    pub modules: &'static [&'static str],
    /// The options for reading and writing, after `rw`.
    pub options: &'static str,
    /// The options for reading only, after `ro`.
    pub read_only: &'static str,
    /// Whether its driver is not part of the kernel: a module built from a package.
    pub out_of_tree: bool,
}

/// A Debian package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolPackage {
    /// The name of the package.
    pub name: &'static str,
    /// A program that is there once it is installed.
    pub program: &'static str,
}

/// The kernel that mounts a file system on Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinuxHost {
    /// This machine's.
    Local,
    /// Debian's, in QEMU.
    Guest,
}

/// How macOS mounts a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MacOs {
    /// From a disk image, by this name of `hdiutil`.
    Image(&'static str),
    /// From an export of this machine to itself.
    Nfs,
}

/// A check of the matrix that takes a minute on some file systems in an emulated guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlowCheck {
    /// A file over 4 GiB: slow without holes, or where blocks are allocated slowly.
    LargeFile,
    /// A full disk: slow if the smallest disk is large.
    DiskFull,
}

/// The part of a file system in the crash states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashStates {
    /// Scenarios run on it.
    Scenarios,
    /// Scenarios run on it, and commits that lack a step are looked for: it hides fewer of them
    /// than the others.
    ScenariosAndMutants,
}

const MIB: u64 = 1 << 20;

const E2FSPROGS: ToolPackage = ToolPackage {
    name: "e2fsprogs",
    program: "mkfs.ext4",
};
const XFSPROGS: ToolPackage = ToolPackage {
    name: "xfsprogs",
    program: "mkfs.xfs",
};
const BTRFS_PROGS: ToolPackage = ToolPackage {
    name: "btrfs-progs",
    program: "mkfs.btrfs",
};
const EXFATPROGS: ToolPackage = ToolPackage {
    name: "exfatprogs",
    program: "mkfs.exfat",
};
const EXFAT_FUSE: ToolPackage = ToolPackage {
    name: "exfat-fuse",
    program: "mount.exfat-fuse",
};

const EXT4_DISK: Disk = Disk {
    // A block of 4 KiB, as on disks of usual sizes. Small images have 1 KiB by default.
    mkfs: &["mkfs.ext4", "-q", "-F", "-b", "4096"],
    mkfs_eager: &["-E", "lazy_itable_init=0,lazy_journal_init=0"],
    driver: "ext4",
    options: "",
    local: Some(Local {
        packages: &[E2FSPROGS],
        fuse: None,
        since: None,
    }),
    guest: Some(InGuest {
        packages: &["e2fsprogs"],
        modules: &["ext4"],
        options: "noatime",
        read_only: "noatime",
        out_of_tree: false,
    }),
    min_size: 64 * MIB,
    test_size: 128 * MIB,
    survives_power_loss: true,
    commits_by_itself: true,
};

const XFS_DISK: Disk = Disk {
    mkfs: &["mkfs.xfs", "-q", "-f"],
    mkfs_eager: &[],
    driver: "xfs",
    options: "",
    local: Some(Local {
        packages: &[XFSPROGS],
        fuse: None,
        since: None,
    }),
    guest: Some(InGuest {
        packages: &["xfsprogs"],
        modules: &["xfs"],
        options: "noatime",
        read_only: "noatime",
        out_of_tree: false,
    }),
    // mkfs.xfs makes nothing smaller than 300 MiB.
    min_size: 320 * MIB,
    test_size: 320 * MIB,
    survives_power_loss: true,
    commits_by_itself: false,
};

impl FileSystem {
    /// ext4.
    pub const EXT4: &'static Self = &Self {
        name: "ext4",
        title: "ext4",
        storage: Storage::Disk(EXT4_DISK),
        linux: Some(LinuxHost::Local),
        macos: None,
        slow: &[],
        crash_states: Some(CrashStates::Scenarios),
    };

    /// ext4 that does not write a file's data out because it was renamed over another.
    pub const EXT4_NOAUTO_DA_ALLOC: &'static Self = &Self {
        name: "ext4-noauto_da_alloc",
        title: "ext4 that does not write a file's data out because it was renamed over another",
        storage: Storage::Disk(Disk {
            options: "noauto_da_alloc",
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: Some(CrashStates::ScenariosAndMutants),
        ..*Self::EXT4
    };

    /// ext4 that journals names before the data they lead to.
    pub const EXT4_WRITEBACK: &'static Self = &Self {
        name: "ext4-writeback",
        title: "ext4 that journals names before the data they lead to",
        storage: Storage::Disk(Disk {
            options: "data=writeback",
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: Some(CrashStates::ScenariosAndMutants),
        ..*Self::EXT4
    };

    /// ext4 with inodes of 128 bytes, which have no field for a time of creation.
    pub const EXT4_SMALL_INODES: &'static Self = &Self {
        name: "ext4-small-inodes",
        title: "ext4 with inodes of 128 bytes",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "128"],
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::EXT4
    };

    /// ext4 whose files are mapped by indirect blocks, as on ext3.
    pub const EXT4_NO_EXTENTS: &'static Self = &Self {
        name: "ext4-no-extents",
        title: "ext4 without extents",
        storage: Storage::Disk(Disk {
            mkfs: &[
                "mkfs.ext4",
                "-q",
                "-F",
                "-b",
                "4096",
                "-O",
                "^extents,^64bit",
            ],
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::EXT4
    };

    /// ext4 that stores small files in their inodes.
    pub const EXT4_INLINE_DATA: &'static Self = &Self {
        name: "ext4-inline-data",
        title: "ext4 that stores small files in their inodes",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "inline_data"],
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::EXT4
    };

    /// ext3, mounted as such.
    pub const EXT3: &'static Self = &Self {
        name: "ext3",
        title: "ext3",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.ext3", "-q", "-F", "-b", "4096"],
            driver: "ext3",
            guest: None,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::EXT4
    };

    /// ext2, mounted as such.
    pub const EXT2: &'static Self = &Self {
        name: "ext2",
        title: "ext2",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.ext2", "-q", "-F", "-b", "4096"],
            mkfs_eager: &["-E", "lazy_itable_init=0"],
            driver: "ext2",
            guest: None,
            survives_power_loss: false,
            ..EXT4_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::EXT4
    };

    /// XFS.
    pub const XFS: &'static Self = &Self {
        name: "xfs",
        title: "XFS",
        storage: Storage::Disk(XFS_DISK),
        linux: Some(LinuxHost::Local),
        macos: None,
        slow: &[],
        crash_states: Some(CrashStates::ScenariosAndMutants),
    };

    /// XFS in blocks of 16 KiB: no hole is smaller.
    pub const XFS_16K: &'static Self = &Self {
        name: "xfs16k",
        title: "XFS in blocks of 16 KiB",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.xfs", "-q", "-f", "-b", "size=16384"],
            local: Some(Local {
                packages: &[XFSPROGS],
                fuse: None,
                since: Some("6.12"),
            }),
            guest: None,
            ..XFS_DISK
        }),
        linux: None,
        crash_states: None,
        ..*Self::XFS
    };

    /// btrfs.
    pub const BTRFS: &'static Self = &Self {
        name: "btrfs",
        title: "btrfs",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.btrfs", "-q", "-f"],
            mkfs_eager: &[],
            driver: "btrfs",
            options: "",
            local: Some(Local {
                packages: &[BTRFS_PROGS],
                fuse: None,
                since: None,
            }),
            guest: Some(InGuest {
                packages: &["btrfs-progs"],
                modules: &["btrfs"],
                options: "noatime",
                read_only: "noatime",
                out_of_tree: false,
            }),
            // mkfs.btrfs makes nothing smaller than 109 MiB.
            min_size: 128 * MIB,
            test_size: 320 * MIB,
            survives_power_loss: true,
            commits_by_itself: false,
        }),
        linux: Some(LinuxHost::Local),
        macos: None,
        slow: &[],
        crash_states: Some(CrashStates::Scenarios),
    };

    /// tmpfs.
    pub const TMPFS: &'static Self = &Self {
        name: "tmpfs",
        title: "tmpfs",
        storage: Storage::Memory,
        linux: Some(LinuxHost::Local),
        macos: None,
        slow: &[],
        crash_states: None,
    };

    /// overlayfs over ext4, as in a container.
    pub const OVERLAY: &'static Self = &Self {
        name: "overlay",
        title: "overlayfs over ext4",
        storage: Storage::Overlay(Self::EXT4),
        linux: Some(LinuxHost::Local),
        macos: None,
        slow: &[],
        crash_states: None,
    };

    /// APFS.
    pub const APFS: &'static Self = &Self {
        name: "apfs",
        title: "APFS",
        storage: Storage::Disk(Disk {
            mkfs: &["mkapfs"],
            mkfs_eager: &[],
            driver: "apfs",
            options: "",
            local: None,
            guest: Some(InGuest {
                packages: &["apfs-dkms", "apfsprogs"],
                modules: &["apfs"],
                // Without the option this driver mounts for reading only.
                options: "readwrite",
                read_only: "noatime",
                out_of_tree: true,
            }),
            // mkapfs makes nothing smaller than 512 MiB.
            min_size: 513 * MIB,
            test_size: 513 * MIB,
            survives_power_loss: false,
            commits_by_itself: false,
        }),
        linux: Some(LinuxHost::Guest),
        macos: Some(MacOs::Image("APFS")),
        // The driver takes a minute to allocate 100 MB, and its smallest disk has 512 MiB.
        slow: &[SlowCheck::LargeFile, SlowCheck::DiskFull],
        crash_states: None,
    };

    /// APFS that distinguishes upper from lower case (macOS).
    pub const APFS_CASE: &'static Self = &Self {
        name: "apfs-case",
        title: "APFS, case-sensitive",
        linux: None,
        macos: Some(MacOs::Image("Case-sensitive APFS")),
        ..*Self::APFS
    };

    /// HFS+.
    pub const HFSPLUS: &'static Self = &Self {
        name: "hfsplus",
        title: "HFS+",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.hfsplus"],
            mkfs_eager: &[],
            driver: "hfsplus",
            options: "",
            local: None,
            guest: Some(InGuest {
                // In Debian's component non-free.
                packages: &["hfsprogs"],
                modules: &["nls_utf8", "hfsplus"],
                options: "nls=utf8",
                read_only: "nls=utf8",
                out_of_tree: false,
            }),
            min_size: 64 * MIB,
            test_size: 128 * MIB,
            survives_power_loss: false,
            commits_by_itself: false,
        }),
        linux: Some(LinuxHost::Guest),
        macos: Some(MacOs::Image("HFS+J")),
        // No holes.
        slow: &[SlowCheck::LargeFile],
        crash_states: None,
    };

    /// exFAT. This machine mounts it by the FUSE driver. It has no holes and no journal, and a
    /// rename on it is not atomic over a loss of power.
    pub const EXFAT: &'static Self = &Self {
        name: "exfat",
        title: "exFAT",
        storage: Storage::Disk(Disk {
            mkfs: &["mkfs.exfat"],
            mkfs_eager: &[],
            driver: "exfat",
            options: "",
            local: Some(Local {
                packages: &[EXFATPROGS, EXFAT_FUSE],
                fuse: Some("mount.exfat-fuse"),
                since: None,
            }),
            guest: Some(InGuest {
                packages: &["exfatprogs"],
                modules: &["exfat"],
                options: "iocharset=utf8",
                read_only: "iocharset=utf8",
                out_of_tree: false,
            }),
            min_size: 64 * MIB,
            test_size: 128 * MIB,
            survives_power_loss: false,
            commits_by_itself: false,
        }),
        linux: Some(LinuxHost::Guest),
        macos: Some(MacOs::Image("ExFAT")),
        // No holes.
        slow: &[SlowCheck::LargeFile],
        crash_states: Some(CrashStates::Scenarios),
    };

    /// NFS version 3.
    pub const NFS3: &'static Self = &Self {
        name: "nfs3",
        title: "NFS v3",
        storage: Storage::Nfs {
            exports: Self::EXT4,
            version: "vers=3",
        },
        linux: Some(LinuxHost::Guest),
        macos: Some(MacOs::Nfs),
        slow: &[],
        crash_states: None,
    };

    /// NFS version 4.2.
    pub const NFS4: &'static Self = &Self {
        name: "nfs4",
        title: "NFS v4.2",
        storage: Storage::Nfs {
            exports: Self::EXT4,
            version: "vers=4.2",
        },
        linux: Some(LinuxHost::Guest),
        // macOS mounts an export of its own by version 3 only with what it has on board.
        macos: None,
        slow: &[],
        crash_states: None,
    };

    /// The whole table, in the order of reports.
    pub const ALL: [&'static Self; 19] = [
        Self::EXT4,
        Self::EXT4_NOAUTO_DA_ALLOC,
        Self::EXT4_WRITEBACK,
        Self::EXT4_SMALL_INODES,
        Self::EXT4_NO_EXTENTS,
        Self::EXT4_INLINE_DATA,
        Self::EXT3,
        Self::EXT2,
        Self::XFS,
        Self::XFS_16K,
        Self::BTRFS,
        Self::TMPFS,
        Self::OVERLAY,
        Self::APFS,
        Self::APFS_CASE,
        Self::HFSPLUS,
        Self::EXFAT,
        Self::NFS3,
        Self::NFS4,
    ];

    /// Returns the file system of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|fs| fs.name == name)
    }

    /// Returns the file systems of the matrix, on any system.
    pub fn in_matrix() -> impl Iterator<Item = &'static Self> {
        let all = Self::ALL.into_iter();
        all.filter(|fs| fs.linux.is_some() || fs.macos.is_some())
    }

    /// Returns the file systems of the crash states.
    pub fn in_crash_states() -> impl Iterator<Item = &'static Self> {
        let all = Self::ALL.into_iter();
        all.filter(|fs| fs.crash_states.is_some())
    }

    /// Returns what it is on a disk, if it is on one itself.
    #[must_use]
    pub const fn disk(&self) -> Option<&Disk> {
        match &self.storage {
            Storage::Disk(disk) => Some(disk),
            Storage::Memory | Storage::Overlay(_) | Storage::Nfs { .. } => None,
        }
    }

    /// Returns the disk that its files are on in the end: its own, or that of a file system below.
    #[must_use]
    pub const fn disk_below(&self) -> Option<&Disk> {
        match &self.storage {
            Storage::Disk(disk) => Some(disk),
            Storage::Memory => None,
            Storage::Overlay(below) | Storage::Nfs { exports: below, .. } => below.disk(),
        }
    }
}

/// Writes the title.
impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title)
    }
}

/// Writes the name: an entry is long.
impl fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_finds_its_own_entry() {
        for fs in FileSystem::ALL {
            assert_eq!(FileSystem::named(fs.name), Some(fs));
        }
    }

    #[test]
    fn an_entry_can_be_mounted_where_it_says() {
        for fs in FileSystem::ALL {
            let disk = fs.disk_below();
            let mounted_by = |host| match host {
                LinuxHost::Local => disk.is_none_or(|disk| disk.local.is_some()),
                LinuxHost::Guest => disk.is_some_and(|disk| disk.guest.is_some()),
            };
            assert!(fs.linux.is_none_or(mounted_by), "{fs:?}");
            let local = fs.disk().is_some_and(|disk| disk.local.is_some());
            assert!(fs.crash_states.is_none() || local, "{fs:?}");
        }
    }

    #[test]
    fn a_disk_for_tests_has_at_least_the_smallest_size() {
        for disk in FileSystem::ALL.iter().filter_map(|fs| fs.disk()) {
            assert!(disk.min_size <= disk.test_size, "{}", disk.driver);
        }
    }
}
