//! Durability of a commit.

/// The durability that a commit waits for, ordered from weakest to strongest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Durability {
    /// No durability. The replacement is atomic for every process on this machine, also if this
    /// process is killed. A power loss or a crash of the system soon afterwards may leave an empty
    /// or torn file.
    None,
    /// The bytes of the file reach the medium before its new name does. A power loss leaves the
    /// complete old file or the complete new file. Which of the two is undefined for a short time.
    ///
    /// Uses `F_BARRIERFSYNC` on macOS. Linux has no call that orders writes without flushing them:
    /// the file is synced as for [`Full`](Self::Full), and only the sync of the directory is
    /// omitted.
    Barrier,
    /// After the commit returns, a power loss does not undo it.
    ///
    /// Uses `fsync` for the file and its directory. On macOS uses `F_FULLFSYNC`, which also flushes
    /// the drive's cache, or `fsync` if the file system does not support that.
    #[default]
    Full,
}
