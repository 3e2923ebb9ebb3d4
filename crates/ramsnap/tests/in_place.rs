//! Verbs that change an image in place: commit, rebase, compact.

mod support;

use std::fs::{self, File, FileTimes};
use std::time::{Duration, SystemTime};

use rstest::rstest;
use support::{Ended, Work};
#[cfg(target_os = "linux")]
use test_machine::needs;

fn id(work: &Work, name: &str) -> String {
    let info = work.good(&format!("info {name} --json")).json();
    info[0]["id"].as_str().unwrap().to_owned()
}

/// Creates a packed chain of four diffs, `full.mem` to `d4.mem`. `ram` is its last state, and
/// `state0` to `state4` are all.
fn with_long_chain() -> Work {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    work.copy("ram", "state0");
    let mut files = "full.mem".to_owned();
    for number in 1..=4 {
        work.change(number * 10, 3);
        work.copy("ram", &format!("state{number}"));
        work.good(&format!("diff {files} --ram ram -o d{number}.mem"));
        files += &format!(" d{number}.mem");
    }
    work
}

#[rstest]
fn a_commit_makes_the_base_the_newest_state(
    #[values("raw", "sealed", "packed")] layout: &str,
    #[values(true, false)] remove: bool,
) {
    let work = Work::with_chain();
    work.good(&format!("convert full.mem -o base.mem --layout {layout}"));
    fs::remove_file(work.path("full.mem")).unwrap();
    let base = if layout == "raw" {
        "raw:base.mem"
    } else {
        "base.mem"
    };
    if layout == "raw" {
        // Diffs on a raw image do not name it.
        work.good("diff raw:base.mem --ram second -o d1.mem --force");
        work.good("diff raw:base.mem d1.mem --ram ram -o d2.mem --force");
    }
    let flag = match (remove, layout) {
        // A raw image has no id, by which the second diff could follow it without the first one.
        (true, "raw") => " --remove --force",
        (true, _) => " --remove",
        (false, _) => "",
    };
    let done = work.good(&format!("commit {base} d1.mem{flag}")).out;
    assert!(done.starts_with(&format!("base.mem: {layout} ")), "{done}");
    assert_eq!(work.path("d1.mem").exists(), !remove);
    assert_eq!(done.contains("removed d1.mem"), remove, "{done}");
    work.good(&format!("diff {base} --ram second"));
    if layout != "raw" {
        work.good("verify base.mem d2.mem");
        work.good("restore base.mem d2.mem -o out");
        work.assert_same("out", "ram");
    }
}

#[test]
fn a_commit_needs_diffs_and_keeps_what_others_need() {
    let work = Work::with_chain();
    work.fails("commit full.mem", 2, &["nothing to merge"]);
    work.fails("commit full.mem d2.mem", 1, &["d2.mem", "not in the chain"]);
    // The state of d1 is lost if d2 is committed too.
    work.good("diff full.mem d1.mem --ram first -o branch.mem");
    let commit = "commit full.mem d1.mem d2.mem";
    work.fails(commit, 2, &["branch.mem", "--force"]);
    // Nothing is lost if that state is in another full image.
    work.good("merge full.mem d1.mem -o kept.mem");
    work.good(commit);
    work.good("restore --chain . branch.mem -o out");
    work.assert_same("out", "first");
    work.good("diff full.mem --ram ram");
}

#[test]
fn a_commit_may_be_forced_although_a_diff_is_lost() {
    let work = Work::with_chain();
    work.good("diff full.mem --ram ram -o branch.mem");
    work.fails("commit full.mem d1.mem", 2, &["branch.mem"]);
    work.good("commit full.mem d1.mem --force");
    work.good("verify full.mem d2.mem");
}

#[test]
fn a_damaged_chain_is_not_committed() {
    let work = Work::with_chain();
    work.rot("d1.mem", 5000);
    work.fails("commit full.mem d1.mem --remove", 1, &["d1.mem", "damaged"]);
    work.fails(
        "rebase full.mem d1.mem d2.mem --onto full.mem",
        1,
        &["d1.mem", "damaged"],
    );
    work.fails("compact . --keep 1", 1, &["d1.mem", "damaged"]);
}

#[test]
fn diffs_alone_are_committed_to_the_first() {
    let work = Work::with_chain();
    work.good("commit d1.mem d2.mem --remove");
    work.good("verify full.mem d1.mem");
    work.good("restore full.mem d1.mem -o out");
    work.assert_same("out", "ram");
}

