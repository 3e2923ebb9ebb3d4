//! Orphaned staged files and their removal.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use atomic_file::{AtomicWriter, AtomicWriterOptions, preview_sweep, sweep};
use rstest::rstest;
use support::{assert_names, commit, dir_with_old, names};
use test_machine::{needs, rounds};

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    match job.as_str() {
        "die" => {
            let writer = AtomicWriter::open(dir.join("dest")).expect("open");
            writer.write_all_at(b"half", 0).expect("write");
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).expect("kill");
        }
        "live" => {
            let writer = AtomicWriter::open(dir.join("dest")).expect("open");
            println!("\nREPORT {}", writer.staged_path().display());
            // Wait until the parent closes standard input.
            let _ = std::io::stdin().read_line(&mut String::new());
            writer.write_all_at(b"late", 0).expect("write");
            writer.commit().expect("commit");
        }
        "replace" => {
            let options = AtomicWriter::options();
            support::traced(&dir, || support::replace(&options, &dir.join("dest")));
        }
        other => panic!("no such job: {other}"),
    }
}

/// The staged file of a killed writer to `dir/dest`.
fn orphaned_file(dir: &Path) -> PathBuf {
    let before = names(dir);
    assert_eq!(support::report(support::command("die", dir)), None);
    let mut new = names(dir);
    new.retain(|name| !before.contains(name));
    assert_eq!(new.len(), 1, "{new:?}");
    dir.join(&new[0])
}

#[test]
fn open_removes_the_orphaned_file_of_its_destination() {
    let (dir, dest) = dir_with_old();
    let orphaned = orphaned_file(dir.path());
    assert_eq!(fs::read(&orphaned).unwrap(), b"half");
    let other = AtomicWriter::open(dir.path().join("other")).unwrap();
    assert!(orphaned.exists(), "files of another destination are kept");
    other.discard().unwrap();
    let writer = AtomicWriter::open(&dest).unwrap();
    assert!(!orphaned.exists());
    assert_ne!(writer.staged_path(), orphaned, "names are never reused");
    writer.commit().unwrap();
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn orphaned_files_do_not_accumulate() {
    let (dir, _) = dir_with_old();
    for _ in 0..3 {
        let _ = fs::remove_file(dir.path().join("unused"));
        assert_eq!(support::report(support::command("die", dir.path())), None);
        assert_eq!(names(dir.path()).len(), 2);
    }
}

#[test]
fn a_sweep_removes_only_orphaned_files() {
    let (dir, dest) = dir_with_old();
    let orphaned = orphaned_file(dir.path());
    fs::write(dir.path().join(".atomic-file-notes"), "mine").unwrap();
    let in_use = AtomicWriter::open(dir.path().join("other")).unwrap();
    let link = dir.path().join(".atomic-file-00000000-0.stage");
    std::os::unix::fs::symlink(&dest, &link).unwrap();

    for (preview, sweep) in [(true, preview_sweep as fn(_) -> _), (false, sweep)] {
        let report = sweep(dir.path()).unwrap();
        assert_eq!(report.removed, std::slice::from_ref(&orphaned));
        assert_eq!(report.in_use, [in_use.staged_path()]);
        assert_eq!(report.skipped.len(), 1);
        assert_eq!(report.skipped[0].path, link);
        assert_eq!(orphaned.exists(), preview);
    }
    in_use.commit().unwrap();
    let link = link.file_name().unwrap().to_str().unwrap();
    assert_names(dir.path(), &[".atomic-file-notes", "dest", "other", link]);
}

/// A `no_clobber` writer that was killed between `link` and `unlink` leaves two names.
#[test]
fn every_name_of_an_orphaned_file_is_removed() {
    let (dir, dest) = dir_with_old();
    let orphaned = orphaned_file(dir.path());
    let name = orphaned.to_str().unwrap();
    let (stem, _) = name.rsplit_once('-').unwrap();
    let more: Vec<_> = (0..3)
        .map(|id| PathBuf::from(format!("{stem}-{id}.stage")))
        .collect();
    for link in &more {
        fs::hard_link(&orphaned, link).unwrap();
    }
    let report = preview_sweep(dir.path()).unwrap();
    assert_eq!((report.removed.len(), report.in_use.len()), (4, 0));
    let report = sweep(dir.path()).unwrap();
    assert_eq!((report.removed.len(), report.in_use.len()), (4, 0));
    assert_names(dir.path(), &["dest"]);

    let in_use = AtomicWriter::open(&dest).unwrap();
    fs::hard_link(in_use.staged_path(), &more[0]).unwrap();
    let report = sweep(dir.path()).unwrap();
    assert_eq!((report.removed.len(), report.in_use.len()), (0, 2));
}

#[test]
fn a_sweep_keeps_files_in_use_by_other_processes() {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;
    let (dir, dest) = dir_with_old();
    let mut command = support::command("live", dir.path());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let staged = lines
        .by_ref()
        .find_map(|line| Some(PathBuf::from(line.unwrap().split_once("REPORT ")?.1)))
        .unwrap();
    let report = sweep(dir.path()).unwrap();
    assert_eq!(
        (report.removed.len(), report.in_use),
        (0, vec![staged.clone()])
    );
    commit(&AtomicWriter::options(), &dest, b"early").unwrap();
    assert!(
        staged.exists(),
        "another writer to the same destination keeps it"
    );
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read(&dest).unwrap(), b"late");
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn racing_sweepers_never_break_a_commit() {
    let (dir, _) = dir_with_old();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            let mut removed = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                removed += sweep(dir.path()).unwrap().removed.len();
            }
            removed
        });
        let writers: Vec<_> = (0..3)
            .map(|id| {
                let dest = dir.path().join(if id == 0 { "dest" } else { "other" });
                scope.spawn(move || {
                    for _ in 0..rounds(50, 1000) {
                        commit(&AtomicWriter::options(), &dest, b"whole").unwrap();
                    }
                })
            })
            .collect();
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a writer failed");
        // It may remove a staged file that is not locked yet. Its writer then creates another one.
        sweeper.join().unwrap();
    });
    assert_names(dir.path(), &["dest", "other"]);
}

