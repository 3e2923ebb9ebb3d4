//! The results of every verb, byte for byte.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rstest::rstest;
use support::{PAGE, RAM, Work};

#[rstest]
fn a_chain_restores_to_the_ram_in_every_layout(#[values("raw", "sealed", "packed")] layout: &str) {
    let work = Work::with_ram();
    work.good(&format!("dump ram -o full.mem --layout {layout}"));
    work.change(10, 5);
    work.zero(20);
    let format = match layout {
        "raw" => "--format raw",
        _ => "--format auto",
    };
    work.good(&format!(
        "diff full.mem --ram ram -o d1.mem --layout {layout} {format}"
    ));
    work.change(1500, 1);
    work.good(&format!(
        "diff full.mem d1.mem --ram ram -o d2.mem --layout {layout} {format}"
    ));
    work.good(&format!("restore full.mem d1.mem d2.mem -o out {format}"));
    work.assert_same("out", "ram");
    work.good(&format!("diff full.mem d1.mem d2.mem --ram ram {format}"));
}

#[test]
fn a_full_image_omits_zeros_unless_keep_zeros_is_given() {
    let work = Work::with_ram();
    work.good("dump ram -o sparse.mem");
    work.good("dump ram -o dense.mem --keep-zeros");
    let present = |name| {
        let info = work.good(&format!("info {name} --json")).json();
        info[0]["present"]["bytes"].as_u64().unwrap()
    };
    assert_eq!(present("sparse.mem"), 115 * PAGE);
    assert_eq!(present("dense.mem"), RAM);
    work.good("diff sparse.mem dense.mem");
}