#[rstest]
fn a_rebased_diff_is_the_same_state_on_another_parent(#[values("sealed", "packed")] layout: &str) {
    let work = Work::with_chain();
    fs::write(work.path("vcpus"), "registers").unwrap();
    work.good(&format!(
        "diff full.mem d1.mem --ram ram -o d2.mem --force --layout {layout} --metadata vcpus"
    ));
    work.change(30, 1);
    work.good("diff full.mem d1.mem d2.mem --ram ram -o d3.mem");
    let before = id(&work, "d2.mem");
    work.good("rebase full.mem d1.mem d2.mem --onto full.mem");
    let info = work.good("info full.mem d2.mem --json").json();
    assert_eq!(info[1]["parent"], info[0]["id"]);
    assert_eq!(
        (&info[1]["layout"], &info[1]["metadata_bytes"]),
        (&layout.into(), &9.into())
    );
    assert_eq!(id(&work, "d2.mem"), before);
    // What follows it still does.
    fs::remove_file(work.path("d1.mem")).unwrap();
    work.good("verify full.mem d2.mem d3.mem");
    work.good("restore --chain . d3.mem -o out");
    work.assert_same("out", "ram");
    // Onto an image that has nothing in common with the old parent.
    work.create("zeros", support::RAM);
    work.good("dump zeros -o zeros.mem");
    work.good("rebase --chain . d2.mem --onto zeros.mem");
    work.good("restore zeros.mem d2.mem d3.mem -o again");
    work.assert_same("again", "ram");
}

#[test]
fn what_cannot_be_rebased_is_refused() {
    let work = Work::with_chain();
    work.good("dump ram -o other.mem");
    work.create("small", support::RAM / 2);
    work.good("dump small -o small.mem");
    work.good("dump ram -o moved.mem --region-at 0x40000000:8MiB");
    work.fails("rebase full.mem --onto other.mem", 2, &["full.mem", "diff"]);
    work.fails(
        "rebase d1.mem --onto other.mem",
        2,
        &["d1.mem", "is a diff"],
    );
    work.fails(
        "rebase full.mem d1.mem --onto d1.mem",
        2,
        &["d1.mem", "--onto names it too"],
    );
    work.fails(
        "rebase full.mem d1.mem --onto small.mem",
        1,
        &["different guests"],
    );
    work.fails(
        "rebase full.mem d1.mem --onto moved.mem",
        1,
        &["other addresses"],
    );
    work.good("merge full.mem d1.mem -o same.mem");
    work.fails(
        "rebase full.mem d1.mem --onto same.mem",
        2,
        &["the same one"],
    );
    work.fails("rebase full.mem d1.mem", 2, &["--onto"]);
}

#[test]
fn a_number_of_files_is_kept() {
    let work = with_long_chain();
    let plan = work.good("compact . --keep 3 --dry-run --json").json();
    assert_eq!(
        plan["chains"][0]["merged"],
        serde_json::json!(["./d1.mem", "./d2.mem"])
    );
    assert_eq!(
        (&plan["dry_run"], &plan["chains"][0]["kept"]),
        (&true.into(), &2.into())
    );
    assert!(plan["chains"][0]["bytes_after"].is_null());
    assert!(work.path("d1.mem").exists());
    let done = work.good("compact . --keep 3").out;
    assert!(
        done.contains("2 diffs merged into it: d1.mem, d2.mem"),
        "{done}"
    );
    assert!(!work.path("d1.mem").exists() && !work.path("d2.mem").exists());
    work.good("verify full.mem d3.mem d4.mem");
    for (newest, state) in [
        ("full.mem", "state2"),
        ("d3.mem", "state3"),
        ("d4.mem", "state4"),
    ] {
        work.good(&format!("diff --chain . {newest} --ram {state}"));
    }
    assert_eq!(work.good("compact . --keep 3").out, "nothing to merge\n");
    let done = work.good("compact . --keep 1 --json").json();
    let len = fs::metadata(work.path("full.mem")).unwrap().len();
    assert_eq!(done["chains"][0]["bytes_after"], len);
    work.good("diff full.mem --ram ram");
}

#[test]
fn old_diffs_are_merged() {
    let work = with_long_chain();
    let hours = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 3600);
    for (name, age) in [
        ("full.mem", 1),
        ("d1.mem", 100),
        ("d2.mem", 90),
        ("d3.mem", 10),
    ] {
        let file = File::options().write(true).open(work.path(name)).unwrap();
        file.set_times(FileTimes::new().set_modified(hours(age)))
            .unwrap();
    }
    let plan = work.good("compact . --older-than 3d --json").json();
    assert_eq!(
        plan["chains"][0]["merged"],
        serde_json::json!(["./d1.mem", "./d2.mem"])
    );
    work.good("restore --chain . d4.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn diffs_are_merged_until_the_chain_fits() {
    let work = with_long_chain();
    let sum = ["full.mem", "d1.mem", "d2.mem", "d3.mem", "d4.mem"];
    let sum: u64 = sum.iter().map(|name| work.read(name).len() as u64).sum();
    assert_eq!(
        work.good(&format!("compact . --max-size {sum}")).out,
        "nothing to merge\n"
    );
    work.good(&format!("compact . --max-size {}", sum - 1));
    assert!(!work.path("d1.mem").exists());
    work.good("restore --chain . d4.mem -o out");
    work.assert_same("out", "ram");
    // As far as possible.
    work.good("compact . --max-size 1");
    assert!(!work.path("d4.mem").exists());
    work.good("diff full.mem --ram ram");
}

