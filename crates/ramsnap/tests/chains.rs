//! Chains that are found in a directory, and parts of the state that they represent.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rstest::rstest;
use support::{PAGE, RAM, Work};

/// Creates a chain of two diffs in the directory `chain`, and `ram`, its last state.
fn with_directory() -> Work {
    let work = Work::with_chain();
    fs::create_dir(work.path("chain")).unwrap();
    for name in ["full.mem", "d1.mem", "d2.mem"] {
        fs::rename(work.path(name), work.path("chain").join(name)).unwrap();
    }
    work
}

fn files(found: &serde_json::Value) -> Vec<String> {
    let images = found[0]["images"].as_array().unwrap();
    let name = |image: &serde_json::Value| image["file"].as_str().unwrap().to_owned();
    images.iter().map(name).collect()
}

#[test]
fn a_directory_is_listed_as_a_tree() {
    let work = Work::with_chain();
    // A second diff after the first one, another full image, and a raw image.
    work.good("diff full.mem d1.mem --ram first -o branch.mem");
    work.good("dump first -o other.mem");
    let text = work.good("list .").out;
    let lines: Vec<_> = text
        .lines()
        .map(|line| line.split(':').next().unwrap())
        .collect();
    let expected = [
        ".",
        "full.mem",
        "└ d1.mem",
        "  ├ branch.mem",
        "  └ d2.mem",
        "other.mem",
        "3 other files, without a footer",
    ];
    assert_eq!(lines, expected, "{text}");
    let found = work.good("list . --json").json();
    let expected = ["full.mem", "d1.mem", "branch.mem", "d2.mem", "other.mem"];
    assert_eq!(files(&found), expected.map(|name| format!("./{name}")));
    let (full, d1) = (&found[0]["images"][0], &found[0]["images"][1]);
    assert_eq!((&full["kind"], &full["depth"]), (&"full".into(), &0.into()));
    assert_eq!(d1["parent"], full["id"]);
    assert_eq!(
        (&d1["parent_file"], &d1["depth"]),
        (&full["file"], &1.into())
    );
    assert_eq!(d1["ram_bytes"], RAM);
    let file = fs::metadata(work.path("d1.mem")).unwrap();
    assert_eq!(d1["file_bytes"], file.len());
    assert_eq!(found[0]["other_files"], 3);
}

#[test]
fn what_is_missing_or_damaged_in_a_directory_is_named() {
    let work = Work::with_chain();
    fs::remove_file(work.path("d1.mem")).unwrap();
    let end = work.read("full.mem").len() - 100;
    work.rot("full.mem", end);
    let found = work.run("list .");
    assert_eq!(found.code, Some(1), "{found:?}");
    assert!(found.out.contains("d2.mem: packed diff") && found.out.contains("NOT LINKED"));
    assert!(found.out.contains("full.mem: UNUSABLE: "), "{found:?}");
    let json = work.run("list . --json").json();
    assert_eq!(json[0]["unusable"][0]["file"], "./full.mem");
    assert!(json[0]["images"][0]["parent_file"].is_null(), "{json}");
    work.fails("list none", 3, &["none", "No such file"]);
}

#[rstest]
#[case::by_name("d2.mem")]
#[case::by_path("chain/d2.mem")]
fn the_newest_image_is_enough(#[case] newest: &str) {
    let work = with_directory();
    let found = work
        .good(&format!("verify --chain chain {newest} --json"))
        .json();
    assert_eq!(found["files"].as_array().unwrap().len(), 3);
    assert_eq!(found["links"]["state"], "good");
    work.good(&format!("restore --chain chain {newest} -o out"));
    work.assert_same("out", "ram");
    work.good(&format!("diff --chain chain {newest} --ram ram"));
    work.good(&format!("merge --chain chain {newest} -o merged.mem"));
    work.good("diff merged.mem --ram ram");
    let info = work
        .good(&format!("info --chain chain {newest} --json"))
        .json();
    assert_eq!(info[2]["kind"], "diff");
    let map = work
        .good(&format!("map --chain chain {newest} --json"))
        .json();
    assert_eq!(map.as_array().unwrap().len(), 3);
    // By its id, too.
    let id = info[1]["id"].as_str().unwrap();
    work.good(&format!("restore --chain chain {id} -o older"));
    work.assert_same("older", "second");
}

#[test]
fn a_chain_that_is_not_found_is_an_error() {
    let work = with_directory();
    work.good("dump ram -o chain/raw --layout raw");
    let restore = |files: &str| format!("restore --chain chain {files} -o out");
    work.run(&restore("d1.mem d2.mem"))
        .fails(2, &["--chain", "only the newest"]);
    work.run(&restore("none.mem"))
        .fails(3, &["none.mem", "No such file"]);
    work.run(&restore("raw")).fails(2, &["raw", "no id"]);
    fs::remove_file(work.path("chain/d1.mem")).unwrap();
    work.run(&restore("d2.mem"))
        .fails(1, &["d2.mem", "no file in \"chain\""]);
}