#[test]
fn images_are_for_their_owner_alone() {
    let work = Work::with_chain();
    let mode = fs::metadata(work.path("full.mem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn info_says_what_a_chain_is() {
    let work = Work::with_chain();
    let info = work
        .good("info full.mem d1.mem d2.mem raw:ram --json")
        .json();
    assert_eq!(info[0]["kind"], "full");
    assert_eq!(info[0]["layout"], "packed");
    assert_eq!(info[0]["ram_bytes"], RAM);
    assert_eq!(info[0]["page_bytes"], PAGE);
    assert_eq!(info[1]["kind"], "diff");
    assert_eq!(info[1]["parent"], info[0]["id"]);
    assert_eq!(info[2]["parent"], info[1]["id"]);
    // Five pages and one of zeros.
    assert_eq!(info[1]["present"]["bytes"], 5 * PAGE);
    assert_eq!(info[1]["present"]["runs"], 1);
    assert_eq!(info[1]["zero"]["bytes"], PAGE);
    assert_eq!(info[1]["clean"]["bytes"], RAM - 6 * PAGE);
    assert_eq!(info[3]["layout"], "raw");
    let file = fs::metadata(work.path("d1.mem")).unwrap();
    assert_eq!(info[1]["file_bytes"], file.len());
    assert_eq!(info[1]["allocated_bytes"], file.blocks() * 512);

    let text = work.good("info d1.mem raw:ram").out;
    let id = info[0]["id"].as_str().unwrap();
    assert!(text.contains(&format!("parent    {id}")), "{text}");
    assert!(text.contains("present   20.00 KiB in 1 run"), "{text}");
    assert!(text.contains("ram: raw image"), "{text}");
}

#[test]
fn results_keep_regions_and_the_metadata_of_their_state() {
    let work = Work::with_ram();
    fs::write(work.path("vcpus"), "registers").unwrap();
    let regions = "--region-at 0:2MiB --region-at 0x100000000:6MiB";
    work.good(&format!("dump ram -o full.mem --metadata vcpus {regions}"));
    work.good("convert full.mem -o sealed.mem --layout sealed");
    work.change(3, 1);
    work.good("diff sealed.mem --ram ram -o d1.mem");
    work.good("merge sealed.mem d1.mem -o merged.mem");
    let info = work
        .good("info full.mem sealed.mem d1.mem merged.mem --json")
        .json();
    for image in 0..4 {
        assert_eq!(info[image]["regions"][1]["guest_address"], 4_u64 << 30);
    }
    assert_eq!(info[0]["metadata_bytes"], 9);
    assert_eq!(info[1]["metadata_bytes"], 9);
    // The metadata of the newest state, which has none.
    assert_eq!(info[3]["metadata_bytes"], 0);
    assert_eq!(info[1]["id"], info[0]["id"]);
    assert_eq!(info[3]["id"], info[2]["id"]);
}

#[test]
fn verify_names_the_damage_and_goes_on_with_the_other_files() {
    let work = Work::with_chain();
    let good = work.good("verify full.mem d1.mem d2.mem --json").json();
    assert_eq!(
        (&good["good"], &good["links"]["state"]),
        (&true.into(), &"good".into())
    );

    work.rot("full.mem", 71 * 4096);
    let found = work.run("verify full.mem d1.mem --json");
    assert_eq!(found.code, Some(1));
    let found = found.json();
    assert_eq!(found["files"][0]["state"], "damaged");
    assert_eq!(found["files"][0]["found"], 1);
    let damage = &found["files"][0]["damages"][0];
    // Behind the header, page 70 of the file is in the third range: page 2003 of the RAM, chunk 7.
    assert_eq!(
        (&damage["chunk"], &damage["guest_start"]),
        (&7.into(), &(7 << 20).into())
    );
    assert_eq!(found["files"][1]["state"], "whole");

    let text = work.run("verify full.mem d1.mem");
    assert_eq!(text.code, Some(1));
    assert!(
        text.out.contains("full.mem: DAMAGED in 1 place"),
        "{text:?}"
    );
    assert!(text.out.contains("RAM 0x700000..0x800000"), "{text:?}");
    assert!(text.out.contains("d1.mem: whole"), "{text:?}");
}

#[rstest]
#[case::between_the_pages("sealed", 5 << 20, "0x500000 in the file: not zero")]
#[case::in_the_footer("packed", usize::MAX, "UNUSABLE")]
fn verify_finds_damage_outside_of_pages(
    #[case] layout: &str,
    #[case] at: usize,
    #[case] says: &str,
) {
    let work = Work::with_ram();
    work.good(&format!("dump ram -o full.mem --layout {layout}"));
    let at = at.min(work.read("full.mem").len() - 100);
    work.rot("full.mem", at);
    let found = work.run("verify full.mem");
    assert_eq!(found.code, Some(1), "{found:?}");
    assert!(found.out.contains(says), "{found:?}");
}

#[test]
fn a_raw_image_cannot_be_verified_unless_that_is_allowed() {
    let work = Work::with_chain();
    let found = work.run("verify raw:ram");
    assert_eq!(found.code, Some(1));
    assert!(found.out.contains("no checksums"), "{found:?}");
    work.good("verify raw:ram --allow-raw");
}

#[test]
fn the_next_diff_fits_on_the_result_of_a_merge_in_place() {
    let work = Work::with_chain();
    work.good("merge --in-place full.mem d1.mem");
    work.good("verify full.mem d2.mem");
    work.good("restore full.mem d2.mem -o out");
    work.assert_same("out", "ram");
    work.good("diff full.mem --ram second");
}

#[test]
fn diffs_alone_become_one_diff() {
    let work = Work::with_chain();
    work.good("merge d1.mem d2.mem -o both.mem --layout sealed");
    let info = work.good("info full.mem both.mem d2.mem --json").json();
    assert_eq!(info[1]["kind"], "diff");
    assert_eq!(info[1]["layout"], "sealed");
    assert_eq!(info[1]["parent"], info[0]["id"]);
    assert_eq!(info[1]["id"], info[2]["id"]);
    work.good("restore full.mem both.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn raw_chains_merge_if_holes_are_reliable_or_trusted() {
    let work = Work::with_ram();
    work.good("dump ram -o full.raw --layout raw");
    work.change(10, 5);
    work.good("diff raw:full.raw --ram ram -o d1.raw --layout raw");
    work.change(1500, 1);
    work.good("diff raw:full.raw raw:d1.raw --ram ram -o d2.raw --layout raw");
    work.good("merge --format raw full.raw d1.raw d2.raw -o out");
    work.assert_same("out", "ram");
    work.good("merge --raw-diffs d1.raw d2.raw -o both.raw");
    work.good("restore raw:full.raw raw:both.raw -o again");
    work.assert_same("again", "ram");

    // A copy that filled the holes.
    fs::write(work.path("filled.raw"), work.read("d1.raw")).unwrap();
    let refused = "merge --format raw full.raw filled.raw -o no";
    work.fails(refused, 1, &["filled.raw", "no holes", "--trust-holes"]);
    let warned = work.good("merge --format raw full.raw filled.raw -o filled --trust-holes");
    assert!(
        warned.err.contains("warning") && warned.err.contains("filled.raw"),
        "{warned:?}"
    );
}

#[rstest]
fn an_image_is_the_same_in_every_layout(
    #[values("raw", "sealed", "packed")] from: &str,
    #[values("raw", "sealed", "packed")] to: &str,
) {
    let work = Work::with_ram();
    work.good(&format!("dump ram -o one --layout {from}"));
    let prefix = |layout| if layout == "raw" { "raw:" } else { "" };
    let (one, other) = (prefix(from), prefix(to));
    work.good(&format!("convert {one}one -o other --layout {to}"));
    work.good(&format!("diff {other}other --ram ram"));
    let info = work
        .good(&format!("info {one}one {other}other --json"))
        .json();
    assert_eq!(info[1]["layout"], to);
    match (from, to) {
        (_, "raw") => work.assert_same("other", "ram"),
        // A raw image has no id, so the result gets a new one.
        ("raw", _) => assert!(info[1]["id"].is_string()),
        _ => assert_eq!(info[0]["id"], info[1]["id"]),
    }
}

#[test]
fn pages_of_a_full_image_may_grow_and_those_of_a_diff_may_not() {
    let work = Work::with_chain();
    work.good("convert full.mem -o large.mem --page-size 16KiB");
    work.good("convert large.mem -o small.mem --page-size 4KiB");
    work.good("diff large.mem --ram first");
    work.good("diff small.mem --ram first");
    let info = work.good("info large.mem small.mem --json").json();
    assert_eq!(
        (&info[0]["page_bytes"], &info[1]["page_bytes"]),
        (&16384.into(), &4096.into())
    );
    work.good("convert d1.mem -o fine.mem --page-size 1KiB");
    work.good("verify full.mem d1.mem");
    work.fails("convert d1.mem -o no --page-size 16K", 2, &["larger pages"]);
}

#[test]
fn a_raw_diff_is_sealed_onto_its_parent() {
    let work = Work::with_ram();
    work.good("dump ram -o full.raw --layout raw");
    work.change(10, 5);
    work.good("diff raw:full.raw --ram ram -o d1.raw --layout raw");
    work.good("convert raw:full.raw -o full.mem --layout sealed");
    work.good("convert d1.raw --raw-diff --parent full.mem -o d1.mem --layout packed");
    work.good("verify full.mem d1.mem");
    work.good("restore full.mem d1.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn a_diff_leads_from_any_state_to_any_other() {
    let work = Work::with_chain();
    work.good("merge full.mem d1.mem d2.mem -o now.mem");
    // From one image to another, and back to an older state through a chain.
    work.good("diff full.mem now.mem -o there.mem");
    work.good("diff now.mem --to full.mem --to d1.mem -o back.mem");
    work.good("restore full.mem there.mem -o one");
    work.assert_same("one", "ram");
    work.good("restore now.mem back.mem -o other");
    work.assert_same("other", "second");
    // The new state may also be a diff on top of the old state.
    work.good("diff full.mem d1.mem -o again.mem");
    work.good("restore full.mem again.mem -o third");
    work.assert_same("third", "second");
    let info = work.good("info d1.mem again.mem --json").json();
    assert_eq!(info[0]["id"], info[1]["id"]);
    assert_eq!(info[0]["present"], info[1]["present"]);
}

#[test]
fn without_an_output_a_diff_says_what_differs() {
    let work = Work::with_chain();
    let same = work.good("diff full.mem --ram first");
    assert_eq!(same.out, "the same\n");
    let found = work.run("diff full.mem d1.mem --ram ram");
    assert_eq!(found.code, Some(1));
    assert_eq!(found.out, "3 pages differ: 12.00 KiB in 2 runs\n");
    let found = work.run("diff full.mem d1.mem --ram ram --json").json();
    assert_eq!(found["pages"], 3);
    assert_eq!(found["runs"][1]["offset"], 1500 * PAGE);
}

#[test]
fn the_former_name_of_dump_works_and_is_hidden() {
    let work = Work::with_ram();
    work.good("full ram -o full.mem");
    work.good("diff full.mem --ram ram");
    let help = work.good("--help").out;
    let is_verb = |name: &str| help.lines().any(|line| line.trim_start().starts_with(name));
    assert!(is_verb("dump ") && !is_verb("full "), "{help}");
    assert!(!help.contains("alias"), "{help}");
}

#[test]
fn quiet_verbs_print_nothing() {
    let work = Work::with_ram();
    let quiet = work.good("-q dump ram -o full.mem");
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("", ""));
    // Requested output is printed nevertheless.
    assert!(
        work.good("info full.mem --quiet")
            .out
            .contains("full image")
    );
}

#[test]
fn the_demo_succeeds_and_removes_its_files() {
    let work = Work::empty();
    let tmp = work.path("");
    let demo = support::Ended::of(work.command("demo").env("TMPDIR", &tmp)).good();
    assert!(
        demo.out.contains("Everything was as it should be."),
        "{demo:?}"
    );
    assert_eq!(work.files(), [""; 0]);
    work.good("demo --keep kept");
    assert!(support::list(&work.path("kept")).contains(&"merged.mem".to_owned()));
}

#[test]
fn manual_pages_and_completions_know_every_verb() {
    let work = Work::empty();
    work.good("man pages/man1");
    let pages = support::list(&work.path("pages/man1"));
    let completions = work.good("completions bash").out;
    for verb in [
        "info", "verify", "map", "list", "compare", "cat", "metadata", "dump", "diff", "merge",
        "commit", "rebase", "compact", "convert", "restore", "sweep", "demo",
    ] {
        assert!(pages.contains(&format!("ramsnap-{verb}.1")), "{pages:?}");
        assert!(completions.contains(verb));
    }
    let page = fs::read_to_string(work.path("pages/man1/ramsnap.1")).unwrap();
    assert!(
        page.contains("Exit status") && page.contains("130"),
        "{page}"
    );
}

#[test]
fn every_verb_has_an_example_in_its_help() {
    let work = Work::empty();
    let help = work.good("--help").out;
    assert!(help.contains("A tour:") && help.contains("Exit status:"));
    let verbs = help
        .split("Commands:")
        .nth(1)
        .unwrap()
        .split("Global options:")
        .next()
        .unwrap();
    let verbs: Vec<_> = verbs
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|verb| !verb.is_empty() && *verb != "help")
        .collect();
    assert!(verbs.len() >= 12, "{verbs:?}");
    for verb in verbs {
        let help = work.good(&format!("{verb} --help")).out;
        assert!(
            help.contains(&format!("  ramsnap {verb} ")) || help.contains("  ramsnap demo"),
            "{help}"
        );
    }
}
