//! Injected faults during group commits and recoveries.

mod support;

use std::fs;
use std::path::Path;

use atomic_file::recover;
use support::faults::{FILES, error, fail_each, kill, old_files, strace, tamper};
use support::{Held, assert_names, group, names, same_text};
use test_machine::needs;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || match job.as_str() {
        "group" => match group(&dir, &FILES, "new") {
            Err(error) => format!("not opened: {error}"),
            Ok(group) => support::group_state_of(group.commit()),
        },
        "recover" => match recover(&dir) {
            Ok(_) => "ok".into(),
            Err(error) => format!("{error:?}"),
        },
        other => panic!("no such job: {other}"),
    });
}

#[test]
fn group_errors_state_the_result_for_any_failed_call() {
    needs!(Strace);
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    fail_each(
        "group",
        old_files,
        &["EIO", "ENOSPC"],
        |dir, report, context| {
            let report = report.unwrap_or_else(|| panic!("the job was killed: {context}"));
            let state = report.split(':').next().unwrap_or(report);
            seen.borrow_mut().insert(state.to_owned());
            match state {
                "ok" => assert_eq!(same_text(dir, &FILES), "new", "{context}"),
                "not replaced" | "not opened" => {
                    assert_eq!(same_text(dir, &FILES), "old", "{context}")
                }
                "will be completed" | "replaced, record left" => {
                    assert!(
                        state != "will be completed" || names(dir).len() > FILES.len(),
                        "{context}"
                    );
                    recover(dir).unwrap();
                    assert_eq!(same_text(dir, &FILES), "new", "{context}");
                }
                _ => panic!("{context}"),
            }
            assert_names(dir, &FILES);
        },
    );
    let seen = seen.into_inner();
    for state in ["not replaced", "will be completed", "replaced, record left"] {
        assert!(seen.contains(state), "no run ended {state}: {seen:?}");
    }
}

#[test]
fn a_group_killed_at_any_call_recovers_to_old_or_new() {
    needs!(Strace);
    let seen = std::cell::RefCell::new(Vec::new());
    tamper("group", old_files, kill, |dir, report, context| {
        assert_eq!(report, None, "the job was not killed: {context}");
        recover(dir).unwrap();
        seen.borrow_mut().push(same_text(dir, &FILES));
        assert_names(dir, &FILES);
    });
    let seen = seen.into_inner();
    let point = seen
        .iter()
        .position(|text| text == "new")
        .expect("some are new");
    assert!(point > 0 && seen[..point].iter().all(|text| text == "old"));
    assert!(
        seen[point..].iter().all(|text| text == "new"),
        "there is one commit point: {seen:?}"
    );
}

/// A group killed when it had renamed the first of three members.
fn half_done(dir: &Path) {
    old_files(dir);
    let log = tempfile::NamedTempFile::new().unwrap();
    let kill = kill("renameat", support::RENAMES_BEFORE_MEMBERS + 2).unwrap();
    assert_eq!(strace("group", dir, log.path(), &kill), None);
}

#[test]
fn a_killed_recovery_is_completed_by_the_next() {
    needs!(Strace);
    tamper("recover", half_done, kill, |dir, report, context| {
        assert_eq!(report, None, "the job was not killed: {context}");
        recover(dir).unwrap();
        assert_eq!(same_text(dir, &FILES), "new", "{context}");
        assert_names(dir, &FILES);
    });
}

#[test]
fn a_failed_recovery_is_completed_by_the_next() {
    needs!(Strace);
    let how = |call: &str, number| error(call, number, "EIO");
    tamper("recover", half_done, how, |dir, report, context| {
        if report == Some("ok") {
            assert_eq!(same_text(dir, &FILES), "new", "{context}");
        }
        recover(dir).unwrap();
        assert_eq!(same_text(dir, &FILES), "new", "{context}");
        assert_names(dir, &FILES);
    });
}

/// While the members are prepared, the file of the first destination gets the name of the second.
/// Its inode number is then seen by both names, as when another program's file reuses it.
#[test]
fn a_group_compares_its_destinations_at_one_time() {
    needs!(Strace);
    let stats = |log: &str| {
        let calls = log.lines().filter(|line| line.contains("fstatat"));
        let calls: Vec<_> = calls.map(str::to_owned).collect();
        let thread = |line: &str| line.split(' ').next().unwrap().to_owned();
        let of_second = |line: &String| line.contains("\"vcpu\"");
        let job = thread(calls.iter().find(|line| of_second(line)).unwrap());
        let own = calls.into_iter().filter(|line| thread(line) == job);
        own.collect::<Vec<_>>()
    };
    let scratch = tempfile::tempdir().unwrap();
    old_files(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let report = strace("group", scratch.path(), log.path(), &[]);
    assert_eq!(report.as_deref(), Some("ok"));
    let calls = stats(&fs::read_to_string(log.path()).unwrap());
    // The last one is that for the record, the one before it is that of the comparison.
    let of_second = |line: &&String| line.contains("\"vcpu\"");
    let looks = calls.iter().filter(of_second).count();
    let last = calls.iter().rposition(|line| of_second(&line)).unwrap();
    let before = calls[..last].iter().rposition(|line| of_second(&line));
    let number = before.unwrap() + 1;

    let scratch = tempfile::tempdir().unwrap();
    old_files(scratch.path());
    let mut held = Held::start("group", scratch.path(), "newfstatat", "delay_enter", number);
    held.wait_for_calls("\"vcpu\"", looks - 1);
    let [one, other] = ["memory", "vcpu"].map(|name| scratch.path().join(name));
    fs::rename(one, &other).unwrap();
    assert_eq!(held.release().as_deref(), Some("ok"));
    assert_eq!(same_text(scratch.path(), &FILES), "new");
    assert_names(scratch.path(), &FILES);
}
