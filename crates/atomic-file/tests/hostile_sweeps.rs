//! Sweeps and records of several users: whose staged files are kept, and how much is read.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use atomic_file::{
    AtomicGroup, AtomicWriter, GroupCommitError, Preserve, preview_sweep, recover, sweep,
};
use rstest::rstest;
use support::commit;
use support::hostile::{
    MEMBERS, OTHER_USER, Place, SECRET, USER, as_other_user, as_user, die_at, forged,
    other_users_place, staged_files,
};
use test_machine::needs;

/// Runs the job of `support::command` as a user other than root; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    if job == "sweep" {
        return support::traced(&dir, || {
            let report = sweep(&dir).unwrap();
            format!(
                "{} removed, {} kept",
                report.removed.len(),
                report.skipped.len()
            )
        });
    }
    if let Some(name) = job.strip_prefix("preserve ") {
        return support::traced(&dir, || {
            let options = AtomicWriter::options().preserve(Preserve::all());
            support::replace(&options, &dir.join(name))
        });
    }
    if job == "group that preserves" {
        return support::traced(&dir, || {
            let mut group = AtomicGroup::new();
            for name in MEMBERS {
                let options = AtomicWriter::options().preserve(Preserve::all());
                let writer = options.open(dir.join(name)).unwrap();
                writer.write_all_at(b"new", 0).unwrap();
                group.add(writer).unwrap();
            }
            support::group_state_of(group.commit())
        });
    }
    panic!("no such job: {job}");
}

/// Root sweeps /tmp: another user's interrupted group must stay complete.
#[test]
fn a_sweep_by_root_keeps_files_of_another_users_group() {
    needs!(Root);
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    as_other_user(|| {
        let record = dir.join(".atomic-file-0123456789abcdef.group");
        fs::write(record, forged(&dir, "dest")).unwrap();
        fs::write(dir.join(".atomic-file-01234567-1.stage"), "an orphan").unwrap();
    });
    // It protects no file of this user.
    fs::write(dir.join(".atomic-file-01234567-2.stage"), "an orphan").unwrap();
    let report = sweep(&dir).unwrap();
    assert_eq!(
        (report.removed.len(), report.skipped.len()),
        (2, 1),
        "{report:?}"
    );
    assert!(
        report.skipped[0]
            .path
            .ends_with(".atomic-file-01234567-0123456789abcdef.stage")
    );
}

#[rstest]
#[case::that_name_nothing(b"", "200 removed, 0 kept")]
#[case::that_are_damaged(b"junk", "0 removed, 200 kept")]
fn a_sweep_limits_reads_of_other_users_records(#[case] begin: &[u8], #[case] expected: &str) {
    needs!(Root, Strace);
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    let trace = place.path("trace");
    as_other_user(|| {
        for number in 0..200 {
            let staged = format!(".atomic-file-01234567-{number:016x}.stage");
            fs::write(dir.join(staged), "").unwrap();
        }
    });
    // As large as the limit. One of them protects all files of the other user.
    as_other_user(|| {
        for number in 0..4 {
            let record = dir.join(format!(".atomic-file-{number:016x}.group"));
            fs::write(&record, begin).unwrap();
            File::options()
                .write(true)
                .open(&record)
                .unwrap()
                .set_len(4 << 20)
                .unwrap();
        }
    });
    let calls = "trace=openat,read,getdents64";
    let args = ["-o", trace.to_str().unwrap(), "-e", calls];
    let swept = || support::under_strace("sweep", &dir, &args).unwrap();
    assert_eq!(swept(), expected);
    let calls = fs::read_to_string(&trace).unwrap();
    let opened = |name: &str| calls.lines().filter(|call| call.contains(name)).count();
    for number in 0..4 {
        assert_eq!(opened(&format!("{number:016x}.group\"")), 1);
    }
    let listings = calls.lines().filter(|call| call.contains("getdents64("));
    assert!(
        listings.count() < 60,
        "there are fewer records than staged files"
    );
    assert!(bytes_read(&calls) < 17 << 20);
    // Further records are not read: they may name any file of the other user.
    as_other_user(|| {
        fs::write(dir.join(".atomic-file-01234567-1.stage"), "").unwrap();
        for number in 4..24 {
            let record = dir.join(format!(".atomic-file-{number:016x}.group"));
            File::create(record).unwrap().set_len(4 << 20).unwrap();
        }
    });
    fs::write(dir.join(".atomic-file-01234567-2.stage"), "ours").unwrap();
    assert!(swept().starts_with("1 removed, "), "ours");
    assert!(bytes_read(&fs::read_to_string(&trace).unwrap()) < 17 << 20);
}

/// Returns the sum of the results of all `read` calls in a trace.
fn bytes_read(calls: &str) -> u64 {
    let reads = calls.lines().filter(|call| call.contains(" read("));
    let returned = reads.filter_map(|call| call.rsplit_once("= ")?.1.parse::<u64>().ok());
    returned.sum()
}

