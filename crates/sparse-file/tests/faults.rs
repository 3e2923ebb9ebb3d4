//! Full disks, limits, quotas and interrupted calls, caused by the kernel or injected into the
//! system call.
#![cfg(target_os = "linux")]

mod support;

use std::io::ErrorKind;
use std::path::Path;

use nix::sys::resource::{Resource, setrlimit};
use rstest::rstest;
use sparse_file::{
    Capabilities, Engine, ProbeError, SpaceError, WriteError, WriteOptions, check_len, grow,
    reserve, write_runs,
};
use support::{
    Copied, Shifted, child, child_task, contents, expect_success, go_on, ram, strace_child,
};
use test_machine::{Need, TinyTmpfs, needs};

const LEN: u64 = 1 << 20;
const CHUNK: usize = 64 << 10;

fn options() -> WriteOptions {
    WriteOptions::new().engine(Engine::Pwrite).chunk_size(CHUNK)
}

/// Returns the offset, length and error of a refused write.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, WriteError>) -> (u64, usize, std::io::Error) {
    match result {
        Err(WriteError::Destination {
            offset,
            len,
            source,
        }) => (offset, len, source),
        other => panic!("{other:?}"),
    }
}

#[test]
fn full_disk_is_enospc_at_the_first_byte_that_does_not_fit() {
    needs!(Root);
    // Not a multiple of the chunk: the last write that fits in part is short.
    let tmpfs = TinyTmpfs::new(300 << 10).expect("mounted");
    let file = tempfile::tempfile_in(tmpfs.path()).expect("file");
    let ram = ram(LEN as usize);
    for engine in Engine::ALL.iter().copied() {
        let options = options().engine(engine);
        let result = write_runs(&file, [0..LEN], ram.as_slice(), &options, &mut go_on);
        let (offset, len, source) = refused(result);
        assert_eq!(source.kind(), ErrorKind::StorageFull);
        // With requests in flight, a later chunk may have used the space of an earlier one.
        let room = if engine == Engine::Pwrite {
            256 << 10
        } else {
            0
        };
        assert!((room..=300 << 10).contains(&offset), "{engine:?}: {offset}");
        assert!(len > 0 && len <= CHUNK, "{len}");
        assert!(contents(&file)[..offset as usize] == ram[..offset as usize]);
        // Again from the start: written blocks can be overwritten, and the write ends at the same
        // offset.
    }
}

#[test]
fn write_past_rlimit_fsize_is_efbig_without_sigxfsz() {
    const LIMIT: u64 = 100_000;
    if child_task().is_none() {
        return expect_success(child(
            "write_past_rlimit_fsize_is_efbig_without_sigxfsz",
            "limited",
        ));
    }
    let file = tempfile::tempfile().expect("file");
    let ram = Shifted::new(&ram(LEN as usize), 0);
    setrlimit(Resource::RLIMIT_FSIZE, LIMIT, LIMIT).expect("limit");
    for (engine, offered) in Engine::ALL
        .iter()
        .copied()
        .flat_map(|one| [(one, true), (one, false)])
    {
        let options = options().engine(engine);
        let result = match offered {
            true => write_runs(&file, [0..LEN], &*ram, &options, &mut go_on),
            false => write_runs(&file, [0..LEN], &Copied(&ram), &options, &mut go_on),
        };
        let (offset, len, source) = refused(result);
        // In the middle of a chunk: the kernel had accepted its first part.
        assert_eq!((offset, len as u64), (LIMIT, 2 * CHUNK as u64 - LIMIT));
        assert_eq!(source.kind(), ErrorKind::FileTooLarge);
        assert!(contents(&file) == ram[..LIMIT as usize]);
    }
    // The range below the limit can still be written, including its last byte.
    write_runs(&file, [0..LIMIT], &*ram, &options(), &mut go_on).expect("written");
    grow(&file, LIMIT).expect("the limit itself");
    let error = grow(&file, LIMIT + 1).expect_err("too large");
    assert!(
        matches!(error, SpaceError::Io { source, .. } if source.kind() == ErrorKind::FileTooLarge)
    );
    check_len(&file, LIMIT).expect("the limit itself");
    let error = check_len(&file, LIMIT + 1).expect_err("too large");
    assert!(
        matches!(error, SpaceError::Io { source, .. } if source.kind() == ErrorKind::FileTooLarge)
    );
    let error = reserve(&file, LIMIT + 1).expect_err("too large");
    assert!(
        matches!(error, SpaceError::Io { source, .. } if source.kind() == ErrorKind::FileTooLarge)
    );
    let error = Capabilities::probe(&std::env::temp_dir()).expect_err("too large");
    assert!(
        matches!(error, ProbeError::Io { source, .. } if source.kind() == ErrorKind::FileTooLarge)
    );
}

