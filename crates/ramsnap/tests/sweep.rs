//! `ramsnap sweep`, and the attributes of replaced files.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use rstest::rstest;
use support::Work;
use test_machine::needs;

const ORPHAN: &str = ".atomic-file-00000000-0123456789abcdef.stage";
const IN_USE: &str = ".atomic-file-00000000-0123456789abcde0.stage";
const NO_FILE: &str = ".atomic-file-00000000-0123456789abcde1.stage";
const RECYCLED: &str = ".atomic-file-00000000.spare";

/// Returns a directory `dir` with every kind of file that a sweep may find. The returned file is
/// locked until it is dropped.
fn found() -> (Work, File) {
    let work = Work::empty();
    fs::create_dir(work.path("dir")).unwrap();
    let path = |name: &str| work.path("dir").join(name);
    for name in [ORPHAN, RECYCLED, "full.mem", ".atomic-file-notes"] {
        fs::write(path(name), "bytes").unwrap();
    }
    symlink("full.mem", path(NO_FILE)).unwrap();
    let in_use = File::create(path(IN_USE)).unwrap();
    in_use.lock().unwrap();
    (work, in_use)
}

#[rstest]
#[case::removing("", "removed")]
#[case::dry("--dry-run ", "would be removed")]
fn a_sweep_lists_what_is_removed_in_use_and_kept(#[case] flag: &str, #[case] verb: &str) {
    let (work, _in_use) = found();
    let out = work.good(&format!("sweep {flag}dir")).out;
    for line in [
        format!("dir/{ORPHAN}: {verb}"),
        format!("dir/{RECYCLED}: {verb}"),
        format!("dir/{IN_USE}: in use"),
        format!("dir/{NO_FILE}: kept: "),
        format!("2 files {verb}, 1 in use, 1 kept"),
    ] {
        assert!(
            out.lines().any(|found| found.starts_with(&line)),
            "no {line:?} in {out}"
        );
    }
    let mut left = vec![IN_USE, NO_FILE, ".atomic-file-notes", "full.mem"];
    if !flag.is_empty() {
        left.extend([ORPHAN, RECYCLED]);
    }
    left.sort();
    assert_eq!(support::list(&work.path("dir")), left);
}

#[test]
fn a_sweep_speaks_json_and_takes_several_directories() {
    let (work, _in_use) = found();
    fs::create_dir(work.path("other")).unwrap();
    fs::write(work.path("other").join(ORPHAN), "").unwrap();
    let found = work.good("sweep --json dir other").json();
    let removed = found["removed"].as_array().unwrap();
    assert!(removed.contains(&format!("dir/{ORPHAN}").into()), "{found}");
    assert!(
        removed.contains(&format!("other/{ORPHAN}").into()),
        "{found}"
    );
    assert_eq!(found["in_use"][0], format!("dir/{IN_USE}"));
    assert_eq!(found["kept"][0]["file"], format!("dir/{NO_FILE}"));
    assert_eq!(found["dry_run"], false);
    work.run("sweep nowhere").fails(3, &["nowhere"]);
    work.run("sweep").fails(2, &["DIR"]);
    work.run("sweep --recover --dry-run dir")
        .fails(2, &["--dry-run"]);
}

/// Returns a group record of version 1 with one member.
fn record(stage: &str, dest: &str, inode: u64, size: u64) -> Vec<u8> {
    let mut bytes = b"ATOMGRP\n\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend(inode.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    for name in [stage, dest] {
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

#[test]
fn an_interrupted_group_is_kept_unless_it_is_to_be_recovered() {
    let work = Work::empty();
    fs::create_dir(work.path("dir")).unwrap();
    let path = |name: &str| work.path("dir").join(name);
    fs::write(path(ORPHAN), "new").unwrap();
    let inode = fs::metadata(path(ORPHAN)).unwrap().ino();
    let group = path(".atomic-file-0123456789abcdef.group");
    fs::write(&group, record(ORPHAN, "full.mem", inode, 3)).unwrap();
    let out = work.good("sweep dir").out;
    assert!(out.contains("0 files removed, 0 in use, 1 kept"), "{out}");
    // The first directory needs a decision of the user; the other one is swept nevertheless.
    fs::create_dir(path("full.mem")).unwrap();
    fs::create_dir(work.path("other")).unwrap();
    fs::write(work.path("other").join(ORPHAN), "").unwrap();
    let ended = work.run("sweep --recover dir other");
    let ended = ended.fails(3, &["full.mem", "is a directory now"]);
    assert!(ended.out.contains("1 file removed"), "{ended:?}");
    fs::remove_dir(path("full.mem")).unwrap();
    let out = work.good("sweep --recover dir").out;
    assert!(out.contains("dir/full.mem: replaced"), "{out}");
    assert_eq!(support::list(&work.path("dir")), ["full.mem"]);
}

/// The file of the group for the output is gone. The user must know that the group is incomplete.
#[test]
fn a_superseded_file_of_a_group_is_reported() {
    let work = Work::empty();
    fs::create_dir(work.path("dir")).unwrap();
    for flags in ["", "--json "] {
        let group = work.path("dir/.atomic-file-0123456789abcdef.group");
        fs::write(&group, record(ORPHAN, "full.mem", u64::MAX, 3)).unwrap();
        fs::write(work.path("dir").join("full.mem"), "later").unwrap();
        let ended = work.good(&format!("sweep --recover {flags}dir"));
        match flags {
            "" => assert!(ended.out.contains("dir/full.mem: superseded"), "{ended:?}"),
            _ => assert_eq!(ended.json()["superseded"][0], "dir/full.mem"),
        }
        assert_eq!(support::list(&work.path("dir")), ["full.mem"]);
    }
}

#[rstest]
#[case::dump("dump ram -o out --force")]
#[case::diff("diff full.mem --ram ram -o out --force")]
#[case::merge("merge full.mem d1.mem -o out --force")]
#[case::merge_in_place("merge --in-place out d1.mem")]
#[case::convert("convert full.mem -o out --force")]
#[case::map("map full.mem -o out.svg --force")]
fn the_attributes_of_a_replaced_file_are_kept(#[case] arguments: &str) {
    needs!(Root);
    let work = Work::with_chain();
    work.copy("full.mem", "out");
    work.copy("full.mem", "out.svg");
    let out = work.path(if arguments.contains("svg") {
        "out.svg"
    } else {
        "out"
    });
    fs::set_permissions(&out, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&out, Some(12345), Some(23456)).unwrap();
    let before = fs::metadata(&out).unwrap();
    work.good(arguments);
    let after = fs::metadata(&out).unwrap();
    assert_ne!(after.ino(), before.ino());
    let attributes = |stat: &fs::Metadata| (stat.uid(), stat.gid(), stat.mode() & 0o7777);
    assert_eq!(attributes(&after), (12345, 23456, 0o640));
}