/// A full image is preferred to a diff of the same id, and what leads back to an old state is not
/// taken for what it builds on.
#[test]
fn several_files_of_one_state_are_no_obstacle() {
    let work = with_directory();
    work.good("diff --chain chain d2.mem --to chain/full.mem --to chain/d1.mem -o chain/back.mem");
    work.copy("ram", "before");
    work.change(100, 1);
    work.good("diff --chain chain back.mem --ram ram -o chain/a3.mem");
    work.good("restore --chain chain a3.mem -o out");
    work.assert_same("out", "ram");
    work.good("merge --chain chain d1.mem -o chain/merged.mem");
    let found = work.good("verify --chain chain a3.mem --json").json();
    assert_eq!(found["files"][0]["file"], "chain/merged.mem", "{found}");
    assert_eq!(found["files"].as_array().unwrap().len(), 2);
    work.good("restore --chain chain d2.mem -o older");
    work.assert_same("older", "before");
}

/// Two diffs may follow each other without a full image.
#[test]
fn a_loop_of_diffs_is_listed_and_refused() {
    let work = with_directory();
    work.good("diff --chain chain d2.mem --to chain/full.mem --to chain/d1.mem -o chain/back.mem");
    for name in ["chain/full.mem", "chain/d1.mem"] {
        fs::remove_file(work.path(name)).unwrap();
    }
    let found = work.run("list chain --json").json();
    assert_eq!(files(&found).len(), 2, "{found}");
    let restored = work.run("restore --chain chain d2.mem -o out");
    restored.fails(1, &["no file in \"chain\""]);
}

#[test]
fn bytes_are_printed_by_address() {
    let work = Work::empty();
    let ram = work.create("ram", RAM);
    ram.write_all_at(b"RAM of a guest.\n", 2 << 20).unwrap();
    let regions = "--region-at 0:2MiB --region-at 0x100000000:6MiB";
    work.good(&format!("dump ram -o full.mem {regions}"));
    let text = work.good("cat full.mem --at 0x100000000 --len 64").out;
    assert_eq!(
        text,
        "0000000100000000  52 41 4d 20 6f 66 20 61  20 67 75 65 73 74 2e 0a  |RAM of a guest..|\n\
         0000000100000010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n\
         *\n\
         0000000100000040\n"
    );
    let bytes = work
        .good("cat full.mem --at 0x100000004 --len 5 --bytes")
        .out;
    assert_eq!(bytes, "of a ");
    // A raw image begins at address 0.
    let raw = work.good("cat raw:ram --at 0x200000 --len 3 --bytes").out;
    assert_eq!(raw, "RAM");
    let gap = "cat full.mem --at 0x1ffff0 --len 32";
    work.fails(gap, 2, &["0x1ffff0..0x200010", "0x0:2MiB 0x100000000:6MiB"]);
    work.fails("cat full.mem", 2, &["--at"]);
}

#[test]
fn bytes_are_those_of_the_newest_image() {
    let work = Work::with_chain();
    for (files, state) in [("full.mem", "first"), ("full.mem d1.mem d2.mem", "ram")] {
        let at = 9 * PAGE as usize;
        let command = format!("cat {files} --at {at:#x} --len {:#x} --bytes", 5 * PAGE);
        let output = work.command(&command).output().unwrap();
        assert!(
            output.stdout == work.read(state)[at..at + 5 * PAGE as usize],
            "{files}"
        );
    }
    // A diff alone does not have the other pages.
    work.run("cat d1.mem --at 0")
        .fails(2, &["d1.mem", "the full image"]);
    // More than one piece.
    let all = work
        .command("cat full.mem --at 0 --len 8MiB --bytes")
        .output()
        .unwrap();
    assert!(all.stdout == work.read("first"));
}

#[test]
fn metadata_is_extracted_as_it_was_stored() {
    let work = Work::with_ram();
    let state: Vec<u8> = (0..=255).collect();
    fs::write(work.path("vcpus"), &state).unwrap();
    work.good("dump ram -o full.mem --metadata vcpus");
    work.good("diff full.mem --ram ram -o d1.mem");
    let written = work.good("metadata full.mem -o out").out;
    assert_eq!(written, "out: 256 B of metadata\n");
    work.assert_same("out", "vcpus");
    let printed = work.command("metadata full.mem").output().unwrap();
    assert!(printed.status.success() && printed.stdout == state);
    work.fails("metadata full.mem -o out", 2, &["--force"]);
    work.good("metadata full.mem -o out --force");
    work.fails(
        "metadata full.mem -o full.mem --force",
        2,
        &["one of the inputs"],
    );
    work.fails("metadata d1.mem -o none", 1, &["d1.mem", "no metadata"]);
    work.fails("metadata raw:ram -o none", 1, &["ram", "no metadata"]);
}

