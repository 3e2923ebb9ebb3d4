//! A model of what a power loss leaves of a directory: the calls of a traced commit, and the names
//! after any of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The effect of a call on the directory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    Create(String),
    SyncFile(String),
    Write(String, String),
    Rename(String, String),
    Exchange(String, String),
    Remove(String),
    SyncDir,
}

pub(crate) fn traced_steps(job: &str, dir: &Path) -> Vec<Step> {
    let log = tempfile::NamedTempFile::new().unwrap();
    let calls = "trace=openat,pwrite64,fsync,fdatasync,renameat,renameat2,linkat,unlinkat";
    let args = ["-y", "-e", calls, "-o", log.path().to_str().unwrap()];
    assert_eq!(super::under_strace(job, dir, &args).as_deref(), Some("ok"));
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

pub(crate) fn step(line: &str, dir: &Path) -> Step {
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

/// A file, identified by the name of its creation; `None` for the file that existed before.
pub(crate) type File = Option<String>;

pub(crate) fn apply(names: &mut BTreeMap<String, File>, step: &Step) {
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

/// Returns every set of names that a power loss after `steps` may leave, starting from `base`.
pub(crate) fn names_after(
    steps: &[Step],
    mut base: BTreeMap<String, File>,
) -> Vec<BTreeMap<String, File>> {
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
