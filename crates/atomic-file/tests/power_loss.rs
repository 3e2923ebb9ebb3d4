//! Recovery from every state that a power loss may leave, under the assumptions of the crate's
//! documentation.
//!
//! One real commit is traced. A power loss is then modeled after each of its calls, for every
//! subset of the names created, renamed and removed since the last sync of the directory. The
//! directory is built in that state, with every file that was not synced torn, and the real
//! `recover` runs on it.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use atomic_file::{AtomicWriter, recover};
use rstest::rstest;
use support::power_loss::{File, Step, apply, names_after, traced_steps};
use support::{assert_names, group, same_text};
use test_machine::{needs, recycling_dir};

fn files(job: &str) -> &'static [&'static str] {
    match job {
        "replace" => &["dest"],
        _ => &["memory", "vcpu", "devices"],
    }
}

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || match job.as_str() {
        "recycle" => {
            for text in TEXTS {
                let writer = AtomicWriter::options()
                    .recycle(1 << 20)
                    .open(dir.join("dest"));
                let writer = writer.expect("open");
                assert!(writer.recycled());
                support::write_whole(&writer, text.as_bytes()).expect("write");
                writer.commit().expect("commit");
            }
            "ok".into()
        }
        "replace" => support::replace(&AtomicWriter::options(), &dir.join("dest")),
        "recover" => recover(&dir).map_or_else(|error| format!("{error:?}"), |_| "ok".into()),
        _ => support::group_state_of(group(&dir, files(&job), "new").expect("open").commit()),
    });
}

/// A directory with the old files.
fn old_files(job: &str) -> tempfile::TempDir {
    old_files_in(tempfile::tempdir().unwrap(), job)
}

fn old_files_in(dir: tempfile::TempDir, job: &str) -> tempfile::TempDir {
    for name in files(job) {
        fs::write(dir.path().join(name), "old").unwrap();
    }
    dir
}

/// Returns every state of the directory that a power loss after `steps` may leave, with its
/// complete files.
fn states_after(steps: &[Step], files: &[&str]) -> Vec<(BTreeMap<String, File>, Vec<String>)> {
    let base: BTreeMap<_, _> = files
        .iter()
        .map(|name| ((*name).to_owned(), None))
        .collect();
    let (mut names, mut whole) = (base.clone(), Vec::new());
    for step in steps {
        match step {
            // A file is identified by the name of its creation.
            Step::SyncFile(name) => whole.extend(names[name].clone()),
            step => apply(&mut names, step),
        }
    }
    let names = names_after(steps, base).into_iter();
    names.map(|names| (names, whole.clone())).collect()
}

/// Builds the directory. The record is rewritten according to the documented format, because it
/// contains inode numbers.
fn build(
    dir: &Path,
    names: &BTreeMap<String, File>,
    whole: &[String],
    steps: &[Step],
    files: &[&str],
) {
    let aside = dir.join("aside");
    fs::create_dir(&aside).unwrap();
    let members: Vec<_> = steps
        .iter()
        .filter_map(|step| match step {
            Step::Rename(from, to) if files.contains(&to.as_str()) => Some((from, to)),
            _ => None,
        })
        .collect();
    let mut body = Vec::new();
    for (staged, dest) in &members {
        let path = aside.join(staged);
        fs::write(&path, if whole.contains(staged) { "new" } else { "n" }).unwrap();
        let old = aside.join(dest);
        fs::write(&old, "old").unwrap();
        body.extend(fs::metadata(&path).unwrap().ino().to_le_bytes());
        body.extend(3u64.to_le_bytes());
        body.push(1);
        let old = fs::metadata(&old).unwrap();
        let created = old.created().map_or(0, |created| {
            let since = created.duration_since(std::time::UNIX_EPOCH);
            since.unwrap().as_nanos() as u64
        });
        body.extend(old.ino().to_le_bytes());
        body.extend(created.to_le_bytes());
        for name in [staged, dest] {
            body.extend((name.len() as u16).to_le_bytes());
            body.extend(name.as_bytes());
        }
    }
    let mut record = b"ATOMGRP\n\x02\0\0\0".to_vec();
    record.extend((members.len() as u32).to_le_bytes());
    record.extend((body.len() as u64 + 28).to_le_bytes());
    record.extend(body);
    record.extend(crc32fast::hash(&record).to_le_bytes());
    for (name, file) in names {
        let path = dir.join(name);
        match file {
            // Without a group, no file is staged under another name.
            None if aside.join(name).exists() => fs::hard_link(aside.join(name), path).unwrap(),
            None => fs::write(path, "old").unwrap(),
            Some(staged) if aside.join(staged).exists() => {
                fs::hard_link(aside.join(staged), path).unwrap()
            }
            Some(staged) if whole.contains(staged) => fs::write(path, &record).unwrap(),
            Some(_) => fs::write(path, &record[..record.len() / 2]).unwrap(),
        }
    }
    fs::remove_dir_all(aside).unwrap();
}

