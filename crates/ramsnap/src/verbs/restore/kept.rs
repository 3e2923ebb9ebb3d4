//! Whether all that was written to existing RAM is still there.
//!
//! If another program truncates the file while it is written, later writes extend it again. All
//! writes succeed, the size is right, and zeros are left where RAM was.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Context;
use memory_image::Chain;
use page_reader::SecretBuffer;
use sparse_file::{ExtentKind, HolesUnknown, check_holes_are_zeros, extents};

use crate::failure::Failure;
use crate::{room, zeros};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Fails if `file` lacks bytes of `chain` in `runs`, which were written and ascend.
///
/// Where the holes of the file are known to be zeros, none may be where the RAM is not zeros. On
/// hugetlbfs, and in files of ext4 without extents, the file must have as many blocks as the RAM
/// needs. Other file systems give no evidence.
pub(super) fn check(
    path: &Path,
    file: &File,
    chain: &Chain,
    runs: &[Range<u64>],
) -> anyhow::Result<()> {
    let is_kept = match check_holes_are_zeros(file) {
        Ok(()) => has_no_hole(file, chain, runs),
        Err(HolesUnknown::NoExtents) => has_blocks(file, chain, runs),
        Err(HolesUnknown::Io(error)) => Err(error.into()),
        Err(_) if room::is_on_hugetlbfs(path) => has_blocks(file, chain, runs),
        Err(_) => Ok(true),
    };
    match is_kept.with_context(|| format!("cannot look at {path:?}"))? {
        true => Ok(()),
        false => Err(Failure::TargetReplaced {
            path: path.to_owned(),
        }
        .into()),
    }
}

fn has_no_hole(file: &File, chain: &Chain, runs: &[Range<u64>]) -> anyhow::Result<bool> {
    let mut buffer = SecretBuffer::new();
    let mut rest = runs;
    for extent in extents(file)? {
        let extent = extent?;
        if extent.kind == ExtentKind::Data {
            continue;
        }
        let hole = extent.range;
        while let [run, later @ ..] = rest
            && run.start < hole.end
        {
            let both = run.start.max(hole.start)..run.end.min(hole.end);
            // Long runs of stored zeros are holes.
            if data_in(chain, both, &mut buffer, 1)? > 0 {
                return Ok(false);
            }
            if run.end > hole.end {
                break;
            }
            rest = later;
        }
    }
    Ok(true)
}

fn has_blocks(file: &File, chain: &Chain, runs: &[Range<u64>]) -> anyhow::Result<bool> {
    /// The largest inode of ext4, which may store the data of a small file.
    const INODE: u64 = 64 << 10;
    let allocated = file.metadata()?.blocks() * 512 + INODE;
    let stored: u64 = runs.iter().map(|run| run.end - run.start).sum();
    if stored <= allocated {
        return Ok(true);
    }
    let (mut buffer, mut needed) = (SecretBuffer::new(), 0);
    for run in runs {
        needed += data_in(chain, run.clone(), &mut buffer, u64::MAX)?;
    }
    Ok(needed <= allocated)
}

/// Returns the size of the blocks in `range` that are not zeros, or at least `enough` of it.
fn data_in(
    chain: &Chain,
    range: Range<u64>,
    buffer: &mut SecretBuffer,
    enough: u64,
) -> anyhow::Result<u64> {
    let (mut at, mut found) = (range.start, 0);
    while at < range.end && found < enough {
        let len = (range.end - at).min(CHUNK as u64);
        let bytes = buffer.sized(len as usize);
        chain.read(at, bytes)?;
        let data = zeros::blocks(at, bytes).filter(|block| !block.is_zero);
        found += data
            .map(|block| block.range.end - block.range.start)
            .sum::<u64>();
        at += len;
    }
    Ok(found)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::FileExt;

    use rstest::rstest;

    use super::*;

    /// 1 MiB of RAM with data in two places, and zeros that are stored.
    fn restored() -> (tempfile::TempDir, Chain, File) {
        let dir = tempfile::tempdir().unwrap();
        let mut ram = vec![7; 1 << 20];
        ram[256 << 10..512 << 10].fill(0);
        std::fs::write(dir.path().join("ram"), &ram).unwrap();
        let chain = Chain::open_raw(dir.path().join("ram"), 4096).unwrap();
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let file = file.reopen().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&ram[..256 << 10], 0).unwrap();
        file.write_all_at(&ram[512 << 10..], 512 << 10).unwrap();
        (dir, chain, file)
    }

    #[rstest]
    #[case::nothing(None, 0, true)]
    #[case::the_first_page(Some(0..4096), 4096, false)]
    #[case::the_last_page(Some((1 << 20) - 4096..1 << 20), 4096, false)]
    #[case::stored_zeros(Some(256 << 10..512 << 10), 0, true)]
    #[case::zeros_and_data(Some(252 << 10..512 << 10), 4096, false)]
    fn lost_data_is_found_by_its_hole(
        #[case] lost: Option<Range<u64>>,
        #[case] data: u64,
        #[case] is_kept: bool,
        #[values(false, true)] in_parts: bool,
    ) {
        let (_dir, chain, file) = restored();
        if let Some(lost) = lost.clone() {
            sparse_file::punch_hole(&file, lost).unwrap();
        }
        let runs = match in_parts {
            true => vec![
                0..4096,
                4096..300 << 10,
                300 << 10..700 << 10,
                700 << 10..1 << 20,
            ],
            false => vec![0..1 << 20],
        };
        assert_eq!(has_no_hole(&file, &chain, &runs).unwrap(), is_kept);
        let mut buffer = SecretBuffer::new();
        let found = data_in(&chain, lost.unwrap_or(0..0), &mut buffer, u64::MAX);
        assert_eq!(found.unwrap(), data);
    }

    #[test]
    fn lost_data_is_found_by_the_number_of_blocks() {
        let (_dir, chain, file) = restored();
        let runs = [0..1 << 20];
        assert!(has_blocks(&file, &chain, &runs).unwrap());
        file.set_len(4096).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(!has_blocks(&file, &chain, &runs).unwrap());
    }
}
