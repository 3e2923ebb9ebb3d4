//! Whether all that was written to existing RAM is still there.
//!
//! If another program truncates the file while it is written, later writes extend it again. All
//! writes succeed, the size is right, and zeros are left where RAM was.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use memory_image::Chain;
use page_reader::{FileReader, PageReader, SecretBuffer, reads_as_zeros};
use sparse_file::{ExtentKind, HolesUnknown, check_holes_are_zeros, extents};

use crate::failure::Failure;
use crate::free_space;
use crate::session::Session;
use crate::zeros::unwrapped;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Fails if `file` lacks bytes of `chain` in `runs`, which were written and ascend.
///
/// Where the holes of the file are known to be zeros, none may be where the RAM is not zeros. They
/// are no evidence on tmpfs: an access through a mapping fills a hole with zeros. There, and on
/// file systems whose holes are not known, the file is read and compared with the chain.
pub(super) fn check(
    session: &Session,
    path: &Path,
    file: &File,
    chain: &Chain,
    runs: &[Range<u64>],
) -> anyhow::Result<()> {
    let in_memory =
        free_space::is_on_tmpfs(file).with_context(|| format!("cannot look at {path:?}"))?;
    let is_kept = match check_holes_are_zeros(file) {
        Ok(()) if in_memory => has_all_bytes(session, file, chain, runs),
        Ok(()) => has_no_hole(file, chain, runs),
        Err(HolesUnknown::Io(error)) => Err(error.into()),
        Err(_) => has_all_bytes(session, file, chain, runs),
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
            if !reads_as_zeros(chain, both, &mut buffer).map_err(unwrapped)? {
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

fn has_all_bytes(
    session: &Session,
    file: &File,
    chain: &Chain,
    runs: &[Range<u64>],
) -> anyhow::Result<bool> {
    let reader = FileReader::new(file);
    let (mut expected, mut found) = (SecretBuffer::new(), SecretBuffer::new());
    let bar = session.bar("checking the RAM");
    bar.set_length(chain.ram_size());
    for piece in runs.iter().cloned().flat_map(pieces) {
        session.check("the RAM was not checked")?;
        bar.set_position(piece.start);
        let len = (piece.end - piece.start) as usize;
        let (expected, found) = (expected.sized(len), found.sized(len));
        chain.read(piece.start, expected)?;
        reader.read_at(piece.start, found)?;
        if expected != found {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Splits `range` into the parts that are read at a time.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let starts = range.step_by(CHUNK);
    starts.map(move |start| start..end.min(start + CHUNK as u64))
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
    #[case::nothing(None, true)]
    #[case::the_first_page(Some(0..4096), false)]
    #[case::the_last_page(Some((1 << 20) - 4096..1 << 20), false)]
    #[case::stored_zeros(Some(256 << 10..512 << 10), true)]
    #[case::zeros_and_data(Some(252 << 10..512 << 10), false)]
    fn lost_data_is_found(
        #[case] lost: Option<Range<u64>>,
        #[case] is_kept: bool,
        #[values(false, true)] in_parts: bool,
    ) {
        let (_dir, chain, file) = restored();
        if let Some(lost) = lost {
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
        let session = Session::begin(true, false).unwrap();
        assert_eq!(has_no_hole(&file, &chain, &runs).unwrap(), is_kept);
        assert_eq!(
            has_all_bytes(&session, &file, &chain, &runs).unwrap(),
            is_kept
        );
    }

    /// A part of a page that was truncated is zeros, and no hole.
    #[test]
    fn lost_data_within_a_page_is_found_by_its_bytes() {
        let (_dir, chain, file) = restored();
        file.set_len((1 << 20) - 10).unwrap();
        file.set_len(1 << 20).unwrap();
        let session = Session::begin(true, false).unwrap();
        let all = [0..1 << 20];
        assert!(has_no_hole(&file, &chain, &all).unwrap());
        assert!(!has_all_bytes(&session, &file, &chain, &all).unwrap());
        assert!(has_all_bytes(&session, &file, &chain, &[0..1 << 19]).unwrap());
        assert!(check(&session, Path::new("ram"), &file, &chain, &all).is_err());
    }
}
