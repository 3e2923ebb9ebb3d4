//! A snapshot in a recycled file equals one in a new file, except for the inode number.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{
    MemoryIoStep, MemoryWriter, MemoryWriterOptions, SnapshotError, WriteAmbiguity,
};
use proptest::prelude::*;
use rstest::rstest;
use sparse_file::ExtentKind;
use support::{Until, pattern};
use test_machine::{FileSystem, LoopMount, Need, TinyTmpfs, needs, recycling_dir, rounds};

const SIZE: u64 = 1 << 20;

/// The tests include diffs of every page and pages smaller than a block.
fn recycling() -> MemoryWriterOptions {
    any_diff().recycle(1 << 30)
}

fn any_diff() -> MemoryWriterOptions {
    MemoryWriter::options().allow_ambiguous_diff(true)
}

fn data(path: &Path) -> Vec<Range<u64>> {
    let file = File::open(path).unwrap();
    let extents = sparse_file::extents(&file).unwrap();
    extents
        .map(Result::unwrap)
        .filter(|extent| extent.kind == ExtentKind::Data)
        .map(|extent| extent.range)
        .collect()
}

fn dirty(size: u64, page: u64, pages: &[u64]) -> DirtyBitmap {
    let dirty = DirtyBitmap::new(0, size, page).unwrap();
    for page in pages {
        dirty.mark_page(*page).unwrap();
    }
    dirty
}

fn full(options: MemoryWriterOptions, dest: &Path, ram: &[u8]) -> bool {
    let mut writer = options.open(dest, ram.len() as u64, 4096).unwrap();
    let recycled = writer.recycled();
    writer.write_full(ram).unwrap();
    writer.commit().unwrap();
    assert!(std::fs::read(dest).unwrap() == ram);
    recycled
}

/// Leaves a recyclable file full of old bytes beside `dest`.
fn leave_recyclable_file(dest: &Path, size: u64) {
    for seed in [1, 2] {
        full(recycling(), dest, &pattern(size as usize, seed));
    }
}

/// Serializes tests: until its `exec`, a child that a test starts has the files of other tests
/// open, and an open file is not recycled.
fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn assert_equals_new_file(dir: &Path, old: u64, page: u64, pages: &[u64]) {
    let (dest, fresh) = (dir.join("recycled"), dir.join("new"));
    let ram = pattern(SIZE as usize, 3);
    leave_recyclable_file(&dest, old);
    for (options, path) in [(recycling(), &dest), (any_diff(), &fresh)] {
        let mut writer = options.open(path, SIZE, page).unwrap();
        assert_eq!(writer.recycled(), *path == dest);
        writer.write_diff(&ram, &dirty(SIZE, page, pages)).unwrap();
        writer.commit().unwrap();
    }
    assert!(std::fs::read(&dest).unwrap() == std::fs::read(&fresh).unwrap());
    assert_eq!(data(&dest), data(&fresh));
    let allocated = |path| std::fs::metadata(path).unwrap().blocks() * 512;
    // The extent tree may have grown and shrunk in another order.
    assert!(allocated(&dest).abs_diff(allocated(&fresh)) <= 64 << 10);
    std::fs::remove_file(fresh).unwrap();
}

fn assert_all_equal_new_files(dir: &Path) {
    for page in [512, 4096, 16384] {
        let last = SIZE / page - 1;
        let every_other: Vec<_> = (0..last).step_by(2).collect();
        let all: Vec<_> = (0..=last).collect();
        for pages in [
            &[] as &[_],
            &[0],
            &[last],
            &[3, 4, 9, last],
            &every_other,
            &all,
        ] {
            assert_equals_new_file(dir, SIZE, page, pages);
        }
    }
    for old in [SIZE / 4, SIZE * 2] {
        assert_equals_new_file(dir, old, 4096, &[0, 5]);
    }
}

