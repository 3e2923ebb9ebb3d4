//! Every state that a power loss may leave, as the crate's documentation assumes of the medium, and what recovery makes of it.
//!
//! One real commit is traced. Then, for a power loss after each of its calls and for every subset of the names created, renamed
//! and removed since the directory was last synced, the directory is built as it may be found, with every file that was not
//! synced torn; and the real `recover` is let loose on it.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use atomic_file::{AtomicWriter, recover};
use rstest::rstest;
use support::{assert_names, group, same_text};
use test_machine::{Need, recycling_dir};

fn files(job: &str) -> &'static [&'static str] {
    match job {
        "replace" => &["dest"],
        _ => &["memory", "vcpu", "devices"],
    }
}

/// Not a test of its own: what `support::command` runs.
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

/// What a call did to the directory.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Create(String),
    SyncFile(String),
    Write(String, String),
    Rename(String, String),
    Exchange(String, String),
    Remove(String),
    SyncDir,
}

/// `dir` with the old files in it.
fn old_files(job: &str) -> tempfile::TempDir {
    old_files_in(tempfile::tempdir().unwrap(), job)
}

fn old_files_in(dir: tempfile::TempDir, job: &str) -> tempfile::TempDir {
    for name in files(job) {
        fs::write(dir.path().join(name), "old").unwrap();
    }
    dir
}

fn traced_steps(job: &str, dir: &Path) -> Vec<Step> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls = "trace=openat,pwrite64,fsync,fdatasync,renameat,renameat2,linkat,unlinkat";
    let args = ["-y", "-e", calls, "-o", log.path().to_str().unwrap()];
    assert_eq!(
        support::under_strace(job, dir, &args).as_deref(),
        Some("ok")
    );
    let log = fs::read_to_string(log.path()).unwrap();
    let inside = log
        .split_once("mark-begin")
        .unwrap()
        .1
        .split_once("mark-end")
        .unwrap()
        .0;
    inside
        .lines()
        .filter(|line| {
            line.contains(" = 0") || line.contains("O_CREAT") || line.contains("pwrite64")
        })
        .map(|line| step(line, dir))
        .collect()
}

fn step(line: &str, dir: &Path) -> Step {
    let names: Vec<_> = line
        .split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    let call = line.split_once(' ').unwrap().1.trim_start();
    let name_of_open = || {
        let path = call.split_once('<').unwrap().1.split_once('>').unwrap().0;
        let name = Path::new(path).strip_prefix(dir).unwrap();
        name.to_str().unwrap().to_owned()
    };
    match call.split_once('(').unwrap().0 {
        "openat" => Step::Create(names[0].clone()),
        "pwrite64" => Step::Write(name_of_open(), names[0].clone()),
        "renameat2" if call.contains("RENAME_EXCHANGE") => {
            Step::Exchange(names[0].clone(), names[1].clone())
        }
        "renameat" | "renameat2" => Step::Rename(names[0].clone(), names[1].clone()),
        "unlinkat" => Step::Remove(names[0].clone()),
        "fsync" => match name_of_open() {
            dir if dir.is_empty() => Step::SyncDir,
            name => Step::SyncFile(name),
        },
        other => panic!("the model does not know {other}: {line}"),
    }
}

/// A file, by the name it was created with; `None` for the one that was there before.
type File = Option<String>;

fn apply(names: &mut BTreeMap<String, File>, step: &Step) {
    match step {
        Step::Create(name) => drop(names.insert(name.clone(), Some(name.clone()))),
        Step::Rename(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Step::Exchange(one, other) => {
            if let (Some(first), Some(second)) =
                (names.get(one).cloned(), names.get(other).cloned())
            {
                names.insert(one.clone(), second);
                names.insert(other.clone(), first);
            }
        }
        Step::Remove(name) => drop(names.remove(name)),
        Step::Write(..) | Step::SyncFile(_) | Step::SyncDir => {}
    }
}

/// Every directory that may be found after a power loss that follows `steps`, with the files that are whole.
fn states_after(steps: &[Step], files: &[&str]) -> Vec<(BTreeMap<String, File>, Vec<String>)> {
    let base: BTreeMap<_, _> = files
        .iter()
        .map(|name| ((*name).to_owned(), None))
        .collect();
    let (mut names, mut whole) = (base.clone(), Vec::new());
    for step in steps {
        match step {
            // A file is known by the name that it was created with.
            Step::SyncFile(name) => whole.extend(names[name].clone()),
            step => apply(&mut names, step),
        }
    }
    let names = names_after(steps, base).into_iter();
    names.map(|names| (names, whole.clone())).collect()
}

/// The names that may be found after a power loss that follows `steps`, which began with those of `base`.
fn names_after(steps: &[Step], mut base: BTreeMap<String, File>) -> Vec<BTreeMap<String, File>> {
    let synced = steps
        .iter()
        .rposition(|step| *step == Step::SyncDir)
        .unwrap_or(0);
    let (certain, open) = steps.split_at(synced);
    certain.iter().for_each(|step| apply(&mut base, step));
    let open: Vec<_> = open
        .iter()
        .filter(|step| !matches!(step, Step::Write(..) | Step::SyncFile(_) | Step::SyncDir))
        .collect();
    (0..1u32 << open.len())
        .map(|subset| {
            let mut names = base.clone();
            let arrived = open
                .iter()
                .enumerate()
                .filter(|(at, _)| subset & (1 << at) != 0);
            arrived.for_each(|(_, step)| apply(&mut names, step));
            names
        })
        .collect()
}

/// Builds the directory. The record is made again, as it holds inode numbers: from the layout in the documentation.
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
    for (stage, dest) in &members {
        let path = aside.join(stage);
        fs::write(&path, if whole.contains(stage) { "new" } else { "n" }).unwrap();
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
        for name in [stage, dest] {
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
            // Where there is no group, nothing was put aside.
            None if aside.join(name).exists() => fs::hard_link(aside.join(name), path).unwrap(),
            None => fs::write(path, "old").unwrap(),
            Some(stage) if aside.join(stage).exists() => {
                fs::hard_link(aside.join(stage), path).unwrap()
            }
            Some(stage) if whole.contains(stage) => fs::write(path, &record).unwrap(),
            Some(_) => fs::write(path, &record[..record.len() / 2]).unwrap(),
        }
    }
    fs::remove_dir_all(aside).unwrap();
}

