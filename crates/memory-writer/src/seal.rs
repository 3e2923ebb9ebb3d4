//! The metadata in the footer of a sealed or packed file.

use std::ops::Range;

use image_format::ImageId;
#[cfg(doc)]
use page_reader::PageReader;
use page_reader::RamLayout;

/// Metadata stored in the footer.
///
/// # Examples
/// Takes a full snapshot and a diff on top of it, with the state of the vCPUs:
/// ```
/// use dirty_bitmap::DirtyBitmap;
/// use memory_writer::{Layout, MemoryWriter, Seal};
///
/// # let dir = tempfile::tempdir()?;
/// # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
/// # let (ram, dirty) = (vec![0_u8; 1 << 20], DirtyBitmap::new(0, 1 << 20, 4096)?);
/// # let vcpu_state = Vec::new();
/// let mut writer = MemoryWriter::options()
///     .layout(Layout::Sealed)
///     .open(&full, 1 << 20, 4096)?;
/// let parent = writer.image_id().expect("it is sealed");
/// writer.write_full(&ram)?;
/// writer.commit()?;
///
/// dirty.mark(0x5000)?;
/// let epoch = dirty.begin_epoch()?;
/// let mut writer = MemoryWriter::options()
///     .layout(Layout::Packed)
///     .seal(Seal::new().parent(parent))
///     .open(&diff, 1 << 20, 4096)?;
/// writer.write_diff(&ram, epoch.bitmap())?;
/// writer.set_metadata(vcpu_state)?; // as it is now, with the guest paused
/// writer.commit_and_release(epoch)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "a seal has no effect until it is passed to `MemoryWriterOptions::seal`"]
pub struct Seal {
    pub(crate) id: Option<ImageId>,
    pub(crate) parent: Parent,
    pub(crate) ancestors: Vec<ImageId>,
    pub(crate) regions: Option<Vec<Range<u64>>>,
    pub(crate) metadata: Vec<u8>,
}

/// The parent of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Parent {
    /// Not set: valid for full snapshots only.
    #[default]
    Unnamed,
    /// An image without an id.
    Raw,
    Image(ImageId),
}

/// Returns the guest-physical address ranges of a layout.
pub(crate) fn regions_of(layout: &RamLayout) -> Vec<Range<u64>> {
    let regions = layout.regions().iter();
    let regions = regions.map(|region| region.guest_start..region.guest_end());
    regions.collect()
}

impl Seal {
    /// Creates a seal with a new id, no parent, the regions of the reader and no metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the id of the snapshot. The default is a new id, which is correct for every new state
    /// of a guest. An image with the same state as another one has the same id.
    pub fn id(mut self, id: ImageId) -> Self {
        self.id = Some(id);
        self
    }

    /// Sets the parent of a diff, which a chain checks. Without a parent or
    /// [`on_raw_image`](Self::on_raw_image), [`write_diff`](crate::MemoryWriter::write_diff)
    /// refuses to write a diff.
    pub fn parent(mut self, parent: ImageId) -> Self {
        self.parent = Parent::Image(parent);
        self
    }

    /// Names other images that the diff needs: those below its parent. A diff whose destination is
    /// one of them is [refused](crate::SnapshotError::ReplacesParent), as one over its parent is.
    ///
    /// The footer records only the parent. Without this call, a diff may replace the full image
    /// that its chain begins with, or a diff between the two, and no chain could be read any more.
    /// `memory_image::Chain::ids` returns the images of a chain.
    pub fn ancestors(mut self, ancestors: impl IntoIterator<Item = ImageId>) -> Self {
        self.ancestors = ancestors.into_iter().collect();
        self
    }

    /// Declares that a diff is taken on top of a raw image. A raw image has no id, so a chain
    /// cannot check that the diff fits. The diff is refused on top of a sealed or packed image.
    ///
    /// Nothing identifies the raw image at the destination either. The caller ensures that the diff
    /// does not replace it.
    pub fn on_raw_image(mut self) -> Self {
        self.parent = Parent::Raw;
        self
    }

    /// Returns the images that a diff needs, as far as the seal names them.
    pub(crate) fn needed(&self) -> impl Iterator<Item = ImageId> {
        let parent = match self.parent {
            Parent::Image(parent) => Some(parent),
            Parent::Unnamed | Parent::Raw => None,
        };
        parent.into_iter().chain(self.ancestors.iter().copied())
    }

    /// Sets the guest-physical address ranges of the RAM to those of `layout`.
    ///
    /// The default is the [layout of the reader](PageReader::ram_layout). For a reader that does
    /// not know its layout, it is one range that starts at
    /// [`MemoryWriterOptions::ram_start`](crate::MemoryWriterOptions::ram_start), which is wrong
    /// for a guest whose RAM has a gap. A write of a reader with another layout is
    /// [refused](crate::SnapshotError::Regions).
    ///
    /// # Examples
    /// ```
    /// use memory_writer::page_reader::RamLayout;
    /// use memory_writer::{Layout, MemoryWriter, Seal};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("full.mem");
    /// let layout = RamLayout::new([(0, 8192), (1 << 32, 4096)])?; // RAM with a gap
    /// let mut writer = MemoryWriter::options()
    ///     .layout(Layout::Sealed)
    ///     .seal(Seal::new().ram_layout(&layout))
    ///     .open(&dest, layout.ram_size(), 4096)?;
    /// writer.write_full(&vec![7; 12288])?; // a `Vec` does not know the gap
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn ram_layout(self, layout: &RamLayout) -> Self {
        self.regions(regions_of(layout))
    }

    /// Sets the guest-physical address ranges of the RAM like [`ram_layout`](Self::ram_layout):
    /// ascending, in the order of the memory file.
    pub fn regions(mut self, regions: impl IntoIterator<Item = Range<u64>>) -> Self {
        self.regions = Some(regions.into_iter().collect());
        self
    }

    /// Sets small data that belongs to the snapshot, such as the state of the vCPUs. At most 16
    /// MiB; see also [`MemoryWriter::set_metadata`](crate::MemoryWriter::set_metadata).
    pub fn metadata(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.metadata = bytes.into();
        self
    }
}
