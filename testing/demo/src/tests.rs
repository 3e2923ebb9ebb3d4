//! The demo's guests agree with the oracle, and its proof fails where it must.

use std::fs::File;
use std::os::unix::fs::FileExt;

use guests::guest::Guest;
use guests::kind::Kind;
use guests::ledger::{ENTRY, Layout, NO_PAGE, PAGE};
use rstest::rstest;

use super::report::Progress;
use super::restore::Files;
use super::{Outcome, Plan, Story, oracle, ram_size};

const RAM: u64 = 8 << 20;

/// The virtual machine of this system.
const MACHINE: Kind = if cfg!(target_os = "macos") {
    Kind::Hvf
} else {
    Kind::Kvm
};

fn here(kind: Kind, test: &str) -> bool {
    kind.need().is_none_or(|need| need.met(test))
}

fn booted(kind: Kind, layout: Layout) -> Box<dyn Guest> {
    let mut guest = kind.create(layout).unwrap();
    guest.boot().unwrap();
    guest
}

/// A small demo whose files are tampered with before they are restored.
fn demo(kind: Kind, tamper: impl FnOnce(&mut Files)) -> Story {
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan {
        kind,
        layout: Layout::of(RAM),
        rounds: 3,
        steps: 500,
        dir: dir.path(),
    };
    let tamper = |files: &mut Files| {
        tamper(files);
        Ok(())
    };
    plan.carry_out(&Progress::hidden(), tamper).unwrap()
}

/// The first page of the ledger is a hot one: it is in every diff.
fn hot_page(file: &File) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    file.read_exact_at(&mut page, Layout::LEDGER).unwrap();
    page
}

