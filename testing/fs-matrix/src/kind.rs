//! The kinds of mount that the matrix can make.

use std::fmt;

/// A file system, as the library meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
    /// btrfs
    Btrfs,
    /// tmpfs
    Tmpfs,
    /// overlayfs over ext4, as in a container
    Overlay,
    /// APFS
    Apfs,
    /// APFS that distinguishes upper from lower case (macOS)
    ApfsCase,
    /// HFS+
    Hfsplus,
    /// exFAT
    Exfat,
    /// NFS version 3
    Nfs3,
    /// NFS version 4.2
    Nfs4,
}

/// Where a kind can be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// By this machine's kernel.
    Here,
    /// By Debian's kernel in QEMU.
    Guest,
    /// Not on this system.
    Nowhere,
}

impl Kind {
    pub(crate) const ALL: [Self; 11] = [
        Self::Ext4,
        Self::Xfs,
        Self::Btrfs,
        Self::Tmpfs,
        Self::Overlay,
        Self::Apfs,
        Self::ApfsCase,
        Self::Hfsplus,
        Self::Exfat,
        Self::Nfs3,
        Self::Nfs4,
    ];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
            Self::Overlay => "overlay",
            Self::Apfs => "apfs",
            Self::ApfsCase => "apfs-case",
            Self::Hfsplus => "hfsplus",
            Self::Exfat => "exfat",
            Self::Nfs3 => "nfs3",
            Self::Nfs4 => "nfs4",
        }
    }

    pub(crate) fn place(self) -> Place {
        let on_mac = cfg!(target_os = "macos");
        match self {
            Self::Ext4 | Self::Xfs | Self::Btrfs | Self::Tmpfs | Self::Overlay => match on_mac {
                true => Place::Nowhere,
                false => Place::Here,
            },
            // macOS mounts an export of its own by version 3 only with what it has on board.
            Self::Nfs4 if on_mac => Place::Nowhere,
            _ if on_mac => Place::Here,
            Self::ApfsCase => Place::Nowhere,
            Self::Apfs | Self::Hfsplus | Self::Exfat | Self::Nfs3 | Self::Nfs4 => Place::Guest,
        }
    }

    /// The kinds that this system can mount.
    pub(crate) fn here() -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(|kind| kind.place() != Place::Nowhere)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "XFS",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
            Self::Overlay => "overlayfs over ext4",
            Self::Apfs => "APFS",
            Self::ApfsCase => "APFS, case-sensitive",
            Self::Hfsplus => "HFS+",
            Self::Exfat => "exFAT",
            Self::Nfs3 => "NFS v3",
            Self::Nfs4 => "NFS v4.2",
        })
    }
}
