//! Events of the feature `tracing`.
#![cfg(all(feature = "tracing", target_os = "linux"))]

mod support;

use std::fs::File;

use page_reader::PageReader;
use support::lazy_images::on_demand;
use support::open_chain;
use test_images::Images;
use test_machine::needs;

/// Returns the number after `field=`.
fn number(line: &str, field: &str) -> u64 {
    let (_, rest) = line.split_once(&format!(" {field}=")).unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

// The only test of this binary: it collects the events of all threads.
#[test]
fn a_restore_reports_its_totals_and_its_failure() {
    needs!(Userfaultfd);
    let events = test_events::capture_all();
    let images = Images::new(4 << 20, 4096).with([0..1000]);
    let options = on_demand().fault_around(1);
    let ram = options.start(open_chain(&images)).unwrap();
    for page in 0..10 {
        ram.read_at(page * 4096, &mut [0]).unwrap();
    }
    ram.wait().unwrap();
    let progress = ram.progress();
    let faults = ram.faults();
    assert!(faults >= 10);
    drop(ram);
    let text = events.text();
    let totals = text.lines().find(|line| line.contains("all pages are in"));
    let totals = totals.unwrap_or_else(|| panic!("no totals in {text}"));
    assert!(totals.contains("INFO lazy_restore: "), "{totals}");
    assert_eq!(number(totals, "faults"), faults);
    let by_faults = number(totals, "bytes_by_faults");
    let by_prefetch = number(totals, "bytes_by_prefetch");
    assert!(by_faults >= 10 * 4096 && by_prefetch > 0, "{totals}");
    assert_eq!(by_faults + by_prefetch, progress.done);
    assert!(totals.contains("elapsed="), "{totals}");

    let ram = options.start(open_chain(&images)).unwrap();
    let base = File::options().write(true).open(images.path(0)).unwrap();
    base.set_len(0).unwrap();
    let error = ram.wait().unwrap_err();
    drop(ram);
    let text = events.text();
    let failed = text
        .lines()
        .find(|line| line.contains("filling has failed"));
    let failed = failed.unwrap_or_else(|| panic!("no failure in {text}"));
    assert!(failed.contains("WARN") && failed.contains(&error.to_string()));
}