#[rstest]
#[case::ext4(FileSystem::EXT4)]
#[case::xfs(FileSystem::XFS)]
#[case::btrfs(FileSystem::BTRFS)]
fn recycled_diff_has_the_bytes_and_holes_of_a_new_one(#[case] fs: &'static FileSystem) {
    let _turn = one_at_a_time();
    if Need::Mount(fs).met("recycled_diff_has_the_bytes_and_holes_of_a_new_one") {
        let mount = LoopMount::new(fs).unwrap();
        assert_all_equal_new_files(mount.path());
    }
}

#[test]
fn recycled_diff_on_tmpfs_equals_a_new_one() {
    let _turn = one_at_a_time();
    if Need::Root.met("recycled_diff_on_tmpfs_equals_a_new_one") {
        let tmpfs = TinyTmpfs::new(16 << 20).unwrap();
        assert_all_equal_new_files(tmpfs.path());
    }
}

#[test]
fn full_snapshots_alternate_between_two_files() {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("mem");
    let mut inodes = Vec::new();
    for seed in 0..6 {
        let recycled = full(recycling(), &dest, &pattern(SIZE as usize, seed));
        assert_eq!(recycled, seed >= 2);
        inodes.push(std::fs::metadata(&dest).unwrap().ino());
    }
    assert!(
        inodes
            .windows(3)
            .all(|three| three[0] == three[2] && three[0] != three[1])
    );
}

#[test]
fn failed_snapshot_in_a_recycled_file_keeps_the_old_one() {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("mem");
    leave_recyclable_file(&dest, SIZE);
    let mut writer = recycling().open(&dest, SIZE, 4096).unwrap();
    assert!(writer.recycled());
    let reader = Until {
        ram: pattern(SIZE as usize, 3),
        offset: SIZE / 2,
        then: || std::io::Error::other("planted"),
    };
    writer.write_full(&reader).unwrap_err();
    assert!(matches!(
        writer.commit(),
        Err(SnapshotError::Incomplete { .. })
    ));
    assert!(std::fs::read(&dest).unwrap() == pattern(SIZE as usize, 2));
    support::assert_nothing_but(dir.path(), &["mem"]);
}

#[test]
fn recycled_file_is_wiped_before_it_joins_a_group() {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("mem");
    leave_recyclable_file(&dest, SIZE);
    let mut writer = recycling().open(&dest, SIZE, 4096).unwrap();
    assert!(writer.recycled());
    writer
        .write_diff(&pattern(SIZE as usize, 3), &dirty(SIZE, 4096, &[7]))
        .unwrap();
    let mut group = atomic_file::AtomicGroup::new();
    group.add(writer.finish().unwrap()).unwrap();
    group.commit().unwrap();
    assert_eq!(data(&dest), [7 * 4096..8 * 4096]);
}

/// Not a test of its own: `under_strace` runs it.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let any = std::env::var_os(ANY_DIFF).is_some();
    let mut writer = recycling()
        .allow_ambiguous_diff(any)
        .open(Path::new(&dir).join("mem"), SIZE, 4096)
        .unwrap();
    assert!(writer.recycled());
    writer
        .write_diff(&pattern(SIZE as usize, 3), &dirty(SIZE, 4096, &[7]))
        .unwrap();
    let report = match writer.commit() {
        Ok(()) => "committed".to_owned(),
        Err(SnapshotError::MemoryIo {
            step: MemoryIoStep::Wipe,
            offset,
            source,
            ..
        }) => {
            format!("not wiped at {offset}: {:?}", source.raw_os_error())
        }
        Err(SnapshotError::AmbiguousDiff {
            source: WriteAmbiguity::NotAsWritten { offset },
            ..
        }) => format!("ambiguous at {offset}"),
        Err(other) => format!("{other:?}"),
    };
    println!("\nREPORT {report}");
}

const DIR: &str = "MEMORY_WRITER_TEST_DIR";
const ANY_DIFF: &str = "MEMORY_WRITER_TEST_ANY_DIFF";

