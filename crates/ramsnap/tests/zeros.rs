//! Zeros that inputs store: no verb writes them again, unless it must or is asked to.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rstest::rstest;
use support::{PAGE, RAM, Work, noise};

/// Writes a file whose zeros are stored too, as Firecracker does.
fn dense(work: &Work, name: &str, ram: u64, in_use: &[(u64, u64)]) {
    let file = work.create(name, 0);
    let zeros = vec![0; 1 << 20];
    for at in (0..ram).step_by(zeros.len()) {
        file.write_all_at(&zeros, at).unwrap();
    }
    for (page, pages) in in_use {
        let bytes = noise(page + 1, pages * PAGE);
        file.write_all_at(&bytes, page * PAGE).unwrap();
    }
}

fn pages(work: &Work, image: &str, kind: &str) -> u64 {
    let info = work.good(&format!("info {image} --json")).json();
    info[0][kind]["bytes"].as_u64().unwrap() / PAGE
}

#[test]
fn a_dense_firecracker_file_becomes_a_small_image() {
    let work = Work::empty();
    let (ram, in_use) = (256 << 20, (8 << 20) / PAGE);
    dense(
        &work,
        "fc.mem",
        ram,
        &[(100, in_use / 2), (40_000, in_use / 2)],
    );
    work.good("convert raw:fc.mem -o packed.mem --layout packed");
    let len = fs::metadata(work.path("packed.mem")).unwrap().len();
    assert!(len < 9 << 20, "{len}");
    assert_eq!(pages(&work, "packed.mem", "present"), in_use);
    work.good("restore packed.mem -o back.mem");
    work.assert_same("fc.mem", "back.mem");
}

#[rstest]
#[case::convert("convert raw:dense -o NAME --layout LAYOUT")]
#[case::merge("merge raw:dense -o NAME --layout LAYOUT")]
#[case::dump("dump dense -o NAME --layout LAYOUT")]
fn zeros_are_stored_only_if_asked_for(
    #[case] verb: &str,
    #[values("sealed", "packed")] layout: &str,
) {
    let work = Work::empty();
    dense(&work, "dense", RAM, &[(8, 20), (1000, 1)]);
    let line = |name| verb.replace("NAME", name).replace("LAYOUT", layout);
    work.good(&line("small"));
    work.good(&(line("large") + " --keep-zeros"));
    assert_eq!(pages(&work, "small", "present"), 21);
    assert_eq!(pages(&work, "large", "present"), RAM / PAGE);
    for image in ["small", "large"] {
        work.good(&format!("restore {image} -o {image}.raw"));
        work.assert_same(&format!("{image}.raw"), "dense");
    }
}

/// A page that became zero is not clean: the state before has other bytes there.
#[rstest]
fn zeros_of_a_diff_are_recorded_as_zeros(#[values("sealed", "packed")] layout: &str) {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    // 40 pages of zeros over data, one page of data, one page of zeros alone.
    let ram = File::options().write(true).open(work.path("ram")).unwrap();
    ram.write_all_at(&vec![0; 40 * PAGE as usize], 10 * PAGE)
        .unwrap();
    ram.write_all_at(&noise(7, PAGE), 50 * PAGE).unwrap();
    ram.write_all_at(&vec![0; PAGE as usize], 701 * PAGE)
        .unwrap();
    work.good("diff full.mem --ram ram -o d1.mem --layout sealed --keep-zeros");
    work.good(&format!("convert d1.mem -o d2.mem --layout {layout}"));
    work.good(&format!(
        "convert d1.mem -o d3.mem --layout {layout} --keep-zeros"
    ));
    assert_eq!(pages(&work, "d2.mem", "present"), 1);
    assert_eq!(pages(&work, "d2.mem", "zero"), 41);
    assert_eq!(
        pages(&work, "d3.mem", "present"),
        pages(&work, "d1.mem", "present")
    );
    for diff in ["d2.mem", "d3.mem"] {
        let clean = RAM / PAGE - 42;
        assert_eq!(pages(&work, diff, "clean"), clean, "{diff}");
        work.good(&format!("restore full.mem {diff} -o {diff}.raw"));
        work.assert_same(&format!("{diff}.raw"), "ram");
    }
}