#[rstest]
#[case("replace", 10)]
#[case("group", 60)]
fn a_power_loss_leaves_all_files_old_or_all_new(#[case] job: &str, #[case] least: usize) {
    needs!(Strace);
    let (steps, files) = (traced_steps(job, old_files(job).path()), files(job));
    let mut states = 0;
    for crash in 0..=steps.len() {
        for (names, whole) in states_after(&steps[..crash], files) {
            let dir = tempfile::tempdir().unwrap();
            build(dir.path(), &names, &whole, &steps, files);
            let context = format!("after {:?} found {names:?}", &steps[..crash]);
            let committed = crash == steps.len();
            // A record that is restored later would describe an older state of the directory.
            assert!(
                !committed || names.len() == files.len(),
                "commit had returned: {context}"
            );
            recover(dir.path()).unwrap_or_else(|error| panic!("{error:?} {context}"));
            let text = same_text(dir.path(), files);
            assert!(text == "old" || text == "new", "{text}: {context}");
            let committed = crash == steps.len();
            assert!(
                text == "new" || !committed,
                "commit had returned: {context}"
            );
            assert_names(dir.path(), files);
            states += 1;
        }
    }
    assert!(states >= least, "only {states} states");
}

#[test]
fn the_model_finds_a_commit_that_does_not_sync() {
    let rename = || Step::Rename("stage".into(), "dest".into());
    let create = || Step::Create("stage".into());
    let torn = |steps: &[Step]| {
        states_after(steps, &["dest"]).iter().any(|(names, whole)| {
            names["dest"]
                .as_ref()
                .is_some_and(|staged| !whole.contains(staged))
        })
    };
    let old = |steps: &[Step]| {
        states_after(steps, &["dest"])
            .iter()
            .any(|(names, _)| names["dest"].is_none())
    };
    let sync = || Step::SyncFile("stage".into());
    assert!(
        torn(&[create(), rename(), Step::SyncDir]),
        "without the file's sync"
    );
    assert!(
        old(&[create(), sync(), rename()]),
        "without the directory's"
    );
    let good = [create(), sync(), rename(), Step::SyncDir];
    assert!(!torn(&good) && !old(&good));
}

#[test]
fn recovery_syncs_before_and_after_removing_the_record() {
    needs!(Strace);
    let dir = old_files("group");
    let kill = [
        "-o",
        "/dev/null",
        "-e",
        "inject=renameat:signal=KILL:when=4",
    ];
    assert_eq!(support::under_strace("group", dir.path(), &kill), None);
    let steps = traced_steps("recover", dir.path());
    let [Step::Rename(_, first), Step::Rename(_, second), rest @ ..] = steps.as_slice() else {
        panic!("{steps:?}");
    };
    assert_eq!((first.as_str(), second.as_str()), ("vcpu", "devices"));
    let [Step::SyncDir, Step::Remove(record), Step::SyncDir] = rest else {
        panic!("{rest:?}");
    };
    assert!(record.ends_with(".group"), "{record}");
}

/// The contents that two consecutive commits write, each to the file that the previous one
/// replaced.
const TEXTS: [&str; 2] = ["newer", "newest"];

const RECYCLED: &str = ".atomic-file-88662993.spare";

