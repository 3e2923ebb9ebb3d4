//! Directories where replaced files are recycled.

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