fn open(path: &std::path::Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[rstest]
fn every_guest_agrees_with_the_oracle(
    #[values(MACHINE, Kind::Userfaultfd, Kind::Mprotect)] kind: Kind,
    #[values(0, 1, 10_000)] steps: u64,
) {
    if !here(kind, "every_guest_agrees_with_the_oracle") {
        return;
    }
    let layout = Layout::of(RAM);
    let mut guest = booted(kind, layout);
    guest.track().unwrap();
    guest.work_until(steps).unwrap();
    let verdict = guest.check().unwrap();
    assert_eq!((verdict.faults, verdict.first_fault), (0, NO_PAGE));
    assert_eq!(verdict, oracle::verdict(layout, steps));
}

#[rstest]
fn a_restored_guest_is_the_original_and_goes_on_like_it(
    #[values(MACHINE, Kind::Userfaultfd, Kind::Mprotect)] kind: Kind,
) {
    if !here(kind, "a_restored_guest_is_the_original_and_goes_on_like_it") {
        return;
    }
    let story = demo(kind, |_| ());
    assert_eq!(story.proof.mismatches, [""; 0]);
    assert_eq!(story.table.len(), 4);
    for snapshot in &story.table {
        assert!(
            snapshot.dirty_pages > 0 && snapshot.written > 0,
            "{snapshot:?}"
        );
        assert!(snapshot.durable > snapshot.paused, "{snapshot:?}");
    }
    let diff = &story.table[3];
    assert!(
        diff.written < RAM / 2,
        "a diff holds what was dirtied: {diff:?}"
    );
}

#[rstest]
#[case::a_byte_of_the_last_diff_flipped(
    |files: &mut Files| {
        let diff = open(&files.diffs.last().unwrap().path);
        let byte = hot_page(&diff)[ENTRY as usize];
        diff.write_all_at(&[byte ^ 1], Layout::LEDGER + ENTRY).unwrap();
    },
    &["1 pages of the restored RAM differ", "restored guest found", "number 0 of its ledger", "restored guest's digest"]
)]
#[case::a_page_of_an_older_snapshot(
    |files: &mut Files| {
        let [.., older, last] = files.diffs.as_slice() else { panic!("two diffs") };
        open(&last.path).write_all_at(&hot_page(&open(&older.path)), Layout::LEDGER).unwrap();
    },
    &["1 pages of the restored RAM differ", "restored guest found", "number 0 of its ledger", "restored guest's digest"]
)]
#[case::a_diff_left_out(
    |files: &mut Files| drop(files.diffs.remove(0)),
    &["of the restored RAM differ", "restored guest found", "restored guest's digest"]
)]
#[case::the_last_diff_left_out(
    |files: &mut Files| drop(files.diffs.pop()),
    &["of the restored RAM differ", "restored guest's digest"]
)]
#[case::diffs_in_the_wrong_order(
    |files: &mut Files| files.diffs.reverse(),
    &["of the restored RAM differ", "restored guest's digest"]
)]
#[case::the_vcpu_state_of_an_older_snapshot(
    |files: &mut Files| files.processor = files.diffs[1].path.with_extension("vcpu"),
    &["restored guest's digest"]
)]
fn the_proof_fails_for(
    #[values(MACHINE, Kind::Mprotect)] kind: Kind,
    #[case] tamper: fn(&mut Files),
    #[case] expected: &[&str],
) {
    if !here(kind, "the_proof_fails_for") {
        return;
    }
    let story = demo(kind, tamper);
    let said = story.proof.mismatches.join("; ");
    for part in expected {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    assert!(!said.contains("the original guest"), "{said}");
    let closing = Box::new(story).close().unwrap_err().to_string();
    assert!(closing.starts_with("not verified: "), "{closing}");
}

#[rstest]
fn a_guest_notices_a_page_that_is_not_what_it_wrote(
    #[values(MACHINE, Kind::Userfaultfd, Kind::Mprotect)] kind: Kind,
) {
    if !here(kind, "a_guest_notices_a_page_that_is_not_what_it_wrote") {
        return;
    }
    let layout = Layout::of(RAM);
    let mut guest = booted(kind, layout);
    guest.work_until(100).unwrap();
    let mut old = vec![0; PAGE as usize];
    page_reader::PageReader::read_at(&guest.ram(), layout.page(7), &mut old).unwrap();
    guest.work_until(1000).unwrap();

    guest.write(layout.page(7), &old).unwrap();
    let verdict = guest.check().unwrap();
    assert_eq!(
        (verdict.faults, verdict.first_fault),
        (1, 7),
        "a whole page of an older state"
    );
    guest.write(layout.page(3) + PAGE - 1, &[0xee]).unwrap();
    let verdict = guest.check().unwrap();
    assert_eq!(
        (verdict.faults, verdict.first_fault),
        (3, 7),
        "and a corrupted checksum"
    );
}

#[rstest]
#[case::in_binary_units("256M", 256 << 20)]
#[case::iec("4GiB", 4 << 30)]
#[case::with_a_fraction("1.5G", 3 << 29)]
#[case::in_bytes("8388608", 8 << 20)]
fn ram_may_be_given(#[case] text: &str, #[case] bytes: u64) {
    assert_eq!(ram_size(text), Ok(bytes));
}

#[rstest]
#[case::too_small("1M", "at least 4.00 MiB")]
#[case::nothing("0", "at least 4.00 MiB")]
#[case::part_of_a_page("8388609", "not a multiple of 64.00 KiB")]
#[case::too_much("1T", "at most 256.00 GiB")]
#[case::past_64_bits("99999999T", "write 256M or 4G")]
#[case::no_size("lots", "write 256M or 4G")]
#[case::negative("-256M", "write 256M or 4G")]
fn ram_is_refused(#[case] text: &str, #[case] why: &str) {
    let error = ram_size(text).unwrap_err();
    assert!(error.contains(why), "{error}");
}

#[test]
fn the_ledger_and_its_index_fill_the_ram_and_no_more() {
    for pages in (1024..4000).chain([65_536, 1 << 20]) {
        let layout = Layout::of(pages * PAGE);
        let end = layout.index() + layout.pages * 8;
        assert!(end <= layout.ram, "{layout:?}");
        assert!(layout.ram - end < 2 * PAGE, "{layout:?}");
    }
}