/// Root's staged files belong to the preserved owner before they are renamed.
#[rstest]
fn an_owners_sweep_keeps_the_files_of_roots_group(#[values(0, 1)] renamed: usize) {
    needs!(Root, Strace);
    let place = other_users_place(&MEMBERS);
    let dir = place.path("dir");
    let nth = support::RENAMES_BEFORE_MEMBERS + 1 + renamed;
    die_at("group that preserves", &dir, "renameat", nth);
    let staged = staged_files(&place);
    as_other_user(|| {
        assert!(sweep(&dir).unwrap().removed.is_empty());
        for name in MEMBERS {
            AtomicWriter::open(dir.join(name))
                .unwrap()
                .discard()
                .unwrap();
        }
    });
    assert_eq!(staged_files(&place), staged);
    let report = recover(&dir).unwrap();
    let counts = (report.in_place.len(), report.completed.len());
    assert_eq!(counts, (renamed, MEMBERS.len() - renamed));
    assert_eq!(support::same_text(&dir, &MEMBERS), "new");
    let owner = |name| fs::metadata(dir.join(name)).unwrap().uid();
    assert_eq!(MEMBERS.map(owner), [OTHER_USER; 2]);
    assert_eq!(support::names(&dir), MEMBERS);
}

/// Another user may read and lock these files, but not remove them.
#[rstest]
#[case::in_a_sticky_directory(0o1777, 1)]
#[case::in_a_directory_of_the_owner(0o755, 1)]
#[case::in_a_directory_of_all(0o777, 0)]
fn a_preview_promises_no_removal_that_is_not_permitted(#[case] mode: u32, #[case] kept: usize) {
    needs!(Root);
    let place = Place::new(mode);
    let orphaned = place.path("dir/.atomic-file-00000000-0123456789abcdef.stage");
    fs::write(&orphaned, "").unwrap();
    support::hostile::open_to_all(&orphaned).unwrap();
    let report = |sweep: fn(std::path::PathBuf) -> _| {
        let report: Result<atomic_file::SweepReport, _> =
            as_other_user(|| sweep(place.path("dir")));
        let report = report.unwrap();
        let reasons = report.skipped.iter().map(|file| file.reason.kind());
        (report.removed, reasons.collect::<Vec<_>>())
    };
    let preview = report(preview_sweep);
    assert_eq!(preview.1, vec![io::ErrorKind::PermissionDenied; kept]);
    assert!(orphaned.exists());
    assert_eq!(preview, report(sweep));
    assert_eq!(orphaned.exists(), kept == 1);
}

/// A record protects only the files of its own user, unless no other user can have written it.
#[rstest]
#[case::where_others_may_write(0o1777, false)]
#[case::where_its_record_is_obeyed_by_all(0o755, true)]
fn a_group_that_could_not_protect_its_files_is_refused(#[case] mode: u32, #[case] taken: bool) {
    needs!(Root);
    let place = Place::new(mode);
    let dir = place.path("dir");
    if mode == 0o755 {
        std::os::unix::fs::chown(&dir, Some(USER), None).unwrap();
    }
    let group = as_user(USER, || support::group(&dir, &MEMBERS, "new").unwrap());
    // A user with the capability to change owners.
    for staged in staged_files(&place) {
        std::os::unix::fs::chown(staged, Some(OTHER_USER), None).unwrap();
    }
    let committed = as_user(USER, || group.commit());
    match committed {
        Ok(()) => assert!(taken),
        Err(GroupCommitError::NothingReplaced { source, .. }) => {
            assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
            assert!(!taken, "{source}");
        }
        Err(other) => panic!("another error: {other:?}"),
    }
}

/// At the first sync the file belongs to this user, at the second to the preserved owner.
#[rstest]
#[case::while_the_bytes_are_synced(1, (0, 0o600))]
#[case::when_it_has_its_attributes(2, (OTHER_USER, 0o644))]
fn the_next_writer_removes_a_file_given_to_another_user(
    #[case] sync: usize,
    #[case] expected: (u32, u32),
) {
    needs!(Root, Strace);
    let place = other_users_place(&["dest"]);
    let dir = place.path("dir");
    for _ in 0..3 {
        die_at("preserve dest", &dir, "fsync", sync);
        let left = staged_files(&place);
        assert_eq!(left.len(), 1, "the next writer removes it: {left:?}");
        let stat = fs::metadata(&left[0]).unwrap();
        assert_eq!((stat.uid(), stat.mode() & 0o7777), expected);
    }
    commit(&AtomicWriter::options(), &dir.join("dest"), SECRET).unwrap();
    assert_eq!(support::names(&dir), ["dest"]);
}
