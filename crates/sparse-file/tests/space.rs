//! Grows, reserves and punches files.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rstest::rstest;
use sparse_file::{SpaceError, allocated_bytes, grow, punch_hole, reserve, share_blocks};
use support::{Fs, contents, ram};

#[rstest]
#[case::grow(grow)]
#[case::reserve(reserve)]
fn file_is_never_shrunk(#[case] set: fn(&File, u64) -> Result<(), SpaceError>) {
    let file = tempfile::tempfile().expect("file");
    let bytes = ram(10_000);
    file.write_all_at(&bytes, 0).expect("written");
    for len in [0, 1, 4096, 9_999, 10_000] {
        set(&file, len).expect("left alone");
        assert!(contents(&file) == bytes, "{len}");
    }
    set(&file, 20_000).expect("grown");
    assert!(contents(&file)[..10_000] == bytes);
    assert!(contents(&file)[10_000..] == vec![0; 10_000]);
}

#[rstest]
fn punched_range_reads_as_zeros_and_the_rest_is_unchanged(
    #[values(Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs,
    #[values(0..1, 1..2, 4096..8192, 5000..50_000, 8191..8193, 90_000..100_000, 90_000..i64::MAX as u64, 200_000..300_000)]
    range: Range<u64>,
) {
    let Some(place) = fs.mount("punched_range_reads_as_zeros_and_the_rest_is_unchanged") else {
        return;
    };
    let file = place.file();
    let mut bytes = ram(100_000);
    file.write_all_at(&bytes, 0).expect("written");
    punch_hole(&file, range.clone()).expect("punched");
    let end = bytes.len().min(range.end as usize);
    let start = end.min(range.start as usize);
    bytes[start..end].fill(0);
    assert!(contents(&file) == bytes);
}

#[test]
fn punching_frees_the_blocks() {
    let file = tempfile::tempfile().expect("file");
    file.write_all_at(&ram(1 << 20), 0).expect("written");
    file.sync_all().expect("synced");
    let before = allocated_bytes(&file).expect("allocated");
    match punch_hole(&file, 0..512 << 10) {
        Err(SpaceError::Unsupported { .. }) => {
            return eprintln!("no punching in the temporary directory");
        }
        punched => punched.expect("punched"),
    }
    assert!(allocated_bytes(&file).expect("allocated") <= before - (512 << 10));
}

#[test]
fn unsupported_punch_is_reported_and_changes_no_bytes() {
    let Some(place) = Fs::Exfat.mount("unsupported_punch_is_reported_and_changes_no_bytes") else {
        return;
    };
    let file = place.file();
    let bytes = ram(100_000);
    file.write_all_at(&bytes, 0).expect("written");
    let error = punch_hole(&file, 4096..8192).expect_err("no punching");
    assert!(matches!(error, SpaceError::Unsupported { .. }), "{error:?}");
    assert!(contents(&file) == bytes);
}

#[rstest]
#[case::ends_before_it_starts(Range { start: 9, end: 8 })]
#[case::past_the_largest_offset(0..1 << 63)]
fn invalid_range_is_refused(#[case] range: Range<u64>) {
    let file = tempfile::tempfile().expect("file");
    let error = punch_hole(&file, range.clone()).expect_err("invalid");
    assert!(matches!(error, SpaceError::InvalidRange { range: named } if named == range));
}

#[test]
fn length_of_2_to_the_63_is_refused() {
    let file = tempfile::tempfile().expect("file");
    for set in [grow, reserve] {
        let error = set(&file, 1 << 63).expect_err("invalid");
        assert!(
            matches!(error, SpaceError::InvalidRange { .. }),
            "{error:?}"
        );
    }
}

#[test]
fn reserving_more_than_the_free_space_is_an_error() {
    test_machine::needs!(Root);
    let tmpfs = test_machine::TinyTmpfs::new(64 << 10).expect("mounted");
    let file = tempfile::tempfile_in(tmpfs.path()).expect("file");
    let error = reserve(&file, 1 << 20).expect_err("no room");
    assert!(
        matches!(error, SpaceError::Io { source, .. } if source.kind() == ErrorKind::StorageFull)
    );
}

#[rstest]
#[case::btrfs(Fs::Btrfs, true)]
#[case::xfs(Fs::Xfs, true)]
#[case::ext4(Fs::Ext4, false)]
#[case::tmpfs(Fs::Tmpfs, false)]
fn shared_blocks_hold_the_same_bytes_until_a_write(#[case] fs: Fs, #[case] can: bool) {
    let Some(place) = fs.mount("shared_blocks_hold_the_same_bytes_until_a_write") else {
        return;
    };
    let (from, to) = (place.file(), place.file());
    let bytes = ram(64 << 10);
    from.write_all_at(&bytes, 0).expect("written");
    from.write_all_at(b"behind", 64 << 10).expect("written");
    let shared = share_blocks(&from, &to, 64 << 10);
    if !can {
        assert!(
            matches!(shared, Err(SpaceError::Unsupported { .. })),
            "{shared:?}"
        );
        assert_eq!(to.metadata().expect("metadata").len(), 0);
        return;
    }
    shared.expect("shared");
    assert!(contents(&to) == bytes);
    to.write_all_at(&[9; 10], 5000).expect("written");
    assert!(contents(&from)[..64 << 10] == bytes);
    assert!(contents(&to)[..5000] == bytes[..5000] && contents(&to)[5000] == 9);
    let odd = share_blocks(&from, &to, 100);
    assert!(
        matches!(odd, Err(SpaceError::Unsupported { .. })),
        "{odd:?}"
    );
}