#[rstest]
#[case("replace", 10)]
#[case("group", 60)]
fn after_a_power_loss_at_any_point_all_is_old_or_all_is_new(
    #[case] job: &str,
    #[case] least: usize,
) {
    if !Need::Strace.met("after_a_power_loss_at_any_point_all_is_old_or_all_is_new") {
        return;
    }
    let (steps, files) = (traced_steps(job, old_files(job).path()), files(job));
    let mut states = 0;
    for crash in 0..=steps.len() {
        for (names, whole) in states_after(&steps[..crash], files) {
            let dir = tempfile::tempdir().unwrap();
            build(dir.path(), &names, &whole, &steps, files);
            let context = format!("after {:?} found {names:?}", &steps[..crash]);
            let committed = crash == steps.len();
            // A record that came back later would speak of a directory that has moved on.
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
    assert!(states >= least, "{states} states are no proof");
}

#[test]
fn the_model_finds_a_commit_that_does_not_sync() {
    let rename = || Step::Rename("stage".into(), "dest".into());
    let create = || Step::Create("stage".into());
    let torn = |steps: &[Step]| {
        states_after(steps, &["dest"]).iter().any(|(names, whole)| {
            names["dest"]
                .as_ref()
                .is_some_and(|stage| !whole.contains(stage))
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
fn a_recovery_makes_the_names_durable_before_it_removes_the_record_and_then_the_removal() {
    const TEST: &str =
        "a_recovery_makes_the_names_durable_before_it_removes_the_record_and_then_the_removal";
    if !Need::Strace.met(TEST) {
        return;
    }
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

/// What two commits after each other write, each in the file that the one before it replaced.
const TEXTS: [&str; 2] = ["newer", "newest"];

const SPARE: &str = ".atomic-file-88662993.spare";

/// The directory before the first: the old file, and an older one kept as a spare.
fn with_spare() -> BTreeMap<String, File> {
    let spare = (SPARE.to_owned(), Some(SPARE.to_owned()));
    BTreeMap::from([("dest".to_owned(), None), spare])
}

/// What the files hold after a power loss that follows `steps`: `None` where a write was not synced.
fn contents_after(steps: &[Step]) -> BTreeMap<File, Option<String>> {
    let mut names = with_spare();
    let old = |text: &str| Some(text.to_owned());
    let mut contents = BTreeMap::from([(None, old("old")), (names[SPARE].clone(), old("older"))]);
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
    // Another writer, after a kill of this one, may have begun to overwrite it by then.
    if let Some(spare) = names.get(SPARE) {
        contents.insert(spare.clone(), None);
    }
    contents
}

#[test]
fn after_a_power_loss_at_any_point_of_recycled_commits_the_file_is_whole() {
    const TEST: &str = "after_a_power_loss_at_any_point_of_recycled_commits_the_file_is_whole";
    if !Need::Strace.met(TEST) {
        return;
    }
    let dir = old_files_in(recycling_dir(), "replace");
    fs::write(dir.path().join(SPARE), "older").unwrap();
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
        for names in names_after(before, with_spare()) {
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
    assert!(states >= 30, "{states} states are no proof");
}

#[test]
fn the_model_finds_a_spare_that_is_overwritten_before_the_directory_is_synced() {
    let (spare, stage, dest) = (
        || SPARE.to_owned(),
        || "stage".to_owned(),
        || "dest".to_owned(),
    );
    let commit = |text: &str| {
        [
            Step::Rename(spare(), stage()),
            Step::Write(stage(), text.to_owned()),
            Step::SyncFile(stage()),
            Step::Exchange(stage(), dest()),
            Step::SyncDir,
            Step::Rename(stage(), spare()),
        ]
    };
    let torn = |steps: &[Step]| {
        let contents = contents_after(steps);
        let mut found = names_after(steps, with_spare()).into_iter();
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
    assert!(found(&early), "a spare before it");
}
