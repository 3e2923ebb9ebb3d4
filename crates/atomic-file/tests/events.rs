//! Events of the feature `tracing`.
#![cfg(all(feature = "tracing", target_os = "linux"))]

mod support;

use std::fs::{self, File};

use atomic_file::{AtomicWriter, Durability, sweep};
use support::recycling::{one_at_a_time, recycling, save, with_recycled_file};
use test_events::captured;

#[test]
fn a_sweep_reports_what_it_removes_and_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let writer = AtomicWriter::open(dir.path().join("a")).unwrap();
    let orphan = {
        let killed = AtomicWriter::open(dir.path().join("b")).unwrap();
        killed.staged_path().to_owned()
    };
    fs::write(&orphan, "left behind").unwrap();
    let events = captured(|| drop(sweep(dir.path()).unwrap()));
    let line = |path: &std::path::Path| {
        let name = format!("{path:?}");
        let found = events.lines().find(|line| line.contains(&name));
        found.unwrap_or_else(|| panic!("no {name} in {events}"))
    };
    assert!(line(&orphan).contains("INFO atomic_file: orphaned file removed"));
    assert!(line(writer.staged_path()).contains("staged file kept: a writer uses it"));
    assert!(!events.contains("left behind"), "{events}");
}

#[test]
fn opening_reports_the_orphans_that_it_removes() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let orphan = AtomicWriter::open(&dest).unwrap().staged_path().to_owned();
    fs::write(&orphan, "").unwrap();
    let events = captured(|| drop(AtomicWriter::open(&dest).unwrap()));
    assert!(!orphan.exists());
    assert!(events.contains("orphaned file removed"), "{events}");
    assert!(events.contains(&format!("{orphan:?}")), "{events}");
}

#[test]
fn a_recycled_file_that_is_not_reused_is_reported_with_why() {
    let _turn = one_at_a_time();
    let (_dir, dest, recycled_file) = with_recycled_file();
    let open = File::open(&recycled_file).unwrap();
    let events = captured(|| assert!(!save(&recycling(), &dest, 3)));
    assert!(
        events.contains("INFO atomic_file: the recycled file is not reused"),
        "{events}"
    );
    assert!(
        events.contains("another process has it open or mapped"),
        "{events}"
    );
    drop(open);

    let small = AtomicWriter::options().recycle(4096);
    let events = captured(|| assert!(!save(&small, &dest, 4)));
    for text in [
        "the recycled file is not reused",
        "the replaced file is not recycled",
        "it takes more space than may be recycled",
    ] {
        assert!(events.contains(text), "no {text:?} in {events}");
    }
}

#[test]
fn a_commit_that_cannot_recycle_reports_why() {
    let _turn = one_at_a_time();
    let (_dir, dest, _) = with_recycled_file();
    let options = recycling().durability(Durability::None);
    let events = captured(|| assert!(save(&options, &dest, 3)));
    assert!(
        events.contains("the replaced file is not recycled") && events.contains("Durability::Full"),
        "{events}"
    );
}

#[test]
fn paths_in_events_are_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("a\u{1b}[31m\nb");
    let events = captured(|| drop(AtomicWriter::open(&dest).unwrap()));
    assert!(events.contains("a\\u{1b}[31m\\nb"), "{events}");
    assert!(!events.contains('\u{1b}'), "{events}");
}