fn under_strace(dir: &Path, tampering: &str, any_diff: bool) -> String {
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fallocate",
        "-e",
        tampering,
    ]);
    strace.arg(std::env::current_exe().unwrap());
    strace.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    if any_diff {
        strace.env(ANY_DIFF, "1");
    }
    let output = strace.env(DIR, dir).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = text
        .lines()
        .find_map(|line| Some(line.split_once("REPORT ")?.1.to_owned()));
    report.unwrap_or_else(|| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn pages_are_zeroed_where_holes_cannot_be_punched() {
    let _turn = one_at_a_time();
    needs!(Strace);
    // Punching fails at the first or at the second call.
    for when in ["1+", "2+"] {
        let dir = recycling_dir();
        let dest = dir.path().join("mem");
        leave_recyclable_file(&dest, SIZE);
        let punching = format!("inject=fallocate:error=EOPNOTSUPP:when={when}");
        assert_eq!(under_strace(dir.path(), &punching, true), "committed");
        let mut expected = vec![0; SIZE as usize];
        let page = 7 * 4096..8 * 4096;
        expected[page.clone()].copy_from_slice(&pattern(SIZE as usize, 3)[page]);
        assert!(std::fs::read(&dest).unwrap() == expected);
    }
}

/// Zeros in place of holes would count as pages of the diff.
#[test]
fn raw_diff_with_zeros_in_place_of_holes_is_refused() {
    let _turn = one_at_a_time();
    needs!(Strace);
    let dir = recycling_dir();
    let dest = dir.path().join("mem");
    leave_recyclable_file(&dest, SIZE);
    let report = under_strace(
        dir.path(),
        "inject=fallocate:error=EOPNOTSUPP:when=1+",
        false,
    );
    assert_eq!(report, "ambiguous at 0");
    assert!(std::fs::read(&dest).unwrap() == pattern(SIZE as usize, 2));
}

#[test]
fn file_that_cannot_be_wiped_is_not_committed() {
    let _turn = one_at_a_time();
    needs!(Strace);
    let dir = recycling_dir();
    let dest = dir.path().join("mem");
    leave_recyclable_file(&dest, SIZE);
    let report = under_strace(dir.path(), "inject=fallocate:error=EIO:when=2+", true);
    assert_eq!(report, format!("not wiped at {}: Some({})", 8 * 4096, 5));
    assert!(std::fs::read(&dest).unwrap() == pattern(SIZE as usize, 2));
    support::assert_nothing_but(dir.path(), &["mem"]);
}

/// A snapshot: its size, its page size, and the writes that make it.
#[derive(Clone, Debug)]
struct Save {
    pages: u64,
    page: u64,
    writes: Vec<Option<Vec<u64>>>,
}

fn save() -> impl Strategy<Value = Save> {
    let page = prop::sample::select(vec![512, 1024, 4096, 8192]);
    (1..40_u64, page).prop_flat_map(|(pages, page)| {
        let diff = prop::collection::vec(0..pages, 0..12);
        let writes = prop::collection::vec(prop::option::weighted(0.8, diff), 1..4);
        writes.prop_map(move |writes| Save {
            pages,
            page,
            writes,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(6, 24)))]

    #[test]
    fn recycled_file_contains_no_old_byte(saves in prop::collection::vec(save(), 3..8)) {
        let _turn = one_at_a_time();
        let dir = recycling_dir();
        let dest = dir.path().join("mem");
        for (turn, save) in saves.iter().enumerate() {
            let size = save.pages * save.page;
            let mut writer = recycling().open(&dest, size, save.page).unwrap();
            prop_assert_eq!(writer.recycled(), turn >= 2);
            let mut expected = vec![0; size as usize];
            for (round, write) in save.writes.iter().enumerate() {
                let ram: Vec<_> = pattern(size as usize, (turn * 5 + round) as u8);
                match write {
                    None => {
                        writer.write_full(&ram).unwrap();
                        expected.clone_from(&ram);
                    }
                    Some(pages) => {
                        writer.write_diff(&ram, &dirty(size, save.page, pages)).unwrap();
                        for page in pages {
                            let bytes = (page * save.page) as usize..((page + 1) * save.page) as usize;
                            expected[bytes.clone()].copy_from_slice(&ram[bytes]);
                        }
                    }
                }
            }
            writer.commit().unwrap();
            prop_assert!(std::fs::read(&dest).unwrap() == expected);
        }
    }
}
