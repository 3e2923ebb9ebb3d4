//! Which of the layouts a snapshot's file has.

use std::ops::Range;

use image_format::ImageId;

/// How the pages stand in the file, and what is said of them.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Layout {
    /// Pages at their guest offsets and nothing else: whoever maps or merges raw memory files can use it. Which pages a diff holds, only the
    /// holes of its file tell.
    #[default]
    Raw,
    /// The same, and after the last page of the RAM a footer: which pages are there, zero or clean, whose diff it is, checksums. The first
    /// `ram_size` bytes are those of a raw file. See [`image_format`].
    Sealed(Seal),
    /// A header that says how long the file is, the pages that are present, one after another, and the same footer. Needs no holes, and where a
    /// diff's pages are scattered it is several times faster to write. `memory-image` reads it; nothing maps it as it is.
    Packed(Seal),
}

/// What a footer says that the pages don't.
///
/// # Examples
/// A full snapshot and a diff on top of it, with the vCPUs' state:
/// ```
/// use dirty_bitmap::DirtyBitmap;
/// use memory_writer::{Layout, MemoryWriter, Seal};
///
/// # let dir = tempfile::tempdir()?;
/// # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
/// # let (ram, dirty) = (vec![0_u8; 1 << 20], DirtyBitmap::new(0, 1 << 20, 4096)?);
/// # let vcpu_state = Vec::new();
/// let mut writer = MemoryWriter::options()
///     .layout(Layout::Sealed(Seal::new()))
///     .open(&full, 1 << 20, 4096)?;
/// let parent = writer.image_id().expect("it is sealed");
/// writer.write_full(&ram)?;
/// writer.commit()?;
///
/// dirty.set_dirty(0x5000)?;
/// let epoch = dirty.begin_epoch()?;
/// let mut writer = MemoryWriter::options()
///     .layout(Layout::Packed(Seal::new().parent(parent)))
///     .open(&diff, 1 << 20, 4096)?;
/// writer.write_diff(&ram, epoch.bitmap())?;
/// writer.set_metadata(vcpu_state)?; // as it is now, with the guest paused
/// writer.commit_and_release(epoch)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Seal {
    pub(crate) id: Option<ImageId>,
    pub(crate) parent: Parent,
    pub(crate) regions: Option<Vec<Range<u64>>>,
    pub(crate) metadata: Vec<u8>,
}

/// What a snapshot is taken on top of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Not said: right for full snapshots alone.
    #[default]
    Unnamed,
    /// An image without an id.
    Raw,
    Image(ImageId),
}

impl Seal {
    /// A new id, no parent, one region of RAM, no metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// The id of the snapshot. A new one unless told, which is right for every new state of a guest; an image that stands for the same state as
    /// another has its id.
    pub fn id(mut self, id: ImageId) -> Self {
        self.id = Some(id);
        self
    }

    /// The snapshot that a diff is taken on top of, which a chain is checked by. Without it, or [`on_raw_image`](Self::on_raw_image),
    /// [`write_diff`](crate::MemoryWriter::write_diff) refuses to make a diff.
    pub fn parent(mut self, parent: ImageId) -> Self {
        self.parent = Parent::Image(parent);
        self
    }

    /// States that a diff is taken on top of a raw image. That has no id, so nothing will tell whether the diff fits on it; on a sealed or packed
    /// image, it does not.
    pub fn on_raw_image(mut self) -> Self {
        self.parent = Parent::Raw;
        self
    }

    /// The guest-physical address ranges of the RAM, ascending, in the order of the memory file. One from
    /// [`Options::ram_start`](crate::Options::ram_start) on, unless told.
    pub fn regions(mut self, regions: impl IntoIterator<Item = Range<u64>>) -> Self {
        self.regions = Some(regions.into_iter().collect());
        self
    }

    /// Whatever belongs to the snapshot and is small: the vCPUs' state, say. At most 16 MiB; see also
    /// [`MemoryWriter::set_metadata`](crate::MemoryWriter::set_metadata).
    pub fn metadata(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.metadata = bytes.into();
        self
    }
}
