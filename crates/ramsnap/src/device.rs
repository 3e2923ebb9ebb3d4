//! Block devices: raw RAM, of which the metadata has no size.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::Context;
use memory_image::{Image, Layout};
use page_reader::FileReader;

/// Returns whether RAM can be in such a file: a regular one, or a block device.
pub fn can_hold_ram(metadata: &Metadata) -> bool {
    metadata.is_file() || metadata.file_type().is_block_device()
}

/// Returns whether there is a block device at `path`.
pub fn is_at(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Returns the size of a file or block device.
pub fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    match metadata.file_type().is_block_device() {
        // No position is used: all reads and writes have offsets.
        true => { file }.seek(SeekFrom::End(0)),
        false => Ok(metadata.len()),
    }
}

/// Opens the block device at `path` as a raw image. It has no holes: all of it is read.
pub fn open_raw(path: &Path) -> anyhow::Result<(Image, File)> {
    let opening = || format!("cannot open the device {path:?}");
    let file = File::open(path).with_context(opening)?;
    let size = size(&file).with_context(opening)?;
    let read = file.try_clone().with_context(opening)?;
    let options = Image::options().layout(Layout::Raw).name(path);
    let image = options.open_reader(FileReader::range(read, 0, size), size)?;
    Ok((image, file))
}