#[test]
fn sweeping_a_missing_directory_is_an_error_that_names_it() {
    let error = sweep("/no/such/directory").unwrap_err();
    assert_eq!(error.path, Path::new("/no/such/directory"));
}

/// As on an NFS mount without a lock daemon.
#[test]
fn without_locks_orphaned_files_are_kept_and_reported() {
    needs!(Strace);
    let (dir, dest) = dir_with_old();
    let without_locks = |more: &[&str]| {
        let mut args = vec!["-o", "/dev/null", "-e", "inject=flock:error=ENOLCK"];
        args.extend(more);
        support::under_strace("replace", dir.path(), &args)
    };
    assert_eq!(without_locks(&[]).as_deref(), Some("ok"));
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest"]);

    assert_eq!(without_locks(&["-e", "inject=fsync:signal=KILL"]), None);
    assert_eq!(names(dir.path()).len(), 2);
    // A sweeper with locks cannot determine whether the writer is running.
    let report = sweep(dir.path()).unwrap();
    assert_eq!(
        (
            report.removed.len(),
            report.in_use.len(),
            report.skipped.len()
        ),
        (0, 0, 1)
    );
    let name = report.skipped[0]
        .path
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    assert!(name.ends_with(".unlocked-stage"), "{name}");
    commit(&AtomicWriter::options(), &dest, b"newer").unwrap();
    assert_eq!(without_locks(&[]).as_deref(), Some("ok"));
    assert!(dir.path().join(OsStr::new(name)).exists());
}

#[rstest]
#[case::elsewhere("dest", |dir: &Path| AtomicWriter::options().staging_dir(dir.join("staging")))]
#[case::no_clobber("new", |_: &Path| AtomicWriter::options().no_clobber(true))]
fn a_preflight_takes_no_name_from_another_writer(
    #[case] name: &str,
    #[case] options: fn(&Path) -> AtomicWriterOptions,
) {
    let (dir, _) = dir_with_old();
    fs::create_dir(dir.path().join("staging")).unwrap();
    let dest = dir.path().join(name);
    let in_use = [(); 3].map(|()| AtomicWriter::open(&dest).unwrap());
    for _ in 0..20 {
        drop(options(dir.path()).open(&dest).unwrap());
    }
    for writer in in_use {
        writer.write_all_at(b"whole", 0).unwrap();
        writer.commit().unwrap();
        assert_eq!(fs::read(&dest).unwrap(), b"whole");
    }
    fs::remove_dir(dir.path().join("staging")).unwrap();
    assert_eq!(names(dir.path()).len(), if name == "dest" { 1 } else { 2 });
}
