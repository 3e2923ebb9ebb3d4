//! Marker types that state how the marks of a bitmap may be taken.

/// The kind of a bitmap whose marks any owner may take, by an [`Epoch`](crate::Epoch) or
/// permanently.
#[derive(Debug)]
pub enum Untracked {}

/// The kind of a bitmap whose marks only a [`WriteTracker`](crate::WriteTracker) takes, because it
/// must protect the pages again.
///
/// All other code can mark and read.
#[derive(Debug)]
pub enum Tracked {}

/// The kind of a bitmap into which a hypervisor's dirty log is moved. Its marks are taken only
/// after that, by a [`LoggedEpoch`](crate::LoggedEpoch).
///
/// All other code can mark and read.
#[derive(Debug)]
pub enum Logged {}

/// The kind of a bitmap that holds the marks taken by an [`Epoch`](crate::Epoch).
///
/// It can only be read. The epoch may have to restore its marks, and a mark added to a reclaimed
/// epoch would be lost.
#[derive(Debug)]
pub enum Taken {}

/// The kinds of bitmap that can be marked: all except [`Taken`].
pub trait Markable: sealed::Sealed {}

impl Markable for Untracked {}
impl Markable for Tracked {}
impl Markable for Logged {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Untracked {}
    impl Sealed for super::Tracked {}
    impl Sealed for super::Logged {}
}
