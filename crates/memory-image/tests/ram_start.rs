//! A full image and the diffs on top of it record the same RAM range, for any bitmap.

use atomic_file::AtomicGroup;
use dirty_bitmap::{DirtyBitmap, Epoch};
use memory_image::Chain;
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use rstest::rstest;

const START: u64 = 0x4000_0000;
const SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Commits a single file, or a group.
fn commit(mut writer: MemoryWriter, mut epoch: Epoch<&DirtyBitmap>, in_a_group: bool) {
    if !in_a_group {
        return writer.commit_and_release(epoch).unwrap();
    }
    writer.check_epoch(&mut epoch).unwrap();
    let mut group = AtomicGroup::new();
    group.add(writer.finish().unwrap()).unwrap();
    epoch.release_after(|| group.commit()).unwrap();
}

#[rstest]
fn diff_and_full_image_of_one_bitmap_cover_the_same_ram(
    #[values(Layout::Sealed, Layout::Packed)] full: Layout,
    #[values(Layout::Sealed, Layout::Packed)] diff: Layout,
    #[values(false, true)] in_a_group: bool,
) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut ram = vec![1; SIZE as usize];
    let bitmap = DirtyBitmap::new(START, SIZE, PAGE).unwrap();
    bitmap.mark_range(START, SIZE).unwrap();

    let epoch = bitmap.begin_epoch().unwrap();
    let mut writer = MemoryWriter::options()
        .layout(full)
        .open(path("full"), SIZE, PAGE)
        .unwrap();
    let id: ImageId = writer.image_id().unwrap();
    writer.write_full(&ram).unwrap();
    commit(writer, epoch, in_a_group);

    ram[5000] = 9;
    bitmap.mark(START + 5000).unwrap();
    let epoch = bitmap.begin_epoch().unwrap();
    let mut writer = MemoryWriter::options()
        .layout(diff)
        .seal(Seal::new().parent(id))
        .open(path("diff"), SIZE, PAGE)
        .unwrap();
    writer.write_diff(&ram, epoch.bitmap()).unwrap();
    commit(writer, epoch, in_a_group);

    let chain = Chain::open_sealed(&[path("full"), path("diff")]).unwrap();
    let mut restored = vec![0; SIZE as usize];
    chain.restore(&mut restored[..]).unwrap();
    assert!(restored == ram);
}
