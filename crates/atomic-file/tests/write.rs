//! `write`, and what its errors state about the file, under injected faults.

mod support;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use atomic_file::{AtomicWriter, CommitError, OpenError};
use rstest::rstest;
use support::faults::{
    MAX, fail_each, no_file, old_file_and_spare, one_old_file, recorded, strace, text,
};
use support::{assert_names, dir_with_old};
use test_machine::needs;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    support::traced(&dir, || {
        let options = AtomicWriter::options();
        stated(match job.as_str() {
            "write" => atomic_file::write(&dest, "new"),
            "no clobber" => options.no_clobber(true).write(&dest, "new"),
            "recycle" => options.recycle(MAX).write(&dest, "new"),
            other => panic!("no such job: {other}"),
        })
    });
}

/// Returns what the result states about the file.
fn stated(result: io::Result<()>) -> String {
    let Err(error) = result else {
        return "ok".into();
    };
    let kind = error.kind();
    match error.downcast::<CommitError>() {
        Ok(error) if error.kind() != kind => format!("{error:?} is of kind {kind}"),
        Ok(error) => match error.replaced() {
            Some(true) => "replaced".into(),
            Some(false) => "not replaced".into(),
            None => "unknown".into(),
        },
        Err(_) => "not committed".into(),
    }
}

#[rstest]
#[case::write("write", one_old_file as fn(&Path))]
#[case::no_clobber("no clobber", no_file)]
#[case::recycle("recycle", old_file_and_spare)]
fn errors_agree_with_the_file_on_disk(#[case] job: &str, #[case] prepare: fn(&Path)) {
    needs!(Strace);
    let seen = RefCell::new(BTreeSet::new());
    fail_each(job, prepare, &["EIO", "ENOSPC"], |dir, report, context| {
        let report = report.unwrap_or_else(|| panic!("the job was killed: {context}"));
        let expected = match report {
            "ok" | "replaced" => "new",
            "not replaced" | "not committed" => "old",
            _ => panic!("{context}"),
        };
        seen.borrow_mut().insert(report.to_owned());
        assert_eq!(text(dir), expected, "{context}");
    });
    let seen = seen.into_inner();
    for state in ["ok", "replaced", "not replaced", "not committed"] {
        assert!(seen.contains(state), "no run ended {state}: {seen:?}");
    }
}

/// The rename fails, and so does each look at its outcome.
#[test]
fn an_unverifiable_rename_states_no_result() {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    let log = scratch.path().join("log");
    let run = |name: &str, faults: &[String]| {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).unwrap();
        one_old_file(&dir);
        let report = strace("write", &dir, &log, faults);
        assert_eq!(text(&dir), "old", "{faults:?}");
        report
    };
    let rename = "inject=renameat:error=EIO".to_owned();
    let report = run("verified", std::slice::from_ref(&rename));
    assert_eq!(report.as_deref(), Some("not replaced"));
    let calls = recorded(&log);
    let failed = calls.iter().position(|(call, _)| call == "renameat");
    let (look, number) = &calls[failed.expect("a rename") + 1];
    // Of the destination, and of the staged file.
    let look = format!("inject={look}:error=EIO:when={number}..{}", number + 1);
    assert_eq!(
        run("unverified", &[rename, look]).as_deref(),
        Some("unknown")
    );
}

#[test]
fn write_creates_a_private_file() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    atomic_file::write(&dest, "new").unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    let mode = fs::metadata(&dest).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn write_replaces_longer_contents_and_keeps_the_mode() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    fs::write(&dest, [1; 10_000]).unwrap();
    fs::set_permissions(&dest, fs::Permissions::from_mode(0o644)).unwrap();
    atomic_file::write(&dest, "new").unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    let mode = fs::metadata(&dest).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o644);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn write_with_options_uses_them() {
    let (dir, dest) = dir_with_old();
    let options = AtomicWriter::options().mode(0o640);
    options.write(&dest, "new").unwrap();
    let mode = fs::metadata(&dest).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    let error = options.no_clobber(true).write(&dest, "newer").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest"]);
}

/// Three writes of decreasing length: the third one reuses the file of the first.
#[test]
fn write_shortens_a_recycled_file() {
    let dir = test_machine::recycling_dir();
    let dest = dir.path().join("dest");
    let options = AtomicWriter::options().recycle(MAX);
    for len in [9000, 6000, 3000] {
        options.write(&dest, vec![len as u8; len]).unwrap();
        assert_eq!(fs::read(&dest).unwrap(), vec![len as u8; len]);
    }
}

#[test]
fn a_directory_is_refused_as_in_the_standard_library() {
    let dir = tempfile::tempdir().unwrap();
    let error = atomic_file::write(dir.path(), "new").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
    let error = error.downcast::<OpenError>().unwrap();
    assert!(
        matches!(error, OpenError::NotAFile { is_dir: true, .. }),
        "{error:?}"
    );
}

#[test]
fn a_missing_directory_is_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let error = atomic_file::write(dir.path().join("missing/dest"), "new").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}
