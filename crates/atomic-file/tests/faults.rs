//! Injected faults: `strace` makes every system call of a commit fail, or the last one before a
//! kill.
//!
//! A run is recorded first. It is then repeated once for each of its calls, with a fault injected
//! into that call.

mod support;

use std::fs;
use std::path::Path;

use atomic_file::{AtomicWriter, sweep};
use rstest::rstest;
use support::faults::{
    FILES, MAX, RECYCLED, assert_only_dest, calls_of, error, fail_each, no_file,
    old_file_and_spare, old_files, one_old_file, recorded, strace, tamper, text,
};
use support::{Held, assert_names, group, names, same_text};
use test_machine::{needs, recycling_dir};

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    let elsewhere = || AtomicWriter::options().staging_dir(dir.join("staging"));
    support::traced(&dir, || match job.as_str() {
        "replace" => support::replace(&AtomicWriter::options().mode(0o640), &dest),
        "no clobber" => support::replace(&AtomicWriter::options().no_clobber(true), &dest),
        "elsewhere" => support::replace(&elsewhere(), &dest),
        "recycles" => match AtomicWriter::options().recycle(MAX).open(&dest) {
            Ok(writer) => writer.recycled().to_string(),
            Err(error) => format!("{error:?}"),
        },
        "recycle" => support::replace(&AtomicWriter::options().recycle(MAX), &dest),
        "group" => match group(&dir, &FILES, "new") {
            Err(error) => format!("not opened: {error}"),
            Ok(group) => support::group_state_of(group.commit()),
        },
        "discard" => match AtomicWriter::open(&dest).expect("open").discard() {
            Ok(()) => "ok".into(),
            Err(leftover) => format!("left {:?}", [leftover.path]),
        },
        "discard group" => match group(&dir, &FILES, "new").expect("a group").discard() {
            Ok(()) => "ok".into(),
            Err(left) => format!(
                "left {:?}",
                Vec::from_iter(left.iter().map(|left| &left.path))
            ),
        },
        other => panic!("no such job: {other}"),
    });
}

#[rstest]
#[case::replace("replace", one_old_file as fn(&Path))]
#[case::no_clobber("no clobber", no_file)]
#[case::elsewhere("elsewhere", one_old_file)]
#[case::recycle("recycle", old_file_and_spare)]
fn errors_state_the_result_and_no_file_is_left(#[case] job: &str, #[case] prepare: fn(&Path)) {
    needs!(Strace);
    fail_each(
        job,
        prepare,
        &["EIO", "ENOSPC", "ESTALE", "EDQUOT"],
        |dir, report, context| {
            let expected = match report.unwrap_or_else(|| panic!("the job was killed: {context}")) {
                "ok" | "replaced" => "new",
                "not replaced" | "not written" => "old",
                report if report.starts_with("not opened: Leftover") => {
                    assert_eq!(sweep(dir).unwrap().removed.len(), 1, "{context}");
                    "old"
                }
                report if report.starts_with("not opened") => "old",
                _ => panic!("{context}"),
            };
            assert_eq!(text(dir), expected, "{context}");
            assert_only_dest(dir, context);
        },
    );
}

/// The removal fails as well: the error must name the file.
#[test]
fn errors_name_files_that_could_not_be_removed() {
    needs!(Strace);
    let how = |call: &str, number| {
        let mut both = error(call, number, "EIO")?;
        both.push("inject=unlinkat:error=EIO".into());
        matches!(call, "fsync" | "renameat").then_some(both)
    };
    let mut seen = Vec::new();
    for (call, number) in calls_of("replace", &one_old_file) {
        let Some(tampering) = how(&call, number) else {
            continue;
        };
        let scratch = tempfile::tempdir().unwrap();
        one_old_file(scratch.path());
        let log = tempfile::NamedTempFile::new().unwrap();
        let report = strace("replace", scratch.path(), log.path(), &tampering).unwrap();
        let left = names(scratch.path()).len() - 2;
        assert_eq!(
            left == 1,
            report.ends_with(", left"),
            "{tampering:?}: {report}"
        );
        seen.push(report);
    }
    // The file's syncs, of its bytes and of its mode; the rename; the directory's sync.
    let not = "not replaced, left";
    assert_eq!(seen, [not, not, not, "replaced"]);
}

/// Every call whose result decides whether the recycled file may be used.
#[rstest]
#[case::no_attributes_here("flistxattr:error=EOPNOTSUPP", true)]
#[case::too_many_attributes("flistxattr:error=ERANGE", false)]
#[case::attributes_unknown("flistxattr:error=EIO", false)]
#[case::no_locks("flock:error=ENOLCK", false)]
fn a_recycled_file_is_used_only_if_it_equals_a_new_one(
    #[case] fault: &str,
    #[case] recycles: bool,
) {
    needs!(Strace);
    let scratch = recycling_dir();
    let (dir, log) = (scratch.path().join("dir"), scratch.path().join("log"));
    fs::create_dir(&dir).unwrap();
    old_file_and_spare(&dir);
    let report = strace("recycles", &dir, &log, &[format!("inject={fault}")]);
    assert_eq!(report, Some(recycles.to_string()));
}

