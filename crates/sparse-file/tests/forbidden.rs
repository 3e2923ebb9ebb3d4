//! Engines that the kernel or a container forbids: a child process installs a seccomp filter.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::collections::HashSet;
use std::io;

use libc::{SYS_clone, SYS_clone3, SYS_io_uring_enter, SYS_io_uring_setup, SYS_pwrite64};
use rstest::rstest;
use sparse_file::{Capabilities, Engine, EngineReason, WriteError, WriteOptions, grow, write_runs};
use support::{Shifted, child, child_task, contents, expect_success, go_on, ram, strace_child};
use test_machine::Need;

const LEN: u64 = 8 << 20;

/// Makes the system calls fail with their error number for this thread and the threads that it
/// starts.
fn forbid(calls: &[(i64, i32)]) {
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    // The number of the call is the first field of seccomp_data.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for (call, errno) in calls {
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(statement(equal, *call as u32, 1));
        let refuse = libc::SECCOMP_RET_ERRNO | *errno as u32;
        program.push(statement(libc::BPF_RET | libc::BPF_K, refuse, 0));
    }
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
        0,
    ));
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a flag of this thread, without memory.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    // SAFETY: `filter` points to `program`, which lives until the call has copied it.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

fn write_by(engine: Engine) -> Result<(), WriteError> {
    let ram = Shifted::new(&ram(LEN as usize), 0);
    let file = tempfile::tempfile().expect("file");
    grow(&file, LEN).expect("grown");
    let options = WriteOptions::new().engine(engine);
    let written = write_runs(&file, [0..LEN], &*ram, &options, &mut go_on)?;
    assert_eq!(written, LEN);
    assert!(contents(&file) == *ram);
    Ok(())
}

#[rstest]
#[case::enosys(SYS_io_uring_setup, libc::ENOSYS)]
#[case::eperm(SYS_io_uring_setup, libc::EPERM)]
#[case::eacces(SYS_io_uring_setup, libc::EACCES)]
#[case::enomem(SYS_io_uring_setup, libc::ENOMEM)]
#[case::eperm_on_first_use(SYS_io_uring_enter, libc::EPERM)]
fn io_uring_forbidden_by_seccomp_falls_back(#[case] call: i64, #[case] errno: i32) {
    const TEST: &str = "io_uring_forbidden_by_seccomp_falls_back";
    if child_task().is_none() {
        let case = match (call == SYS_io_uring_enter, errno) {
            (true, _) => "case_5_eperm_on_first_use",
            (_, libc::ENOSYS) => "case_1_enosys",
            (_, libc::EPERM) => "case_2_eperm",
            (_, libc::EACCES) => "case_3_eacces",
            _ => "case_4_enomem",
        };
        return expect_success(child(&format!("{TEST}::{case}"), "forbidden"));
    }
    forbid(&[(call, errno)]);
    write_by(Engine::Auto).expect("by another engine");
    write_by(Engine::Threads).expect("without a ring");
    let error = write_by(Engine::IoUring).expect_err("forbidden");
    assert!(
        matches!(&error, WriteError::Engine { engine: Engine::IoUring, source }
            if source.raw_os_error() == Some(errno)),
        "{error:?}"
    );
    assert!(error.to_string().contains("Engine::Auto"), "{error}");
}

#[test]
fn calling_thread_writes_without_ring_and_threads() {
    if child_task().is_none() {
        return expect_success(child(
            "calling_thread_writes_without_ring_and_threads",
            "forbidden",
        ));
    }
    forbid(&[
        (SYS_io_uring_setup, libc::EPERM),
        (SYS_clone, libc::EAGAIN),
        (SYS_clone3, libc::EAGAIN),
    ]);
    write_by(Engine::Auto).expect("positioned");
    let error = write_by(Engine::Threads).expect_err("no threads");
    assert!(
        matches!(&error, WriteError::Engine { engine: Engine::Threads, source }
            if source.raw_os_error() == Some(libc::EAGAIN)),
        "{error:?}"
    );
}