/// Runs `test` as a child with `inject`ed failures of `pwrite64`, at least one of which must have
/// occurred.
fn with_injected(inject: &str, test: &str, task: &str) {
    let log = tempfile::NamedTempFile::new().expect("log");
    expect_success(strace_child(
        "pwrite64",
        inject,
        Some(log.path()),
        test,
        task,
    ));
    assert!(injected(log.path()) > 0, "strace injected nothing");
}

fn injected(log: &Path) -> usize {
    let log = std::fs::read_to_string(log).expect("log");
    log.lines().filter(|line| line.contains("INJECTED")).count()
}

#[rstest]
#[case::eintr("EINTR")]
#[case::eagain("EAGAIN")]
fn interrupted_and_delayed_writes_are_retried(#[case] errno: &str) {
    const TEST: &str = "interrupted_and_delayed_writes_are_retried";
    if child_task().is_some() {
        let file = tempfile::tempfile().expect("file");
        let ram = ram(LEN as usize);
        let written = write_runs(&file, [0..LEN], ram.as_slice(), &options(), &mut go_on);
        assert_eq!(written.expect("written"), LEN);
        return assert!(contents(&file) == ram);
    }
    if Need::Strace.met(TEST) {
        let case = match errno {
            "EINTR" => format!("{TEST}::case_1_eintr"),
            _ => format!("{TEST}::case_2_eagain"),
        };
        // The first call, and every second one after it.
        with_injected(&format!("error={errno}:when=1+2"), &case, "write");
    }
}

#[rstest]
#[case::case_enospc("ENOSPC", ErrorKind::StorageFull)]
#[case::case_edquot("EDQUOT", ErrorKind::QuotaExceeded)]
#[case::case_efbig("EFBIG", ErrorKind::FileTooLarge)]
#[case::case_eio("EIO", ErrorKind::Other)]
fn failed_write_is_reported_with_its_errno_and_offset(
    #[case] errno: &str,
    #[case] kind: ErrorKind,
) {
    const TEST: &str = "failed_write_is_reported_with_its_errno_and_offset";
    if child_task().is_some() {
        let file = tempfile::tempfile().expect("file");
        let ram = ram(LEN as usize);
        let result = write_runs(&file, [0..LEN], ram.as_slice(), &options(), &mut go_on);
        let (offset, len, source) = refused(result);
        assert_eq!((offset, len), (2 * CHUNK as u64, CHUNK));
        assert!(source.kind() == kind || source.raw_os_error() == Some(libc::EIO));
        return assert!(contents(&file) == ram[..2 * CHUNK]);
    }
    if Need::Strace.met(TEST) {
        let number = ["ENOSPC", "EDQUOT", "EFBIG", "EIO"]
            .iter()
            .position(|known| *known == errno)
            .expect("a case")
            + 1;
        let case = format!("{TEST}::case_{number}_case_{}", errno.to_lowercase());
        with_injected(&format!("error={errno}:when=3"), &case, "write");
    }
}

/// The file of the probe takes space where holes are not supported, so it must be removed from a
/// full disk.
#[test]
fn probe_of_a_full_disk_is_enospc_and_leaves_no_file() {
    needs!(Root);
    let tmpfs = TinyTmpfs::new(32 << 10).expect("mounted");
    let error = Capabilities::probe(tmpfs.path()).expect_err("no room");
    assert!(
        matches!(error, ProbeError::Io { source, .. } if source.kind() == ErrorKind::StorageFull)
    );
    assert_eq!(std::fs::read_dir(tmpfs.path()).expect("dir").count(), 0);
    // The space is free again once no child of a concurrent test has inherited the file.
    let start = std::time::Instant::now();
    while let Err(error) = std::fs::write(tmpfs.path().join("all"), [1; 32 << 10]) {
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert!(start.elapsed().as_secs() < 120, "no room");
    }
}