/// A staged file without a random name could be occupied by another user.
#[rstest]
#[case::not_ready("EAGAIN")]
#[case::failed("EIO")]
fn without_random_numbers_open_fails(#[case] errno: &str) {
    needs!(Strace);
    let calls = calls_of("replace", &one_old_file);
    let Some((_, number)) = calls.iter().rfind(|(call, _)| call == "getrandom") else {
        return test_machine::not_run(
            "without_random_numbers_open_fails",
            "random numbers come without a system call",
        );
    };
    let scratch = tempfile::tempdir().unwrap();
    one_old_file(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let fault = format!("inject=getrandom:error={errno}:when={number}+");
    let report = strace("replace", scratch.path(), log.path(), &[fault]).unwrap();
    assert!(
        report.starts_with("not opened") && report.contains("no random number"),
        "{report}"
    );
    assert_eq!(text(scratch.path()), "old");
    assert_only_dest(scratch.path(), "no random number");
}

#[test]
fn a_group_without_locks_is_refused() {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    old_files(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let fault = "inject=flock:error=ENOLCK".into();
    let report = strace("group", scratch.path(), log.path(), &[fault]).unwrap();
    let reason = atomic_file::Ineligible::NoLocks.to_string();
    assert!(
        report.starts_with("not opened") && report.contains(&reason),
        "{report}"
    );
    assert_eq!(same_text(scratch.path(), &FILES), "old");
}

#[rstest]
#[case("discard", 1)]
#[case("discard group", FILES.len())]
fn discard_names_files_that_it_cannot_remove(#[case] job: &str, #[case] count: usize) {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    let (dir, log) = (scratch.path().join("dir"), scratch.path().join("log"));
    fs::create_dir(&dir).unwrap();
    assert_eq!(strace(job, &dir, &log, &[]).as_deref(), Some("ok"));
    assert_names(&dir, &[]);
    let fault = "inject=unlinkat:error=EIO".into();
    let report = strace(job, &dir, &log, &[fault]).unwrap();
    let left = names(&dir);
    assert_eq!(left.len(), count, "{report}");
    for name in left {
        let path = format!("{:?}", dir.join(name));
        assert!(report.contains(&path), "{path} is not in: {report}");
    }
}

#[rstest]
#[case::replace("replace", one_old_file as fn(&Path))]
#[case::no_clobber("no clobber", no_file)]
#[case::group("group", old_files)]
#[case::recycle("recycle", old_file_and_spare)]
fn interrupted_calls_are_repeated(#[case] job: &str, #[case] prepare: fn(&Path)) {
    needs!(Strace);
    // Calls that POSIX lets a signal interrupt; stat and lseek are not among them.
    let may_be = |call: &str| !(call.contains("stat") || matches!(call, "lseek" | "getdents64"));
    let how = |call: &str, number| error(call, number, "EINTR").filter(|_| may_be(call));
    tamper(job, prepare, how, |dir, report, context| {
        assert_eq!(report, Some("ok"), "{context}");
        assert_eq!(dir.join(RECYCLED).exists(), job == "recycle", "{context}");
    });
}

#[rstest]
#[case::no_such_flag("EINVAL")]
#[case::no_such_call("ENOSYS")]
#[case::not_supported("EOPNOTSUPP")]
fn no_clobber_falls_back_to_links(#[case] errno: &str) {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    no_file(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let renames = format!("inject=renameat2:error={errno}");
    let report = strace("no clobber", scratch.path(), log.path(), &[renames]);
    assert_eq!(report.as_deref(), Some("ok"));
    let trace = fs::read_to_string(log.path()).unwrap();
    assert!(trace.contains("linkat("), "{trace}");
    assert_eq!(text(scratch.path()), "new");
    assert_only_dest(scratch.path(), "links");
}

/// A link keeps the old name, so that name does not show whether the link was made.
#[test]
fn an_unverifiable_link_is_reported_as_unknown() {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    let log = scratch.path().join("log");
    let run = |name: &str, tampering: &[String]| {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).unwrap();
        no_file(&dir);
        strace("no clobber", &dir, &log, tampering)
    };
    // The first link is that of the preflight.
    let mut tampering: Vec<String> = vec![
        "inject=renameat2:error=EINVAL".into(),
        "inject=linkat:error=EIO:when=2".into(),
    ];
    assert_eq!(run("looked", &tampering).as_deref(), Some("not replaced"));
    let calls = recorded(&log);
    let failed = calls.iter().position(|call| *call == ("linkat".into(), 2));
    let (look, number) = &calls[failed.expect("a second link") + 1];
    tampering.push(format!("inject={look}:error=EIO:when={number}"));
    assert_eq!(run("not looked", &tampering).as_deref(), Some("unknown"));
}

#[rstest]
#[case("EPERM")]
#[case("EOPNOTSUPP")]
fn open_refuses_no_clobber_without_support(#[case] errno: &str) {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    no_file(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let links = format!("inject=linkat:error={errno}");
    let tampering = ["inject=renameat2:error=EINVAL".into(), links];
    let report = strace("no clobber", scratch.path(), log.path(), &tampering).unwrap();
    assert!(report.contains("NoClobberUnsupported"), "{report}");
    assert!(
        names(scratch.path()).len() == 1,
        "only the empty staging directory"
    );
}

#[test]
fn a_failed_sync_is_never_repeated() {
    needs!(Strace);
    let scratch = tempfile::tempdir().unwrap();
    one_old_file(scratch.path());
    let log = tempfile::NamedTempFile::new().unwrap();
    let report = strace(
        "replace",
        scratch.path(),
        log.path(),
        &["inject=fsync:error=EIO".into()],
    );
    assert_eq!(report.as_deref(), Some("not replaced"));
    let trace = fs::read_to_string(log.path()).unwrap();
    assert_eq!(trace.matches("fsync(").count(), 1, "{trace}");
}

/// Another program replaces the destination between the last check and the exchange.
#[rstest]
#[case::another_file(|dest: &Path| fs::write(dest, "theirs").unwrap(), "ok")]
#[case::a_link(|dest: &Path| std::os::unix::fs::symlink("elsewhere", dest).unwrap(), "ok")]
#[case::nothing(|_: &Path| (), "ok")]
#[case::a_directory(|dest: &Path| fs::create_dir(dest).unwrap(), "not replaced")]
#[case::a_file_locked_by_its_writer(lock_briefly, "ok")]
fn an_exchange_replaces_the_entries_that_a_rename_would(
    #[case] replace: fn(&Path),
    #[case] expected: &str,
) {
    needs!(Strace);
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").unwrap();
    let mut held = Held::start("recycle", dir.path(), "renameat2", "delay_enter", 1);
    held.wait_for_a_call();
    assert!(held.log().contains("RENAME_EXCHANGE"), "{}", held.log());
    fs::remove_file(&dest).unwrap();
    replace(&dest);
    assert_eq!(held.release().as_deref(), Some(expected));
    assert_names(dir.path(), &["dest"]);
    assert_eq!(dest.is_dir(), expected != "ok");
    assert!(dest.is_dir() || fs::read(&dest).unwrap() == b"new");
}

/// Holds the lock until shortly after the file was replaced.
fn lock_briefly(dest: &Path) {
    fs::write(dest, "theirs").unwrap();
    let file = fs::File::open(dest).unwrap();
    file.lock().unwrap();
    let dest = dest.to_owned();
    std::thread::spawn(move || {
        while fs::read(&dest).is_ok_and(|text| text != b"new") {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        file.unlock().unwrap();
    });
}

/// The default signal of a broken lease would kill the holder.
#[test]
fn opening_the_recycled_file_during_the_lease_is_harmless() {
    needs!(Strace);
    let calls = calls_of("recycle", &old_file_and_spare);
    let mut fcntls = calls.iter().filter(|(call, _)| call == "fcntl");
    // F_GETFL and F_SETFD of each of two listings, F_SETFL, F_SETSIG, F_SETLEASE.
    let lease = fcntls.nth(6).expect("a lease").1;
    let dir = recycling_dir();
    old_file_and_spare(dir.path());
    let recycled_file = dir.path().join(RECYCLED);
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&recycled_file).unwrap());
    let leases = || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        let of_spare = |line: &&str| line.contains("LEASE") && line.contains(&format!(":{inode} "));
        Vec::from_iter(locks.lines().filter(of_spare).map(str::to_owned))
    };
    let is_breaking = || leases().iter().any(|line| line.contains("BREAKING"));
    let mut held = Held::start("recycle", dir.path(), "fcntl", "delay_exit", lease);
    held.wait_until(|| !leases().is_empty());
    let (report, opened) = std::thread::scope(|scope| {
        // Waits until the lease is released.
        let opener = scope.spawn(|| fs::File::open(&recycled_file));
        held.wait_until(is_breaking);
        (held.release(), opener.join().unwrap())
    });
    assert!(opened.is_ok(), "it was there, and leased: {opened:?}");
    assert_eq!(report.as_deref(), Some("ok"));
    assert_eq!(text(dir.path()), "new");
}
