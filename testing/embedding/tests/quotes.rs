//! Code that a guide quotes from a file is in that file.

use std::fs;
use std::path::Path;

/// Begins a comment, which names the file of the next block of code.
const QUOTE: &str = "<!-- quoted from ";

/// Returns the lines without the indentation that all of them share.
fn dedented(text: &str) -> String {
    let indents = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.len() - line.trim_start().len());
    let shared = indents.min().unwrap_or(0);
    let lines = text
        .lines()
        .map(|line| line.get(shared..).unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the part of `source` from the first to the last line of `quote`, if it is equal to it.
fn is_in(quote: &str, source: &str) -> bool {
    let quote: Vec<_> = quote.lines().collect();
    let source: Vec<_> = source.lines().collect();
    source
        .windows(quote.len())
        .any(|window| dedented(&window.join("\n")) == dedented(&quote.join("\n")))
}

#[test]
fn quoted_code_is_in_the_file_that_the_guide_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut quotes = 0;
    for guide in fs::read_dir(root.join("docs/guides")).unwrap() {
        let guide = guide.unwrap().path();
        let text = fs::read_to_string(&guide).unwrap();
        for part in text.split(QUOTE).skip(1) {
            let (file, rest) = part.split_once(" -->").unwrap();
            let block = rest.split("```").nth(1).unwrap();
            let (_, quote) = block.split_once('\n').unwrap();
            let source = fs::read_to_string(root.join(file)).unwrap();
            assert!(
                is_in(quote, &source),
                "{}: {file}:\n{quote}",
                guide.display()
            );
            quotes += 1;
        }
    }
    assert!(quotes > 0, "no guide quotes a file");
}

#[test]
fn a_quote_that_differs_in_a_word_is_detected() {
    let source = "fn a() {\n    one();\n    two();\n}\n";
    assert!(is_in("one();\ntwo();\n", source));
    assert!(!is_in("one();\nthree();\n", source));
}
