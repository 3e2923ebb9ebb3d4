//! No verb replaces or removes an image that another one needs, except by `--force`.

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::process::{Child, ChildStderr, Command, Stdio};

use support::{Ended, RAMSNAP, Work};

/// Creates `shared/full.mem` with a diff beside it, and `links/full.mem`, which leads to it, with a
/// chain.
fn with_link() -> Work {
    let work = Work::with_chain();
    for dir in ["shared", "links"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    fs::rename(work.path("full.mem"), work.path("shared/full.mem")).unwrap();
    work.copy("d1.mem", "shared/of-others.mem");
    symlink("../shared/full.mem", work.path("links/full.mem")).unwrap();
    for diff in ["d1.mem", "d2.mem"] {
        fs::rename(work.path(diff), work.path(&format!("links/{diff}"))).unwrap();
    }
    work
}

#[test]
fn diffs_beside_the_target_of_a_link_are_found() {
    let work = with_link();
    let before = fs::read(work.path("shared/full.mem")).unwrap();
    for command in [
        "commit links/full.mem links/d1.mem links/d2.mem",
        "compact links --keep 1",
    ] {
        Ended::of(&mut work.command(command)).fails(2, &["of-others.mem"]);
        assert!(fs::read(work.path("shared/full.mem")).unwrap() == before);
    }
}

#[test]
fn diffs_beside_each_file_of_the_chain_are_found() {
    let work = Work::with_chain();
    fs::create_dir(work.path("diffs")).unwrap();
    for diff in ["d1.mem", "d2.mem"] {
        fs::rename(work.path(diff), work.path(&format!("diffs/{diff}"))).unwrap();
    }
    work.copy("diffs/d2.mem", "diffs/.branch.mem");
    let commit = "commit full.mem diffs/d1.mem --remove";
    Ended::of(&mut work.command(commit)).good();
    let work = Work::with_chain();
    work.good("diff full.mem d1.mem --ram first -o .branch.mem");
    fs::create_dir(work.path("base")).unwrap();
    fs::rename(work.path("full.mem"), work.path("base/full.mem")).unwrap();
    let commit = "commit base/full.mem d1.mem d2.mem --remove";
    Ended::of(&mut work.command(commit)).fails(2, &[".branch.mem", "--force"]);
}

#[test]
fn images_that_cannot_be_read_may_need_a_state() {
    let work = Work::with_chain();
    work.copy("d2.mem", "newer.mem");
    let len = fs::metadata(work.path("newer.mem")).unwrap().len();
    let file = File::options().write(true).open(work.path("newer.mem"));
    file.unwrap().set_len(len - 100).unwrap();
    let commit = "commit full.mem d1.mem --remove";
    work.fails(commit, 2, &["newer.mem", "--force"]);
    fs::remove_file(work.path("newer.mem")).unwrap();
    work.good(commit);
}

/// Nothing shows which raw image a diff was taken on.
#[test]
fn diffs_on_a_raw_image_prevent_a_commit_to_one() {
    let work = Work::with_chain();
    work.good("convert full.mem -o full.raw --layout raw");
    for (diff, ram) in [("d1.mem", "second"), ("other.mem", "ram")] {
        work.good(&format!("diff raw:full.raw --ram {ram} -o {diff} --force"));
    }
    fs::remove_file(work.path("d2.mem")).unwrap();
    let commit = "commit raw:full.raw d1.mem";
    work.fails(commit, 2, &["other.mem", "--force"]);
    fs::remove_file(work.path("other.mem")).unwrap();
    // A raw image has no id by which a diff follows it.
    work.good("diff raw:full.raw d1.mem --ram ram -o d2.mem");
    work.fails("commit raw:full.raw d1.mem --remove", 2, &["d2.mem"]);
    work.good(commit);
    work.good("restore raw:full.raw d1.mem d2.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn a_conversion_does_not_replace_the_parent() {
    let work = Work::with_chain();
    symlink("d1.mem", work.path("link.mem")).unwrap();
    for output in ["d1.mem", "link.mem"] {
        let convert = format!("convert d2.mem -o {output} --force");
        work.fails(&convert, 2, &[output]);
    }
    work.good("convert d2.mem -o d2.zst --zstd");
    work.fails("convert d2.zst -o d1.mem --force", 2, &["d1.mem"]);
    work.good("verify full.mem d1.mem d2.mem");
}

#[test]
fn a_diff_is_not_rebased_onto_its_own_chain() {
    let work = Work::with_chain();
    work.copy("d1.mem", "copy.mem");
    let onto = "--onto full.mem --onto copy.mem --onto d2.mem";
    let rebase = format!("rebase full.mem d1.mem {onto}");
    work.fails(&rebase, 2, &["the diff itself"]);
}

/// After a run that was killed before it removed the merged diffs.
#[test]
fn compact_continues_where_merged_diffs_were_left() {
    let work = Work::with_chain();
    work.good("commit full.mem d1.mem");
    assert!(work.path("d1.mem").exists());
    work.good("compact . --keep 1");
    assert!(!work.path("d2.mem").exists());
    work.good("diff full.mem --ram ram");
}

/// Starts the tool in a locked directory, until it says that it waits.
fn waiting_run(work: &Work, command: &str) -> (Child, BufReader<ChildStderr>) {
    let mut waiting = Command::new(RAMSNAP);
    waiting.args(command.split(' ')).current_dir(work.path("."));
    waiting.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut waiting = waiting.spawn().unwrap();
    let mut first = String::new();
    let mut errors = BufReader::new(waiting.stderr.take().unwrap());
    errors.read_line(&mut first).unwrap();
    assert!(first.contains("waiting"), "{command}: {first}");
    (waiting, errors)
}

/// Runs in which one would replace an image that the other needs wait for each other.
#[test]
fn a_run_waits_while_another_one_uses_the_images() {
    for (command, shared) in [
        ("diff full.mem d1.mem --ram ram -o new.mem", false),
        ("diff --chain . d1.mem --ram ram -o new.mem", false),
        ("merge d1.mem d2.mem -o both.mem", false),
        ("convert d1.mem -o copy.mem --layout sealed", false),
        ("convert d1.mem -o copy.mem.zst", false),
        ("rebase full.mem d1.mem d2.mem --onto full.mem", true),
        ("commit full.mem d1.mem d2.mem", true),
        ("merge --in-place full.mem d1.mem", true),
        ("compact . --keep 1", true),
    ] {
        let work = Work::with_chain();
        let dir = File::open(work.path(".")).unwrap();
        match shared {
            true => dir.lock_shared().unwrap(),
            false => dir.lock().unwrap(),
        }
        let (mut waiting, _errors) = waiting_run(&work, command);
        assert_eq!(waiting.try_wait().unwrap(), None, "{command}");
        drop(dir);
        assert!(waiting.wait().unwrap().success(), "{command}");
    }
}

/// Each removed file that is still open would take a descriptor.
#[test]
fn more_diffs_than_descriptors_are_merged_and_removed() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    for number in 0..50 {
        work.change(number * 7, 1);
        let newest = match number {
            0 => "full.mem".to_owned(),
            _ => format!("d{}.mem", number - 1),
        };
        work.good(&format!(
            "diff --chain . {newest} --ram ram -o d{number}.mem"
        ));
    }
    let mut compact = Command::new("sh");
    compact.args([
        "-c",
        "ulimit -n 40; exec \"$0\" compact . --keep 1",
        RAMSNAP,
    ]);
    Ended::of(compact.current_dir(work.path("."))).good();
    assert_eq!(work.files(), ["full.mem", "ram"]);
    work.good("diff full.mem --ram ram");
}

#[test]
fn a_merge_in_place_keeps_what_others_need() {
    let work = Work::with_chain();
    work.good("diff full.mem d1.mem --ram first -o branch.mem");
    let merge = "merge --in-place full.mem d1.mem d2.mem";
    work.fails(merge, 2, &["branch.mem", "--force"]);
    work.good(&format!("{merge} --force"));
    work.good("diff full.mem --ram ram");
}

/// A merged diff that follows no image would be of no use, and its state lost.
#[test]
fn what_follows_no_image_is_not_merged_in_place() {
    let work = Work::with_chain();
    work.good("commit full.mem d1.mem d2.mem");
    for command in [
        "commit d1.mem d2.mem --remove",
        "merge --in-place d1.mem d2.mem",
    ] {
        work.fails(command, 2, &["d1.mem", "no other file", "--force"]);
    }
    work.good("restore --chain . d2.mem -o out");
    work.assert_same("out", "ram");
    let work = Work::with_chain();
    work.good("commit d1.mem d2.mem --remove");
    work.good("restore --chain . d1.mem -o out");
    work.assert_same("out", "ram");
}

/// A diff on a raw image names no parent, whichever place that image has in its chain.
#[test]
fn a_diff_on_a_raw_diff_prevents_its_merge() {
    let work = Work::with_chain();
    work.good("diff full.mem --ram second -o d1.raw --layout raw");
    work.good("diff full.mem raw:d1.raw --ram ram -o d2.mem --force");
    fs::remove_file(work.path("d1.mem")).unwrap();
    for command in [
        "commit full.mem raw:d1.raw --remove",
        "merge --in-place full.mem raw:d1.raw",
    ] {
        work.fails(command, 2, &["d2.mem", "--force"]);
    }
    work.good("restore full.mem raw:d1.raw d2.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn a_compressed_diff_prevents_a_commit() {
    let work = Work::with_chain();
    work.good("diff full.mem --ram ram -o branch.mem");
    work.good("convert branch.mem -o branch.mem.zst");
    fs::remove_file(work.path("branch.mem")).unwrap();
    let commit = "commit full.mem d1.mem d2.mem --remove";
    work.fails(commit, 2, &["branch.mem.zst", "--force"]);
    fs::remove_file(work.path("branch.mem.zst")).unwrap();
    // A full image needs no other one, and a raw file may begin like a compressed one.
    work.good("convert full.mem -o copy.mem.zst");
    work.copy("copy.mem.zst", "raw");
    work.good(commit);
}

/// Files that are found by their ids are looked for again under the lock.
#[test]
fn a_run_that_waited_finds_the_chain_as_it_is_then() {
    for (command, state) in [
        ("diff --chain . d2.mem --ram first -o new.mem", "new.mem"),
        ("commit --chain . d2.mem", "d2.mem"),
        ("rebase --chain . d2.mem --onto base.mem", "d2.mem"),
    ] {
        let work = Work::with_chain();
        work.good("dump first -o base.mem");
        let dir = File::open(work.path(".")).unwrap();
        dir.lock().unwrap();
        let (mut waiting, mut errors) = waiting_run(&work, command);
        // As another run would that commits d1.mem to full.mem.
        work.good("merge full.mem d1.mem -o merged");
        fs::rename(work.path("merged"), work.path("full.mem")).unwrap();
        fs::remove_file(work.path("d1.mem")).unwrap();
        drop(dir);
        let mut rest = String::new();
        errors.read_to_string(&mut rest).unwrap();
        assert!(waiting.wait().unwrap().success(), "{command}: {rest}");
        work.good(&format!("restore --chain . {state} -o out"));
    }
}
