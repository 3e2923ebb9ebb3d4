//! Helpers for injected faults.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::names;
use test_machine::{recycling_dir, rounds};

/// The size limit of recycled files; these tests write less.
pub(crate) const MAX: u64 = 1 << 20;

pub(crate) const FILES: [&str; 3] = ["memory", "vcpu", "devices"];

pub(crate) const CALLS: &str = "trace=?open,openat,?fstat,?newfstatat,?fstatat64,?statx,flock,\
    fchmod,fsync,fdatasync,?rename,renameat,renameat2,linkat,?unlink,unlinkat,write,pwrite64,read,getdents64,\
    ?fstatfs,?statfs,?lseek,close,fcntl,flistxattr,ftruncate,getrandom";

pub(crate) fn strace(job: &str, dir: &Path, log: &Path, tampering: &[String]) -> Option<String> {
    let log = log.to_str().expect("a plain path");
    let mut args = vec!["-e", CALLS, "-o", log];
    // Only traced calls stop. A signal must arrive at the stop before the call.
    if !tampering.iter().any(|what| what.contains("signal=")) {
        args.push("--seccomp-bpf");
    }
    args.extend(tampering.iter().flat_map(|what| ["-e", what]));
    super::under_strace(job, dir, &args)
}

/// The calls between the marks, each with its number among the calls of its name, as `strace`
/// counts them for `when=`: per thread, from its start.
pub(crate) fn recorded(log: &Path) -> Vec<(String, usize)> {
    let log = fs::read_to_string(log).expect("read the trace");
    let thread_of = |line: &str| line.split_once(' ').expect("a thread id").0.to_owned();
    let marked = log.lines().find(|line| line.contains("mark-begin"));
    let job = thread_of(marked.expect("a mark"));
    let (mut own, mut others) = (HashMap::new(), HashMap::new());
    let (mut inside, mut calls) = (false, Vec::new());
    for line in log.lines() {
        let Some((name, arguments)) = line[job.len()..].trim_start().split_once('(') else {
            continue;
        };
        let is_own = thread_of(line) == job;
        let counts = if is_own { &mut own } else { &mut others };
        let count = counts
            .entry(name)
            .and_modify(|count| *count += 1)
            .or_insert(1);
        inside &= !arguments.contains("mark-end");
        if inside && is_own {
            calls.push((name.to_owned(), *count));
        }
        inside |= arguments.contains("mark-begin");
    }
    for (name, number) in &calls {
        let others = others.get(name.as_str()).copied().unwrap_or(0);
        assert!(
            others < *number,
            "{name} {number} would hit another thread as well"
        );
    }
    assert!(calls.len() > 5, "unexpected trace: {log}");
    calls
}

/// A directory in which `job` runs.
pub(crate) fn scratch(job: &str) -> tempfile::TempDir {
    match job {
        "recycle" => recycling_dir(),
        _ => tempfile::tempdir().unwrap(),
    }
}

/// Every call of `job` in a directory that `prepare` sets up.
pub(crate) fn calls_of(job: &str, prepare: &impl Fn(&Path)) -> Vec<(String, usize)> {
    let scratch = scratch(job);
    let (dir, log) = (scratch.path().join("dir"), scratch.path().join("log"));
    fs::create_dir(&dir).unwrap();
    prepare(&dir);
    assert_eq!(
        strace(job, &dir, &log, &[]).as_deref(),
        Some("ok"),
        "untampered"
    );
    recorded(&log)
}

/// Runs `job` once for each of its calls, with the fault of `how` injected, and calls `check` on
/// the directory.
pub(crate) fn tamper(
    job: &str,
    prepare: impl Fn(&Path),
    how: impl Fn(&str, usize) -> Option<Vec<String>>,
    check: impl Fn(&Path, Option<&str>, &str),
) {
    let calls = calls_of(job, &prepare);
    tamper_with(calls, job, prepare, how, check);
}

/// Runs `job` once for each of `calls`.
pub(crate) fn tamper_with(
    calls: Vec<(String, usize)>,
    job: &str,
    prepare: impl Fn(&Path),
    how: impl Fn(&str, usize) -> Option<Vec<String>>,
    check: impl Fn(&Path, Option<&str>, &str),
) {
    let mut runs = 0;
    for (call, number) in calls {
        let Some(tampering) = how(&call, number) else {
            continue;
        };
        let scratch = scratch(job);
        let (dir, log) = (scratch.path().join("dir"), scratch.path().join("log"));
        fs::create_dir(&dir).unwrap();
        prepare(&dir);
        let report = strace(job, &dir, &log, &tampering);
        let context = format!("{job}: {tampering:?}: {report:?}");
        assert!(!context.contains("stays open"), "{context}");
        check(&dir, report.as_deref(), &context);
        runs += 1;
    }
    assert!(runs > 5, "only {runs} runs");
}

pub(crate) fn error(call: &str, number: usize, errno: &str) -> Option<Vec<String>> {
    // A failed close only leaks a descriptor in a process that ends.
    (call != "close").then(|| vec![format!("inject={call}:error={errno}:when={number}")])
}

/// Fails each call of `job` with one of `errnos`, in turn. Thorough tests use each of them.
pub(crate) fn fail_each(
    job: &str,
    prepare: impl Fn(&Path),
    errnos: &[&str],
    check: impl Fn(&Path, Option<&str>, &str),
) {
    let calls = calls_of(job, &prepare);
    for first in 0..rounds(1, errnos.len()) {
        let turn = Cell::new(first);
        let how = |call: &str, number| {
            turn.set(turn.get() + 1);
            error(call, number, errnos[turn.get() % errnos.len()])
        };
        tamper_with(calls.clone(), job, &prepare, how, &check);
    }
}

pub(crate) fn kill(call: &str, number: usize) -> Option<Vec<String>> {
    Some(vec![format!("inject={call}:signal=KILL:when={number}")])
}

/// The recycled file of `dest`.
pub(crate) const RECYCLED: &str = ".atomic-file-88662993.spare";

pub(crate) fn old_file_and_spare(dir: &Path) {
    one_old_file(dir);
    fs::write(dir.join(RECYCLED), "older").unwrap();
}

pub(crate) fn one_old_file(dir: &Path) {
    fs::write(dir.join("dest"), "old").unwrap();
    fs::create_dir(dir.join("staging")).unwrap();
}

pub(crate) fn no_file(dir: &Path) {
    fs::create_dir(dir.join("staging")).unwrap();
}

pub(crate) fn old_files(dir: &Path) {
    for name in FILES {
        fs::write(dir.join(name), "old").unwrap();
    }
}

pub(crate) fn text(dir: &Path) -> String {
    match fs::read_to_string(dir.join("dest")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "old".into(),
        text => text.unwrap(),
    }
}

pub(crate) fn assert_only_dest(dir: &Path, context: &str) {
    let mut found = names(dir);
    // A recycled file is not a leftover: the next writer reuses it.
    found.retain(|name| name != "dest" && name != "staging" && name != RECYCLED);
    assert!(found.is_empty(), "left behind {found:?}: {context}");
    assert!(
        names(&dir.join("staging")).is_empty(),
        "left behind in staging: {context}"
    );
}
