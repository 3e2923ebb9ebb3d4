//! The manual pages.

mod support;

use std::fs;

use support::Work;

/// roff fills lines that are not marked.
#[test]
fn examples_of_a_manual_page_are_one_a_line() {
    let work = Work::empty();
    work.good("man out");
    for file in support::list(&work.path("out")) {
        let page = fs::read_to_string(work.path("out").join(&file)).unwrap();
        let mut is_filled = true;
        for line in page.lines() {
            match line {
                ".nf" => is_filled = false,
                ".fi" => is_filled = true,
                _ => assert_eq!(is_filled, !line.starts_with("  "), "{file}: {line}"),
            }
        }
        assert!(is_filled, "{file}");
    }
    let dump = fs::read_to_string(work.path("out/ramsnap-dump.1")).unwrap();
    let (_, examples) = dump.split_once("Examples:\n.nf\n").unwrap();
    assert!(
        examples.starts_with("  ramsnap dump /dev/shm/guest "),
        "{examples}"
    );
}
