//! Who may take the marks of a bitmap, as types.

/// Marks that whoever has the bitmap may take: by an [`Epoch`](crate::Epoch), or for good.
#[derive(Debug)]
pub enum Untracked {}

/// Marks that only a [`WriteTracker`](crate::WriteTracker) takes, since it must protect their pages again.
///
/// Everybody else marks and reads.
#[derive(Debug)]
pub enum Tracked {}

/// Marks that an [`Epoch`](crate::Epoch) has taken. They are only read: the epoch may have to give
/// them back, and a mark that is added to a reclaimed one would never come back.
#[derive(Debug)]
pub enum Taken {}

/// The kinds of bitmap that anybody may mark: all but [`Taken`].
pub trait Markable: sealed::Sealed {}

impl Markable for Untracked {}
impl Markable for Tracked {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Untracked {}
    impl Sealed for super::Tracked {}
}
