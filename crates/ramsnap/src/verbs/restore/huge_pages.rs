//! RAM of huge pages, in a file on hugetlbfs.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;

use crate::failure::Failure;
use crate::free_space;
use crate::sys::Mapping;

/// Maps a file on hugetlbfs, which has no `write(2)`. Reserves all missing pages, or refuses the
/// file.
pub(super) fn map(path: &Path, file: &File, size: u64) -> anyhow::Result<Option<Mapping>> {
    if !free_space::is_on_hugetlbfs(path) {
        return Ok(None);
    }
    match Mapping::of(file, size) {
        Ok(mapping) => Ok(Some(mapping)),
        Err(source) if source.raw_os_error() == Some(Errno::ENOMEM as i32) => {
            let path = path.to_owned();
            Err(Failure::NoHugePages { path, source }.into())
        }
        // For example, a seal.
        Err(source) => {
            let path = path.to_owned();
            Err(Failure::TargetNotWritable { path, source }.into())
        }
    }
}