#[test]
fn states_are_compared_by_address_and_metadata() {
    let work = Work::with_ram();
    fs::write(work.path("one"), "registers").unwrap();
    let regions = "--region-at 0:4MiB --region-at 0x100000000:4MiB";
    work.good(&format!("dump ram -o full.mem --metadata one {regions}"));
    work.change(1023, 2);
    work.change(7, 1);
    fs::write(work.path("one"), "Registers").unwrap();
    work.good("diff full.mem --ram ram -o d1.mem --metadata one");
    let same = work.good("compare full.mem full.mem");
    assert_eq!(same.out, "the same\n");
    let compare = "compare full.mem --to full.mem --to d1.mem";
    let found = work.run(compare);
    assert_eq!(found.code, Some(1), "{found:?}");
    assert_eq!(
        found.out,
        "3 pages differ: 12.00 KiB in 3 runs\n  \
         0x7000..0x8000, 4.00 KiB\n  \
         0x3ff000..0x400000, 4.00 KiB\n  \
         0x100000000..0x100001000, 4.00 KiB\n\
         the metadata differs\n"
    );
    let short = work.run(&format!("{compare} --most 1")).out;
    assert!(short.contains("and 2 more"), "{short}");
    let json = work.run(&format!("{compare} --json")).json();
    assert_eq!((&json["same"], &json["pages"]), (&false.into(), &3.into()));
    assert_eq!(json["metadata_differs"], true);
    let run = &json["runs"][2];
    assert_eq!(run["guest_address"], 4_u64 << 30);
    assert_eq!(
        (&run["offset"], &run["bytes"]),
        (&(4_u64 << 20).into(), &PAGE.into())
    );
    // In a directory, two newest images are enough.
    let found = work.run("compare --chain . full.mem d1.mem");
    assert_eq!(found.code, Some(1), "{found:?}");
    work.create("small", RAM / 2);
    work.run("compare full.mem raw:small")
        .fails(1, &["different guests"]);
    work.run("compare full.mem")
        .fails(2, &["name the other state"]);
}

/// Hidden files are those of writers, and directories have no images.
#[test]
fn only_visible_files_are_listed() {
    let work = Work::with_chain();
    work.copy("full.mem", ".hidden.mem");
    fs::create_dir(work.path("dir.mem")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(work.path("socket")).unwrap();
    File::create(work.path("empty")).unwrap();
    let found = work.good("list . --json").json();
    assert_eq!(files(&found), ["./full.mem", "./d1.mem", "./d2.mem"]);
    // `ram`, `first`, `second` and the empty file.
    assert_eq!(found[0]["other_files"], 4);
}

#[cfg(target_os = "linux")]
#[test]
fn bytes_are_not_printed_to_a_terminal() {
    let work = Work::with_chain();
    for command in ["cat full.mem --at 0 --bytes", "metadata full.mem"] {
        let terminal = nix::pty::openpty(None, None).unwrap();
        let mut run = work.command(command);
        run.stdout(terminal.slave)
            .stderr(std::process::Stdio::piped());
        let output = run.spawn().unwrap().wait_with_output().unwrap();
        let ended = support::Ended {
            code: output.status.code(),
            out: String::new(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        ended.fails(2, &["terminal", "redirect"]);
    }
}

#[test]
fn damage_is_no_difference_of_two_states() {
    let work = Work::with_chain();
    work.copy("full.mem", "copy.mem");
    work.rot("copy.mem", 5000);
    work.fails("compare full.mem copy.mem", 1, &["copy.mem", "damaged"]);
    let found = work.run("compare full.mem copy.mem --no-verify");
    assert!(found.out.starts_with("1 page differs"), "{found:?}");
    let work = Work::with_chain();
    work.rot("d1.mem", 5000);
    let compacted = work.run("compact . --keep 1");
    assert_eq!((compacted.code, &*compacted.out), (Some(1), ""));
}

#[test]
fn metadata_is_found_in_a_directory() {
    let work = Work::with_chain();
    fs::write(work.path("vcpus"), "registers").unwrap();
    fs::create_dir(work.path("dir")).unwrap();
    work.good("diff full.mem d1.mem d2.mem --ram first -o dir/d3.mem --metadata vcpus");
    // The images below are elsewhere.
    work.good("metadata --chain dir d3.mem -o by-name");
    let id = work.good("info dir/d3.mem --json").json()[0]["id"].clone();
    let id = id.as_str().unwrap();
    work.good(&format!("metadata --chain dir {id} -o by-id"));
    work.assert_same("by-name", "vcpus");
    work.assert_same("by-id", "vcpus");
    let none = work.run("metadata --chain dir none -o out");
    none.fails(3, &["none"]);
}

/// As the segments of an ELF core are.
#[test]
fn adjacent_regions_are_the_same_ram_as_one() {
    let work = Work::with_ram();
    let split = "--region-at 0:4MiB --region-at 0x400000:4MiB";
    work.good(&format!("dump ram -o split.mem {split}"));
    work.good("dump ram -o whole.mem --region-at 0:8MiB");
    work.good("compare split.mem whole.mem");
    work.change(3, 1);
    work.good("diff split.mem --ram ram -o d1.mem --region-at 0:8MiB");
    work.good("rebase split.mem d1.mem --onto whole.mem");
    work.good("restore whole.mem d1.mem -o out");
    work.assert_same("out", "ram");
}
