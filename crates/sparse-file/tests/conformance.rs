//! Properties of every engine on every file system.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rstest::rstest;
use sparse_file::{
    Capabilities, Engine, Extent, ExtentKind, HoleSupport, RunSource, WriteError, WriteOptions,
    allocated_bytes, extents, grow, write_runs,
};
use support::{Copied, Fs, Pieces, Shifted, contents, go_on, ram, union};
use test_machine::rounds;

const PAGE: u64 = 4096;
/// Ends with a partial page.
const LEN: u64 = 256 * PAGE + 1234;

fn every_option() -> impl Iterator<Item = WriteOptions> {
    Engine::ALL.iter().copied().flat_map(|engine| {
        [4 << 10, 64 << 10, 1 << 20]
            .map(|chunk| WriteOptions::new().engine(engine).chunk_size(chunk))
    })
}

/// Generates unsorted, overlapping, adjacent and empty runs, of pages and of odd bytes, some up to
/// the end.
fn any_runs() -> impl Strategy<Value = Vec<Range<u64>>> {
    let odd = (0..=LEN, 0..=20 * PAGE).prop_map(|(start, len)| start..(start + len).min(LEN));
    let pages = (0..=256u64, 0..20u64)
        .prop_map(|(start, len)| start * PAGE..((start + len) * PAGE).clamp(start * PAGE, LEN));
    let to_the_end = (0..=LEN).prop_map(|start| start..LEN);
    let long = (0..=LEN, 64 * PAGE..=LEN).prop_map(|(start, len)| start..(start + len).min(LEN));
    let run = prop_oneof![4 => odd, 6 => pages, 1 => long, 1 => to_the_end];
    prop::collection::vec(run, 0..24)
}

fn for_any_runs(cases: u32, property: impl Fn(Vec<Range<u64>>)) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&any_runs(), |runs| {
            property(runs);
            Ok(())
        })
        .expect("holds for all runs");
}

/// Writes one run after the other to a vector.
fn oracle(ram: &[u8], runs: &[Range<u64>]) -> Vec<u8> {
    let mut bytes = vec![0; ram.len()];
    for run in runs {
        let run = run.start as usize..run.end as usize;
        bytes[run.clone()].copy_from_slice(&ram[run]);
    }
    bytes
}

#[rstest]
fn written_bytes_match_a_naive_writer(
    #[values(Fs::TempDir, Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs, Fs::Exfat)] fs: Fs,
) {
    let Some(place) = fs.mount("written_bytes_match_a_naive_writer") else {
        return;
    };
    let ram = ram(LEN as usize);
    let (aligned, sectors, odd) = (
        Shifted::new(&ram, 0),
        Shifted::new(&ram, 512),
        Shifted::new(&ram, 1),
    );
    let ways: [&Write<'_>; 5] = [
        &|file, runs, options| checked_write(file, runs, &*aligned, options),
        &|file, runs, options| checked_write(file, runs, &*sectors, options),
        &|file, runs, options| checked_write(file, runs, &*odd, options),
        &|file, runs, options| checked_write(file, runs, &Copied(&ram), options),
        &|file, runs, options| checked_write(file, runs, &Pieces(&ram), options),
    ];
    for_any_runs(rounds(8, 48), |runs| {
        let expected = oracle(&ram, &runs);
        let once: u64 = union(&runs).iter().map(|run| run.end - run.start).sum();
        let all: u64 = runs.iter().map(|run| run.end - run.start).sum();
        for (options, write) in
            every_option().flat_map(|way| ways.map(|write| (way.clone(), write)))
        {
            let file = place.file();
            grow(&file, LEN).expect("grown");
            let written = write(&file, &runs, &options);
            assert!(contents(&file) == expected, "{options:?}: {runs:?}");
            assert!((once..=all).contains(&written), "{once} {written} {all}");
        }
    });
}

/// Writes the runs from one kind of source.
type Write<'a> = dyn Fn(&File, &[Range<u64>], &WriteOptions) -> u64 + 'a;

/// Writes and checks the reported progress.
fn checked_write<S: RunSource + ?Sized>(
    file: &File,
    runs: &[Range<u64>],
    source: &S,
    options: &WriteOptions,
) -> u64 {
    let mut last = 0;
    let written = write_runs(file, runs.iter().cloned(), source, options, &mut |done| {
        assert!(done > last && done - last <= 1 << 20, "{last} {done}");
        last = done;
        ControlFlow::Continue(())
    })
    .expect("written");
    assert_eq!(written, last);
    written
}

