//! Options of live snapshots: the method, and what happens when the guest is faster than the disk.

use std::fmt;

/// A method of taking a snapshot of a running guest.
///
/// All methods write the RAM of one point in time, when
/// [`freeze`](crate::LiveSnapshot::freeze) is called. They differ in the time that it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// [`CopyOnWrite`](Self::CopyOnWrite) if the tracker can, and otherwise
    /// [`PreCopy`](Self::PreCopy).
    #[default]
    Auto,
    /// Writes all pages while the guest is paused. The pause is as long as the write.
    StopAndCopy,
    /// Writes all pages while the guest runs, and then those that it dirtied meanwhile, until few
    /// are left. These are written after the pause if the tracker can copy pages before they are
    /// overwritten, and in the pause otherwise.
    ///
    /// The guest is slowed down less than by copy-on-write, and more bytes are written.
    PreCopy,
    /// Writes all pages after the pause. A page that is about to be overwritten is copied first.
    CopyOnWrite,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 4] = [
        Self::Auto,
        Self::StopAndCopy,
        Self::PreCopy,
        Self::CopyOnWrite,
    ];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::StopAndCopy => "stop-and-copy",
            Self::PreCopy => "pre-copy",
            Self::CopyOnWrite => "copy-on-write",
        })
    }
}

/// What happens to a write of the guest whose page does not fit into the pool, because the guest
/// dirties memory faster than the file is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WhenPoolFull {
    /// The writing vCPU waits until the file has taken pages out of the pool.
    #[default]
    Wait,
    /// As [`Wait`](Self::Wait), but writes are delayed by up to 2 milliseconds from the time on
    /// that the pool is half full. The guest slows down evenly instead of stopping.
    Throttle,
    /// The snapshot is cancelled with `LiveError::PoolFull`, and the guest continues.
    Cancel,
}
