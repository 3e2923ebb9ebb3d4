//! Saves of RAM that is filled lazily.
#![cfg(target_os = "linux")]

use std::io;
use std::sync::Arc;

use guest_ram::GuestRam;
use lazy_restore::{LazyRam, SizedReader};
use memory_image::{Chain, ImageId};
use memory_writer::{Layout, MemoryWriter, PackedStream, SnapshotError};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use test_machine::needs;

const SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A server that has lost its second half.
struct Half;

impl PageReader for Half {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > SIZE / 2 {
            return Err(io::Error::other("connection lost"));
        }
        buf.fill(7);
        Ok(())
    }
}

fn failed() -> LazyRam {
    let ram = LazyRam::options()
        .start(SizedReader::new(Half, SIZE))
        .unwrap();
    ram.wait().unwrap_err();
    ram
}

fn assert_named(error: &SnapshotError) {
    assert!(matches!(error, SnapshotError::MemoryIo { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("connection lost"), "{text}");
}

#[rstest]
fn save_names_the_error_of_the_source(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(false, true)] in_guest_ram: bool,
) {
    needs!(Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let options = MemoryWriter::options().layout(layout);
    let mut writer = options.open(dir.path().join("ram"), SIZE, PAGE).unwrap();
    let error = match in_guest_ram {
        false => writer.write_full(&failed()),
        true => {
            let layout = RamLayout::single(0, SIZE).unwrap();
            let ram: GuestRam = GuestRam::from_owner(layout, failed()).unwrap();
            writer.write_full(&ram)
        }
    };
    assert_named(&error.unwrap_err());
}

#[test]
fn read_and_stream_return_the_error_of_the_source() {
    needs!(Userfaultfd);
    let ram = failed();
    let error = ram.read_at(SIZE - PAGE, &mut [0; 8]).unwrap_err();
    assert!(error.to_string().contains("connection lost"), "{error}");
    let mut stream = PackedStream::new(Vec::new(), SIZE, PAGE).unwrap();
    assert_named(&stream.write_full(&ram).unwrap_err());
}

#[test]
fn lazy_ram_has_the_image_of_its_source_as_the_parent() {
    needs!(Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full");
    let options = MemoryWriter::options().layout(Layout::Packed);
    let mut writer = options.open(&path, SIZE, PAGE).unwrap();
    writer.write_full(&vec![1; SIZE as usize]).unwrap();
    let id = writer.image_id().map(ImageId::to_bytes);
    writer.commit().unwrap();
    let chain = Chain::open_sealed(&[&path]).unwrap();
    let ram = LazyRam::options().start(Arc::new(chain)).unwrap();
    let layout = RamLayout::single(0, SIZE).unwrap();
    let ram: GuestRam = GuestRam::from_owner(layout, ram).unwrap();
    assert!(id.is_some());
    assert_eq!(ram.dirty_bitmap().parent_id(), id);
}