#[rstest]
fn holes_are_the_ranges_that_were_not_written(
    #[values(Fs::TempDir, Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs,
) {
    let Some(place) = fs.mount("holes_are_the_ranges_that_were_not_written") else {
        return;
    };
    let here = Capabilities::probe(place.path()).expect("probed");
    if here.holes != HoleSupport::Sparse && fs == Fs::TempDir {
        eprintln!("the temporary directory is on a file system without holes: {here}");
        return;
    }
    let ram = ram(LEN as usize);
    for_any_runs(rounds(12, 48), |runs| {
        // Whole pages: the granularity of a hole on all of them.
        let runs: Vec<_> = runs
            .into_iter()
            .map(|run| run.start / PAGE * PAGE..run.end / PAGE * PAGE)
            .filter(|run| run.start < run.end)
            .collect();
        for options in every_option() {
            let file = place.file();
            grow(&file, LEN).expect("grown");
            write_runs(
                &file,
                runs.iter().cloned(),
                ram.as_slice(),
                &options,
                &mut go_on,
            )
            .expect("written");
            let listed: Vec<_> = extents(&file)
                .expect("listed")
                .map(|extent| extent.expect("listed"))
                .collect();
            assert_eq!(listed, with_holes(&union(&runs)), "{runs:?}");
        }
    });
}

/// Returns `data` and the holes around it, up to `LEN`.
fn with_holes(data: &[Range<u64>]) -> Vec<Extent> {
    let mut at = 0;
    let mut all = Vec::new();
    for data in data.iter().cloned().chain(std::iter::once(LEN..LEN)) {
        for (range, kind) in [
            (at..data.start, ExtentKind::Hole),
            (data.clone(), ExtentKind::Data),
        ] {
            if !range.is_empty() {
                all.push(Extent { range, kind });
            }
        }
        at = data.end;
    }
    all
}

#[rstest]
fn only_written_ranges_take_space(#[values(Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs) {
    let Some(place) = fs.mount("only_written_ranges_take_space") else {
        return;
    };
    let ram = ram(16 << 20);
    let runs = (0..8u64).map(|n| n * (2 << 20)..n * (2 << 20) + 4 * PAGE);
    for options in every_option() {
        let file = place.file();
        grow(&file, 16 << 20).expect("grown");
        write_runs(&file, runs.clone(), ram.as_slice(), &options, &mut go_on).expect("written");
        file.sync_all().expect("synced");
        let allocated = allocated_bytes(&file).expect("allocated");
        let written = 8 * 4 * PAGE;
        assert!((written..2 * written).contains(&allocated), "{allocated}");
    }
}

/// Firecracker's dump of several slots moved the file position over clean pages and never reached
/// the last ones.
#[rstest]
fn trailing_clean_pages_are_part_of_the_file(#[values(Fs::TempDir, Fs::Tmpfs, Fs::Exfat)] fs: Fs) {
    let Some(place) = fs.mount("trailing_clean_pages_are_part_of_the_file") else {
        return;
    };
    let ram = ram(LEN as usize);
    for options in every_option() {
        let file = place.file();
        grow(&file, LEN).expect("grown");
        let runs = [8 * PAGE..9 * PAGE, 0..PAGE];
        write_runs(&file, runs.clone(), ram.as_slice(), &options, &mut go_on).expect("written");
        assert_eq!(contents(&file).len() as u64, LEN);
        assert!(contents(&file) == oracle(&ram, &runs));
    }
}

#[test]
fn file_open_for_appending_is_refused_and_unchanged() {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().write_all_at(&[7; 100], 0).expect("written");
    let appending = File::options().append(true).open(file.path());
    let appending = appending.expect("open for appending");
    let ram = ram(1 << 20);
    for options in every_option() {
        let written = write_runs(&appending, [0..4096], ram.as_slice(), &options, &mut go_on);
        assert!(matches!(written, Err(WriteError::Append)), "{written:?}");
    }
    assert_eq!(contents(file.as_file()), [7; 100]);
}

#[test]
fn file_position_is_neither_used_nor_moved() {
    use std::io::{Seek, SeekFrom};
    let mut file = tempfile::tempfile().expect("file");
    file.seek(SeekFrom::Start(77)).expect("seek");
    let ram = ram(LEN as usize);
    for options in every_option() {
        write_runs(&file, [0..LEN], ram.as_slice(), &options, &mut go_on).expect("written");
        assert_eq!(file.stream_position().expect("position"), 77);
        assert!(contents(&file) == ram);
    }
}

/// A source that calls a closure for reads from `fails_at` on.
struct Failing<'a> {
    ram: &'a [u8],
    fails_at: u64,
    fail: fn() -> io::Error,
}

impl RunSource for Failing<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset >= self.fails_at {
            return Err((self.fail)());
        }
        self.ram.read_at(offset, buf)
    }
}