#[test]
fn branches_and_other_files_are_kept() {
    let work = with_long_chain();
    work.good("diff full.mem d1.mem d2.mem --ram state0 -o branch.mem");
    fs::write(work.path("notes.txt"), "not an image").unwrap();
    work.good("dump state0 -o other.mem");
    let others = [
        "branch.mem",
        "d3.mem",
        "d4.mem",
        "notes.txt",
        "other.mem",
        "ram",
    ];
    let before = others.map(|name| work.read(name));
    work.good("compact . --keep 1");
    assert!(!work.path("d1.mem").exists() && !work.path("d2.mem").exists());
    assert!(others.map(|name| work.read(name)) == before);
    work.good("diff --chain . branch.mem --ram state0");
    work.good("diff --chain . d4.mem --ram ram");
    work.fails("compact .", 2, &["--keep"]);
    work.fails("compact . --keep 0", 2, &["--keep"]);
    work.fails("compact none --keep 1", 3, &["none"]);
}

/// What was not merged, and why, is on stderr and in the JSON.
#[test]
fn compact_reports_diffs_that_it_does_not_merge() {
    let work = with_long_chain();
    assert_eq!(work.good("compact . --keep 4 --dry-run").err, "");
    work.good("diff full.mem d1.mem d2.mem --ram state0 -o branch.mem");
    let expected = |diffs: &[&str], reason: &str| {
        let ended = work.good("compact . --keep 1 --dry-run --json");
        let left = &ended.json()["not_merged"];
        assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
        let paths: Vec<_> = diffs.iter().map(|name| format!("./{name}")).collect();
        assert_eq!(left[0]["diffs"], serde_json::json!(paths));
        assert!(left[0]["reason"].as_str().unwrap().contains(reason));
        ended.warns(&["./full.mem", diffs[0], reason]);
    };
    expected(&["branch.mem", "d3.mem"], "after the same state");
    fs::remove_file(work.path("branch.mem")).unwrap();
    work.copy("full.mem", "same.mem");
    expected(&["d1.mem"], "several files have the state");
    fs::remove_file(work.path("same.mem")).unwrap();
    fs::remove_file(work.path("d1.mem")).unwrap();
    let ended = work.good("compact . --keep 1");
    let ended = ended.warns(&[
        "d2.mem",
        "d3.mem",
        "d4.mem",
        "no sealed or packed full image",
    ]);
    assert_eq!(ended.out, "nothing to merge\n");
}

/// Under the lock, and not once more for each chain.
#[cfg(target_os = "linux")]
#[test]
fn compact_reads_each_footer_once() {
    needs!(Strace);
    let work = with_long_chain();
    work.good("dump state0 -o other.mem");
    work.good("diff other.mem --ram ram -o other1.mem");
    let log = work.path("log");
    let mut strace = std::process::Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=openat,flock", "-o"]);
    strace.arg(&log).arg(support::RAMSNAP);
    strace.args(["compact", ".", "--keep", "1", "--dry-run"]);
    Ended::of(strace.current_dir(work.path(""))).good();
    let log = fs::read_to_string(log).unwrap();
    let locked = log.find("flock(").unwrap();
    for name in ["full.mem", "d4.mem", "other.mem", "other1.mem"] {
        let opened = format!("/{name}\"");
        assert_eq!(log.matches(&opened).count(), 1, "{name}: {log}");
        assert!(log.find(&opened).unwrap() > locked, "{name}");
    }
}

#[test]
fn files_of_the_same_state_are_listed_as_such() {
    let work = Work::with_chain();
    assert!(!work.good("list .").out.contains("the same as"));
    work.good("commit full.mem d1.mem");
    work.copy("d2.mem", "copy.mem");
    // No file has the state before d1.
    let out = work.run("list .").out;
    for (name, other) in [
        ("full.mem", "d1.mem"),
        ("d1.mem", "full.mem"),
        ("copy.mem", "d2.mem"),
    ] {
        let line = out.lines().find(|line| line.contains(&format!("{name}: ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in {out}"));
        assert!(line.contains(&format!("the same as {other}")), "{line}");
    }
    let json = work.run("list . --json").json();
    let images = json[0]["images"].as_array().unwrap();
    let full = images.iter().find(|image| image["file"] == "./full.mem");
    assert_eq!(full.unwrap()["same_id"], serde_json::json!(["./d1.mem"]));
}

#[test]
fn other_chains_are_merged_after_one_that_fails() {
    let work = Work::with_chain();
    // The chain that is damaged comes first.
    work.rot("d1.mem", 5000);
    work.good("dump ram -o other.mem");
    work.change(77, 1);
    work.good("diff other.mem --ram ram -o other1.mem");
    let ended = work.run("compact . --keep 1");
    let ended = ended.fails(1, &["d1.mem", "damaged"]);
    assert!(ended.out.contains("other1.mem"), "{ended:?}");
    assert!(work.path("d1.mem").exists() && !work.path("other1.mem").exists());
    work.good("diff other.mem --ram ram");
}