/// The RAM of a guest whose pages 10 to 49 and 701 became zeros, and page 52 changed.
fn with_zeroed_ram() -> Work {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    let ram = File::options().write(true).open(work.path("ram")).unwrap();
    ram.write_all_at(&vec![0; 40 * PAGE as usize], 10 * PAGE)
        .unwrap();
    ram.write_all_at(&noise(7, PAGE), 52 * PAGE).unwrap();
    ram.write_all_at(&vec![0; PAGE as usize], 701 * PAGE)
        .unwrap();
    work
}

#[rstest]
fn a_diff_records_pages_that_became_zeros(
    #[values("sealed", "packed", "raw")] layout: &str,
    #[values("--ram ram", "--to new.mem")] new: &str,
) {
    let work = with_zeroed_ram();
    work.good("dump ram -o new.mem");
    let diff = |flags: &str, name: &str| {
        let line = format!("diff full.mem {new} -o {name} --layout {layout}{flags}");
        (work.run(&line).code == Some(0)).then(|| match layout {
            "raw" => format!("raw:{name}"),
            _ => name.to_owned(),
        })
    };
    let (Some(small), Some(large)) = (diff("", "small"), diff(" --keep-zeros", "large")) else {
        assert_eq!(layout, "raw");
        return;
    };
    let (stored, in_footer) = if layout == "raw" { (42, 0) } else { (1, 41) };
    for (name, expected) in [(&small, (stored, in_footer)), (&large, (42, 0))] {
        assert_eq!(pages(&work, name, "present"), expected.0, "{name}");
        // Alone, a raw diff is read as a full image.
        if layout != "raw" {
            assert_eq!(pages(&work, name, "zero"), expected.1, "{name}");
            assert_eq!(pages(&work, name, "clean"), RAM / PAGE - 42);
        }
        work.good(&format!("restore full.mem {name} -o out"));
        work.assert_same("out", "ram");
        fs::remove_file(work.path("out")).unwrap();
    }
}

#[test]
fn a_rebased_diff_records_pages_of_zeros() {
    for (flags, expected) in [("", (1, 41)), (" --keep-zeros", (42, 0))] {
        let work = with_zeroed_ram();
        work.good("diff full.mem --ram ram -o d1.mem");
        work.good("diff full.mem d1.mem --ram ram -o d2.mem");
        work.good(&format!(
            "rebase full.mem d1.mem d2.mem --onto full.mem{flags}"
        ));
        let found = ["present", "zero"].map(|kind| pages(&work, "d2.mem", kind));
        assert_eq!((found[0], found[1]), expected);
        work.good("restore full.mem d2.mem -o out");
        work.assert_same("out", "ram");
    }
}

/// A footer would list each of them: they are stored with the pages around them.
#[test]
fn single_pages_of_zeros_between_others_are_stored() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    work.change(0, 20);
    for page in (0..20).step_by(2) {
        work.zero(page);
    }
    work.good("diff full.mem --ram ram -o d1.mem");
    assert_eq!(pages(&work, "d1.mem", "present"), 20);
    work.good("restore full.mem d1.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn a_merge_of_diffs_keeps_the_zeros_of_the_newest() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    work.change(200, 30);
    work.good("diff full.mem --ram ram -o d1.mem");
    let ram = File::options().write(true).open(work.path("ram")).unwrap();
    ram.write_all_at(&vec![0; 30 * PAGE as usize], 200 * PAGE)
        .unwrap();
    work.good("diff full.mem d1.mem --ram ram -o d2.mem --layout sealed");
    work.good("merge d1.mem d2.mem -o both.mem");
    assert_eq!(pages(&work, "both.mem", "present"), 0);
    assert_eq!(pages(&work, "both.mem", "zero"), 30);
    work.good("merge full.mem both.mem -o new.mem --layout raw");
    work.assert_same("new.mem", "ram");
}

/// Only its holes are the clean pages of a raw diff.
#[test]
fn a_raw_diff_stores_its_zeros() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    let ram = File::options().write(true).open(work.path("ram")).unwrap();
    ram.write_all_at(&vec![0; 40 * PAGE as usize], 10 * PAGE)
        .unwrap();
    work.good("diff full.mem --ram ram -o d1.mem --keep-zeros");
    let converted = work.run("convert d1.mem -o d1.raw --layout raw");
    if converted.code != Some(0) {
        // On this file system, no raw diff can be written.
        converted.fails(3, &["d1.raw"]);
        return;
    }
    assert_eq!(pages(&work, "raw:d1.raw", "present"), 40);
}
