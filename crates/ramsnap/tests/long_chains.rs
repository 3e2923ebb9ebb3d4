//! Chains of more images than the tool can have open.
#![cfg(target_os = "linux")]

mod support;

use std::process::Command;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use rstest::rstest;
use support::{Ended, PAGE, RAMSNAP, Work};

const RAM: u64 = 1 << 20;

/// The names, with their formats where they don't say them, of `count` images, of which each but
/// the first is a diff of one page; and `ram`, the last state.
fn chain(work: &Work, count: usize, packed: bool) -> Vec<String> {
    let mut ram = vec![1; RAM as usize];
    let mut parent = None;
    let mut names = Vec::new();
    for number in 0..count {
        let name = format!("{number:04}.mem");
        let seal = parent.map_or(Seal::new(), |id| Seal::new().parent(id));
        let layout = match packed {
            true => Layout::Packed,
            false => Layout::Raw,
        };
        let mut writer = MemoryWriter::options()
            .layout(layout)
            .seal(seal)
            .durability(Durability::None)
            .open(work.path(&name), RAM, PAGE)
            .unwrap();
        if number == 0 {
            writer.write_full(&ram).unwrap();
        } else {
            let dirty = DirtyBitmap::new(0, RAM, PAGE).unwrap();
            let start = number * 7 * PAGE as usize % RAM as usize;
            ram[start..start + PAGE as usize].fill(number as u8);
            dirty.mark(start as u64).unwrap();
            writer.write_diff(&ram, &dirty).unwrap();
        }
        parent = writer.image_id();
        writer.commit().unwrap();
        names.push(if packed { name } else { format!("raw:{name}") });
    }
    std::fs::write(work.path("ram"), &ram).unwrap();
    names
}

/// Runs the tool where it can have no more than 64 descriptors.
fn with_few_descriptors(work: &Work, before: &[&str], images: &[String], after: &[&str]) -> Ended {
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\"", RAMSNAP])
        .args(before)
        .args(images)
        .args(after)
        .current_dir(work.path("."));
    Ended::of(&mut command)
}

#[rstest]
fn every_verb_takes_more_images_than_descriptors(#[values(true, false)] packed: bool) {
    let work = Work::empty();
    let images = chain(&work, 200, packed);
    let run = |before: &[&str], after: &[&str]| {
        with_few_descriptors(&work, before, &images, after).good()
    };
    run(&["restore"], &["-o", "out"]);
    work.assert_same("out", "ram");
    let verified = run(&["verify", "--allow-raw"], &["--json"]).json();
    assert_eq!(verified["files"].as_array().unwrap().len(), 200);
    let links = if packed { "good" } else { "unnamed" };
    assert_eq!(verified["links"]["state"], links);
    run(&["merge"], &["-o", "merged.mem"]);
    let merged = if packed { "" } else { "raw:" };
    work.good(&format!("restore {merged}merged.mem -o again"));
    work.assert_same("again", "ram");
    assert_eq!(
        run(&["info"], &["--json"]).json().as_array().unwrap().len(),
        200
    );
    assert_eq!(
        run(&["map"], &["--json"]).json().as_array().unwrap().len(),
        200
    );
    let (full, diffs) = images.split_first().unwrap();
    let merge = [&["merge"][..], if packed { &[] } else { &["--raw-diffs"] }].concat();
    with_few_descriptors(&work, &merge, diffs, &["-o", "diffs.mem"]).good();
    if packed {
        work.good(&format!("restore {full} diffs.mem -o from_two"));
        work.assert_same("from_two", "ram");
    }
    run(&["diff"], &["--ram", "ram"]);
}

/// All images together must take no more calls than one: starting a thread takes longer than
/// checking a page.
#[rstest]
#[case::verify_starts_a_thread("verify", "clone,clone3", true)]
fn many_small_images_take_no_more_calls_than_one(
    #[case] verb: &str,
    #[case] traced: &str,
    #[case] packed: bool,
) {
    test_machine::needs!(Strace);
    let work = Work::empty();
    let images = chain(&work, 13, packed);
    let calls = |images: &[String]| {
        let log = work.path("log");
        let mut command = Command::new("strace");
        command
            .args(["-f", "-qq", "-e", &format!("trace={traced}"), "-o"])
            .arg(&log)
            .args([RAMSNAP, verb])
            .args(images)
            .current_dir(work.path("."));
        Ended::of(&mut command).good();
        let log = std::fs::read_to_string(log).unwrap();
        log.lines().filter(|line| line.contains('(')).count()
    };
    let diffs = &images[1..];
    let for_one = calls(&diffs[..1]);
    assert!(for_one > 0);
    assert_eq!(calls(diffs), for_one);
}