#[test]
fn failing_source_is_reported_with_its_offset() {
    let ram = ram(LEN as usize);
    let source = Failing {
        ram: &ram,
        fails_at: 64 << 10,
        fail: || io::Error::other("the process that owns the memory is gone"),
    };
    for engine in Engine::ALL.iter().copied() {
        let options = WriteOptions::new().engine(engine).chunk_size(16 << 10);
        let file = tempfile::tempfile().expect("file");
        let result = write_runs(&file, [0..LEN], &source, &options, &mut go_on);
        let Err(WriteError::Source { offset, source }) = result else {
            panic!("{result:?}");
        };
        assert_eq!(offset, 64 << 10);
        assert_eq!(
            source.to_string(),
            "the process that owns the memory is gone"
        );
        assert!(contents(&file) == ram[..64 << 10]);
    }
}

#[test]
fn panicking_source_leaves_nothing_in_flight() {
    let ram = ram(LEN as usize);
    let source = Failing {
        ram: &ram,
        fails_at: 64 << 10,
        fail: || panic!("the source panics"),
    };
    for engine in Engine::ALL.iter().copied() {
        let options = WriteOptions::new().engine(engine).chunk_size(16 << 10);
        let file = tempfile::tempfile().expect("file");
        let write = || write_runs(&file, [0..LEN], &source, &options, &mut go_on);
        catch_unwind(AssertUnwindSafe(write)).expect_err("panics");
        assert!(contents(&file) == ram[..64 << 10]);
        // The file is still usable.
        write_runs(&file, [0..LEN], ram.as_slice(), &options, &mut go_on).expect("written");
        assert!(contents(&file) == ram);
    }
}

#[test]
fn cancellation_counts_the_requests_in_flight() {
    let ram = Shifted::new(&ram(LEN as usize), 0);
    for engine in Engine::ALL.iter().copied() {
        let options = WriteOptions::new().engine(engine).chunk_size(16 << 10);
        let file = tempfile::tempfile().expect("file");
        let mut calls = 0;
        let result = write_runs(&file, [0..LEN], &*ram, &options, &mut |_| {
            calls += 1;
            if calls == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let Err(WriteError::Cancelled { written }) = result else {
            panic!("{engine:?}: {result:?}");
        };
        assert_eq!(calls, 3, "{engine:?}");
        if engine == Engine::Pwrite {
            assert_eq!(written, 48 << 10);
        }
        // No byte of the source is zero.
        let stored = contents(&file).iter().filter(|byte| **byte != 0).count();
        assert_eq!(stored as u64, written, "{engine:?}");
    }
}

#[test]
fn panicking_progress_function_leaves_nothing_in_flight() {
    let ram = Shifted::new(&ram(LEN as usize), 0);
    for engine in Engine::ALL.iter().copied() {
        let options = WriteOptions::new().engine(engine).chunk_size(16 << 10);
        let file = tempfile::tempfile().expect("file");
        grow(&file, LEN).expect("grown");
        let write = || {
            write_runs(&file, [0..LEN], &*ram, &options, &mut |_| {
                panic!("no progress")
            })
        };
        catch_unwind(AssertUnwindSafe(write)).expect_err("panics");
        let before = contents(&file);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(contents(&file) == before, "{engine:?}");
        // The file is still usable.
        write_runs(&file, [0..LEN], &*ram, &options, &mut go_on).expect("written");
        assert!(contents(&file) == *ram);
    }
}

#[test]
fn invalid_run_is_refused_after_the_runs_before_it() {
    let ram = ram(LEN as usize);
    for options in every_option() {
        let file = tempfile::tempfile().expect("file");
        let invalid = Range { start: 9, end: 8 };
        let runs = [0..PAGE, invalid.clone(), PAGE..2 * PAGE];
        let result = write_runs(&file, runs, ram.as_slice(), &options, &mut go_on);
        assert!(
            matches!(&result, Err(WriteError::InvalidRun { run }) if *run == invalid),
            "{result:?}"
        );
        assert!(contents(&file) == ram[..4096]);
    }
}

#[test]
fn run_past_the_end_of_the_source_is_a_source_error() {
    let ram = ram(10_000);
    for options in every_option() {
        let file = tempfile::tempfile().expect("file");
        let result = write_runs(&file, [0..10_001], ram.as_slice(), &options, &mut go_on);
        assert!(
            matches!(&result, Err(WriteError::Source { source, .. })
                if source.kind() == io::ErrorKind::UnexpectedEof),
            "{result:?}"
        );
    }
}

#[test]
fn threads_of_an_engine_handle_no_signals() {
    struct Observed;
    impl RunSource for Observed {
        fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            test_machine::assert_handles_no_signals("sparse-file");
            buf.fill(1);
            Ok(())
        }
    }
    let file = tempfile::tempfile().expect("file");
    let options = WriteOptions::new().engine(Engine::Threads);
    write_runs(&file, [0..PAGE], &Observed, &options, &mut go_on).expect("written");
}