/// The directory before the first commit: the old file and an older recycled one.
fn with_recycled_file() -> BTreeMap<String, File> {
    let recycled_file = (RECYCLED.to_owned(), Some(RECYCLED.to_owned()));
    BTreeMap::from([("dest".to_owned(), None), recycled_file])
}

/// Returns the contents of the files after a power loss that follows `steps`: `None` for writes
/// that were not synced.
fn contents_after(steps: &[Step]) -> BTreeMap<File, Option<String>> {
    let mut names = with_recycled_file();
    let old = |text: &str| Some(text.to_owned());
    let mut contents =
        BTreeMap::from([(None, old("old")), (names[RECYCLED].clone(), old("older"))]);
    let mut written = BTreeMap::new();
    for step in steps {
        match step {
            Step::Write(name, text) => {
                contents.insert(names[name].clone(), None);
                written.insert(names[name].clone(), text.clone());
            }
            Step::SyncFile(name) => {
                let file = names[name].clone();
                contents.insert(file.clone(), written.get(&file).cloned());
            }
            step => apply(&mut names, step),
        }
    }
    // If this writer was killed, another one may be overwriting the file by then.
    if let Some(recycled_file) = names.get(RECYCLED) {
        contents.insert(recycled_file.clone(), None);
    }
    contents
}

#[test]
fn a_power_loss_during_recycling_leaves_a_complete_file() {
    needs!(Strace);
    let dir = old_files_in(recycling_dir(), "replace");
    fs::write(dir.path().join(RECYCLED), "older").unwrap();
    let steps = traced_steps("recycle", dir.path());
    let count = |wanted: fn(&Step) -> bool| steps.iter().filter(|step| wanted(step)).count();
    assert_eq!(
        count(|step| matches!(step, Step::Exchange(..))),
        2,
        "{steps:?}"
    );
    assert_eq!(
        count(|step| matches!(step, Step::Create(_))),
        0,
        "{steps:?}"
    );
    let mut states = 0;
    for crash in 0..=steps.len() {
        let before = &steps[..crash];
        let contents = contents_after(before);
        let syncs = before.iter().filter(|step| **step == Step::SyncDir).count();
        let texts = ["old", TEXTS[0], TEXTS[1]];
        for names in names_after(before, with_recycled_file()) {
            let context = format!("after {before:?} found {names:?} with {contents:?}");
            let dir = tempfile::tempdir().unwrap();
            for (name, file) in &names {
                let text = contents[file].as_deref().unwrap_or("torn");
                fs::write(dir.path().join(name), text).unwrap();
            }
            recover(dir.path()).unwrap();
            let text = same_text(dir.path(), &["dest"]);
            assert!(
                texts[syncs..]
                    .iter()
                    .take(2)
                    .any(|allowed| text == *allowed),
                "{text}: {context}"
            );
            assert_names(dir.path(), &["dest"]);
            states += 1;
        }
    }
    assert!(states >= 30, "only {states} states");
}

#[test]
fn the_model_finds_reuse_before_the_directory_sync() {
    let (recycled_file, staged, dest) = (
        || RECYCLED.to_owned(),
        || "stage".to_owned(),
        || "dest".to_owned(),
    );
    let commit = |text: &str| {
        [
            Step::Rename(recycled_file(), staged()),
            Step::Write(staged(), text.to_owned()),
            Step::SyncFile(staged()),
            Step::Exchange(staged(), dest()),
            Step::SyncDir,
            Step::Rename(staged(), recycled_file()),
        ]
    };
    let torn = |steps: &[Step]| {
        let contents = contents_after(steps);
        let mut found = names_after(steps, with_recycled_file()).into_iter();
        found.any(|names| contents[&names["dest"]].is_none())
    };
    let found = |steps: &[Step]| (0..=steps.len()).any(|crash| torn(&steps[..crash]));
    let good = [commit(TEXTS[0]), commit(TEXTS[1])].concat();
    assert!(!found(&good));
    let mut without = good.clone();
    without.remove(4);
    assert!(found(&without), "without the directory's sync");
    let mut early = good;
    early.swap(4, 5);
    assert!(found(&early), "reuse before the sync");
}
