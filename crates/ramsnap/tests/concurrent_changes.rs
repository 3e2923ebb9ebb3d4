//! Changes by other processes to the files of a verb while it works.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rstest::rstest;
use support::held::Held;
use support::{PAGE, RAM, Work};
use test_machine::needs;

/// Holds a verb at the first write of its output. The images are checked by then, and none of their
/// pages is written.
fn writing(work: &Work, command: &str) -> Held {
    let write = ("pwrite64".to_owned(), 1);
    Held::before(&work.command(command), &write).expect("held")
}

#[test]
fn a_merge_in_place_does_not_undo_another_writer() {
    needs!(Strace);
    let work = Work::with_chain();
    work.good("convert full.mem -o theirs.mem --layout sealed");
    let held = writing(&work, "merge --in-place full.mem d1.mem");
    work.good("convert theirs.mem -o full.mem --force");
    let theirs = work.read("full.mem");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in [
        "full.mem",
        "not replaced",
        "another writer",
        "; nothing was replaced",
    ] {
        assert!(error.contains(words), "no {words} in {error}");
    }
    assert!(!error.contains("::"), "{error}");
    assert!(work.read("full.mem") == theirs);
    let left = [
        "d1.mem",
        "d2.mem",
        "first",
        "full.mem",
        "ram",
        "second",
        "theirs.mem",
    ];
    assert_eq!(work.files(), left);
    // Another merge reads the file that is there now.
    work.good("merge --in-place full.mem d1.mem");
    work.good("verify full.mem d2.mem");
}

/// Anybody who may read a file may lock it. `flock full.mem ramsnap ...` does so, too.
#[test]
fn a_merge_onto_a_locked_file_names_the_lock() {
    let work = Work::with_chain();
    let locked = File::open(work.path("full.mem")).unwrap();
    locked.try_lock().unwrap();
    let merge = "merge --in-place full.mem d1.mem";
    let words = [
        "full.mem",
        "a process holds an flock",
        "`lslocks` lists it",
        "`flock FILE ramsnap ...` locks the file against ramsnap itself: lock another file",
    ];
    work.fails(merge, 3, &words);
    let mut flock = Command::new("flock");
    flock.args(["full.mem", support::RAMSNAP]);
    flock.args(merge.split(' ')).current_dir(work.path(""));
    locked.unlock().unwrap();
    let before = work.contents();
    support::Ended::of(&mut flock).fails(3, &words);
    assert!(work.contents() == before, "{:?}", work.files());
    work.good(merge);
}

/// A change to an image while it is read.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Cut,
    /// Truncated, and written again from its start, as `cp` does.
    Overwritten,
    WrittenTo,
}

impl Fate {
    fn befall(self, work: &Work, name: &str) {
        let path = work.path(name);
        let bytes = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        match self {
            Self::Cut => file.set_len(bytes.len() as u64 / 2).unwrap(),
            Self::Overwritten => {
                file.set_len(0).unwrap();
                file.write_all_at(&vec![0x5a; bytes.len()], 0).unwrap();
            }
            Self::WrittenTo => file.write_all_at(&[0x5a; PAGE as usize], PAGE).unwrap(),
        }
        // The time stamp after the clock of the file system has ticked.
        let later = SystemTime::now() + Duration::from_secs(1);
        file.set_modified(later).unwrap();
    }
}

