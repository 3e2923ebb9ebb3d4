//! The page of troubleshooting quotes texts that exist.

use std::fs;
use std::path::{Path, PathBuf};

const PAGE: &str = "docs/guides/troubleshooting.md";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Returns the text with each run of white space as one space.
fn normal(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the sources of all crates, with the strings that continue on the next line joined.
fn sources() -> String {
    let mut all = String::new();
    let mut left = vec![workspace().join("crates")];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("tests") {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                all += &fs::read_to_string(path).unwrap();
            }
        }
    }
    normal(&all).replace("\\ ", "")
}

/// Returns the quoted texts: those in bold, and those of the last table.
fn quotes(page: &str) -> Vec<String> {
    let bold = page.split("**\"").skip(1).map(|rest| {
        let (quote, _) = rest.split_once("\"**").expect("the end of a quote");
        quote
    });
    let rows = page.lines().filter_map(|line| line.strip_prefix("| "));
    let cells = rows.filter_map(|row| row.split(" | ").next());
    let in_cells = cells.flat_map(|cell| cell.split('"').skip(1).step_by(2));
    // A text of the system, not of a crate.
    let own = |quote: &&str| *quote != "Function not implemented";
    bold.chain(in_cells.filter(own)).map(normal).collect()
}

#[test]
fn each_quoted_text_exists_in_the_source() {
    let page = fs::read_to_string(workspace().join(PAGE)).unwrap();
    let (quotes, sources) = (quotes(&page), sources());
    assert!(quotes.len() > 80, "{}", quotes.len());
    let parts = quotes.iter().flat_map(|quote| quote.split(" … "));
    let stale: Vec<_> = parts.filter(|part| !sources.contains(part)).collect();
    assert!(
        stale.is_empty(),
        "{PAGE} quotes what no crate prints: {stale:#?}"
    );
}

#[test]
fn a_text_that_no_crate_prints_is_found() {
    let quotes =
        quotes("- **\"no crate\n  prints … this\"**: x.\n| \"nor this\", \"that\" | x |\n");
    assert_eq!(quotes, ["no crate prints … this", "nor this", "that"]);
    assert!(!sources().contains(&quotes[1].replace("nor", "certainly not")));
}