#[test]
fn the_choice_names_the_error_of_each_engine_that_is_missing() {
    const TEST: &str = "the_choice_names_the_error_of_each_engine_that_is_missing";
    if child_task().is_none() {
        return expect_success(child(TEST, "forbidden"));
    }
    let dir = std::env::temp_dir();
    if Capabilities::probe(&dir)
        .expect("probed")
        .direct_io
        .is_none()
    {
        return;
    }
    let file = tempfile::tempfile_in(dir).expect("file");
    forbid(&[(SYS_io_uring_setup, libc::ENOSYS)]);
    let choice = WriteOptions::new().engine_choice(&file, LEN);
    assert_eq!(choice.engine, Engine::Threads);
    assert!(
        matches!(&choice.because, EngineReason::NoRing { source }
            if source.raw_os_error() == Some(libc::ENOSYS)),
        "{choice}"
    );
    assert!(choice.to_string().contains("Function not implemented"));
    forbid(&[(SYS_clone, libc::EAGAIN), (SYS_clone3, libc::EAGAIN)]);
    let choice = WriteOptions::new().engine_choice(&file, LEN);
    assert_eq!(choice.engine, Engine::Pwrite);
    assert!(
        matches!(&choice.because, EngineReason::NoRingAndNoThreads { ring, threads }
            if ring.raw_os_error() == Some(libc::ENOSYS)
                && threads.raw_os_error() == Some(libc::EAGAIN)),
        "{choice}"
    );
    assert!(choice.is_fallback());
}

/// Returns the lines of a trace of a child that writes with [`Engine::Auto`].
fn trace(test: &str, inject: &str) -> Vec<String> {
    let log = tempfile::NamedTempFile::new().expect("log");
    expect_success(strace_child(
        "io_uring_setup",
        inject,
        Some(log.path()),
        test,
        "write",
    ));
    let log = std::fs::read_to_string(log.path()).expect("log");
    log.lines().map(Into::into).collect()
}

/// Returns the threads that made the call.
fn callers<'l>(lines: &'l [String], call: &str) -> HashSet<&'l str> {
    lines
        .iter()
        .filter(|line| line.contains(&format!(" {call}(")))
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

#[test]
fn direct_io_uses_a_ring_or_else_threads() {
    const TEST: &str = "direct_io_uses_a_ring_or_else_threads";
    if child_task().is_some() {
        return write_by(Engine::Auto).expect("written");
    }
    let here = sparse_file::Capabilities::probe(&std::env::temp_dir()).expect("probed");
    if here.direct_io.is_none() {
        eprintln!("the directory for temporary files has no direct I/O: {here}");
        return;
    }
    if Need::Strace.met(TEST) {
        // No five hundredth call is made.
        let ring = trace(TEST, "error=EPERM:when=500");
        assert_eq!(callers(&ring, "io_uring_enter").len(), 1);
        assert!(callers(&ring, "pwrite64").is_empty());
        let threads = trace(TEST, "error=EPERM");
        assert!(callers(&threads, "io_uring_enter").is_empty());
        // One thread may be fast enough to write everything, but not the one that asked for a ring.
        let asking = callers(&threads, "io_uring_setup");
        let writing = callers(&threads, "pwrite64");
        assert!(!writing.is_subset(&asking), "{threads:?}");
    }
}

#[test]
fn aligned_memory_bypasses_the_page_cache() {
    if child_task().is_none() {
        return expect_success(child("aligned_memory_bypasses_the_page_cache", "forbidden"));
    }
    forbid(&[(SYS_pwrite64, libc::EIO)]);
    let error = write_by(Engine::Pwrite).expect_err("forbidden");
    assert!(matches!(error, WriteError::Destination { offset: 0, .. }));
    write_by(Engine::IoUring).expect("by the ring alone");
}