#[rstest]
fn an_image_that_changes_while_it_is_read_is_an_error(
    #[values(
        "merge full.mem d1.mem -o out",
        "merge --in-place full.mem d1.mem",
        "merge raw:full.raw -o out",
        "convert full.mem -o out --layout sealed",
        "restore full.mem d1.mem -o out",
        "restore full.mem d1.mem -o target",
        "diff full.mem d1.mem --ram ram -o out"
    )]
    command: &str,
    #[values(Fate::Cut, Fate::Overwritten, Fate::WrittenTo)] fate: Fate,
) {
    needs!(Strace);
    let work = Work::with_chain();
    let target = work.create("target", RAM);
    work.good("dump ram -o full.raw --layout raw");
    let before = work.files();
    let image = match command.contains("raw:") {
        true => "full.raw",
        false => "full.mem",
    };
    // A raw image may be shared with the result, without a write.
    if command.contains("raw:") && shares_blocks(&work) {
        return;
    }
    let held = writing(&work, command);
    fate.befall(&work, image);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    assert!(error.contains(image), "{error}");
    assert_eq!(work.files().len(), before.len(), "{error}");
    let mut left = vec![0; RAM as usize];
    target.read_exact_at(&mut left, 0).unwrap();
    assert!(left.iter().all(|byte| *byte == 0));
}

fn shares_blocks(work: &Work) -> bool {
    let mut copy = Command::new("cp");
    let copied = copy
        .args(["--reflink=always", "full.raw", "shared"])
        .current_dir(work.path(""))
        .output()
        .unwrap();
    let _ = fs::remove_file(work.path("shared"));
    copied.status.success()
}

/// The bytes of the file that was opened are the right ones.
#[rstest]
#[case::merged("merge full.mem d1.mem -o out", "diff out --ram second")]
#[case::converted("convert full.mem -o out --layout sealed", "diff out --ram first")]
#[case::restored("restore full.mem d1.mem -o out", "diff raw:out --ram second")]
#[case::in_place("restore full.mem d1.mem -o target", "diff raw:target --ram second")]
fn an_image_that_is_replaced_while_it_is_read_is_as_it_was(
    #[case] command: &str,
    #[case] is_right: &str,
) {
    needs!(Strace);
    let work = Work::with_chain();
    work.create("target", RAM);
    let held = writing(&work, command);
    fs::write(work.path("other"), vec![0x5a; work.read("full.mem").len()]).unwrap();
    fs::rename(work.path("other"), work.path("full.mem")).unwrap();
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(0), "{error}");
    work.good(is_right);
}

/// Otherwise the bytes of another file could be sent as verified ones.
#[test]
fn an_image_that_is_sent_is_opened_once() {
    needs!(Strace);
    let work = Work::with_chain();
    let mut strace = Command::new("strace");
    strace
        .args([
            "-f",
            "-qq",
            "-o",
            "log",
            "-e",
            "trace=openat",
            support::RAMSNAP,
        ])
        .args(["convert", "full.mem", "-o", "-", "--zstd"])
        .current_dir(work.path(""))
        .stdout(std::process::Stdio::null());
    assert!(strace.status().unwrap().success());
    let log = String::from_utf8(work.read("log")).unwrap();
    let opened = log.lines().filter(|line| line.contains("\"full.mem\""));
    assert_eq!(opened.count(), 1, "{log}");
}

/// A chain that is found by its ids can be read at each moment of a commit.
#[rstest]
fn a_reader_finds_the_chain_again_after_a_commit(
    #[values("restore --chain . d2.mem -o out", "verify --chain . d2.mem")] command: &str,
) {
    needs!(Strace);
    let made = Work::with_chain();
    for number in 1.. {
        let work = Work::empty();
        for name in ["full.mem", "d1.mem", "d2.mem", "ram"] {
            fs::copy(made.path(name), work.path(name)).unwrap();
        }
        let open = ("openat".to_owned(), number);
        let Some(held) = Held::before(&work.command(command), &open) else {
            assert!(number > 3);
            break;
        };
        // As a commit does.
        work.good("merge full.mem d1.mem -o merged");
        fs::rename(work.path("merged"), work.path("full.mem")).unwrap();
        fs::remove_file(work.path("d1.mem")).unwrap();
        let (status, error) = held.release();
        assert_eq!(status.code(), Some(0), "at {number}: {error}");
        if command.contains("out") {
            assert!(work.read("out") == work.read("ram"), "at {number}");
        }
    }
}
