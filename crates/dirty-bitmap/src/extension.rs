//! The marks that extended an epoch last.

use std::ops::Deref;

use crate::bitmap::TakenBitmap;

/// The marks by which an [`Epoch`](crate::Epoch) was extended last. Dereferences to their bitmap.
///
/// The pages of an extension must be written, even if all pages of the epoch were written before.
/// Dropping the value loses no mark, because the epoch holds the marks too. But a save that
/// extends its epoch, writes nothing, and [releases](crate::Epoch::release) the epoch lacks pages,
/// so the compiler warns about an extension that is not used:
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 4096)?;
/// # let mut epoch = bitmap.begin_epoch()?;
/// epoch.extend()?;
/// # Ok(())
/// # }
/// ```
/// ```
/// # #![deny(unused_must_use)]
/// # fn write_diff(_: &dirty_bitmap::TakenBitmap) {}
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 4096)?;
/// # let mut epoch = bitmap.begin_epoch()?;
/// write_diff(epoch.extend()?.bitmap());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "the pages of an extension are dirty: write them before the epoch is released"]
pub struct Extension<'e>(&'e TakenBitmap);

impl<'e> Extension<'e> {
    pub(crate) fn new(marks: &'e TakenBitmap) -> Self {
        Self(marks)
    }

    /// Returns the marks, for as long as the epoch is borrowed.
    pub fn bitmap(self) -> &'e TakenBitmap {
        self.0
    }
}

impl Deref for Extension<'_> {
    type Target = TakenBitmap;

    fn deref(&self) -> &TakenBitmap {
        self.0
    }
}
