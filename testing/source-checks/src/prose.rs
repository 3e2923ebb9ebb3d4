//! The language of comments, documentation, error texts and names: words that the project does not
//! use, and text lines that are too wide.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use regex::Regex;
use xshell::{Shell, cmd};

use crate::{error_texts, plurals};

/// Columns of a line of text.
const WIDTH: usize = 100;

/// Words that make a text vague, and what to write instead. A space also matches the `_` of an
/// identifier.
const WORDS: [(&str, &str); 19] = [
    ("told|tells", "name what is passed, set or reported"),
    (
        "somebody|nobody|whoever",
        "name the process, thread or user",
    ),
    ("whatever", "state the cases"),
    ("strangers?", "another user"),
    ("anew", "again"),
    ("for ever", "forever, or without limit"),
    ("gone on with", "retried, continued"),
    ("no more to say", "has no effect"),
    ("by lot", "at random"),
    ("mend(s|ed|ing)?", "repair"),
    ("spoilt", "damaged"),
    ("had back", "restored"),
    ("is had", "is available"),
    ("of its own making", "its own"),
    ("the living", "in use"),
    ("the dead", "orphaned"),
    ("unless said", "by default"),
    (
        r"\w*(behaviour|colour|neighbour|honour|favour|modelled|labelled|licence|artefact)\w*",
        "the American spelling",
    ),
    (
        r"\w*(general|initial|minim|normal|optim|organ|recogn|serial|summar|synchron|virtual)is(ation|e|ed|es|ing)",
        "the American spelling",
    ),
];

/// This file, which quotes the words, and pages that programs write from a run.
const ALLOWED: [&str; 5] = [
    "docs/benchmarks.md",
    "docs/benchmarks-live.md",
    "docs/benchmarks-serving.md",
    "docs/fs-matrix.md",
    "testing/source-checks/src/prose.rs",
];

/// Pages that name files of the workspace by their path.
const PAGES: [&str; 2] = ["ARCHITECTURE.md", "CONTRIBUTING.md"];

/// Fails if a file under version control breaks a rule.
pub(crate) fn check(sh: &Shell) -> anyhow::Result<()> {
    let files = cmd!(sh, "git ls-files -- *.rs *.md *.sh *.toml").read()?;
    let rules = Rules::new();
    let mut findings = Vec::new();
    for path in files.lines().filter(|path| !ALLOWED.contains(path)) {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            // Removed, and not committed yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("failed to read {path}")),
        };
        rules.check(path, &text, &mut findings);
        let without = error_texts::without_reason(path, &text).into_iter();
        findings.extend(without.map(|line| Finding {
            path: path.to_owned(),
            line,
            problem: "the text of the error lacks its source: end it with `: {source}`".to_owned(),
        }));
        let plurals = plurals::after_numbers(path, &text).into_iter();
        findings.extend(plurals.map(|line| {
            Finding {
                path: path.to_owned(),
                line,
                problem:
                    "a number before a plural may be 1: write `length {len}`, or the number in \
                      brackets"
                        .to_owned(),
            }
        }));
    }
    for page in PAGES {
        let text = fs::read_to_string(page).with_context(|| format!("failed to read {page}"))?;
        check_paths(page, &text, &|path| Path::new(path).exists(), &mut findings);
    }
    for finding in &findings {
        println!("{finding}");
    }
    let count = findings.len();
    ensure!(
        count == 0,
        "{count} lines break the rules for text: rewrite them (see docs/glossary.md)"
    );
    Ok(())
}

/// A line that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    /// Counted from one.
    line: usize,
    problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.problem)
    }
}

struct Rules {
    words: Vec<(Regex, &'static str)>,
}

impl Rules {
    fn new() -> Self {
        let word = |(word, instead): (&str, &'static str)| {
            let pattern = format!(r"(?i)\b({word})\b");
            (Regex::new(&pattern).expect("a valid pattern"), instead)
        };
        let words = WORDS.map(word).into();
        Self { words }
    }

    fn check(&self, path: &str, text: &str, findings: &mut Vec<Finding>) {
        let markdown = Path::new(path)
            .extension()
            .is_some_and(|extension| extension == "md");
        let mut in_code = false;
        for (index, line) in text.lines().enumerate() {
            let mut report = |problem| {
                findings.push(Finding {
                    path: path.to_owned(),
                    line: index + 1,
                    problem,
                });
            };
            let spaced = line.replace('_', " ");
            for (word, instead) in &self.words {
                if let Some(found) = word.find(&spaced) {
                    report(format!("{:?}; instead: {instead}", found.as_str()));
                }
            }
            let content = match markdown {
                true => Some(line),
                false => comment(line),
            };
            let Some(content) = content.map(str::trim_start) else {
                in_code = false;
                continue;
            };
            if content.starts_with("```") {
                in_code = !in_code;
            }
            let columns = line.chars().count();
            if columns > WIDTH && !in_code && can_be_wrapped(content) {
                report(format!("{columns} columns of text, of at most {WIDTH}"));
            }
        }
    }
}

/// Finds the paths in `text` that name nothing. `NAME` and `*` stand for several.
fn check_paths(page: &str, text: &str, exists: &dyn Fn(&str) -> bool, findings: &mut Vec<Finding>) {
    let path = r"`((?:benches|crates|docs|fuzz|testing|xtask)/[^`\s]*)`";
    let path = Regex::new(path).expect("a valid pattern");
    for (index, line) in text.lines().enumerate() {
        let named = path.captures_iter(line).map(|found| found[1].to_owned());
        let paths = named.flat_map(|path| alternatives(&path));
        let fixed = paths.filter(|path| !path.contains("NAME") && !path.contains('*'));
        findings.extend(fixed.filter(|path| !exists(path)).map(|path| Finding {
            path: page.to_owned(),
            line: index + 1,
            problem: format!("there is no {path}"),
        }));
    }
}

/// Returns the paths that one with braces stands for.
fn alternatives(path: &str) -> Vec<String> {
    let braces = path.split_once('{').and_then(|(before, rest)| {
        let (names, after) = rest.split_once('}')?;
        Some((before, names, after))
    });
    let Some((before, names, after)) = braces else {
        return vec![path.to_owned()];
    };
    let paths = names
        .split(',')
        .map(|name| format!("{before}{name}{after}"));
    paths.flat_map(|path| alternatives(&path)).collect()
}

/// Returns the text of a line that is a comment.
fn comment(line: &str) -> Option<&str> {
    let line = line.trim_start();
    ["///", "//!", "//", "#"]
        .iter()
        .find_map(|start| line.strip_prefix(start))
        // An attribute of Rust.
        .filter(|_| !line.starts_with("#["))
}

/// Tables cannot be wrapped, nor can a single word such as an address, or a link by itself.
fn can_be_wrapped(content: &str) -> bool {
    let words = content.trim_start_matches(['-', '*', '>', ' ']);
    // The target of a link, or of its definition, is one word.
    let target = words
        .strip_prefix('[')
        .and_then(|link| Some(link.split_once(']')?.1.trim_start_matches(':')));
    !content.starts_with('|') && target.unwrap_or(words).trim().contains(' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> Vec<usize> {
        let mut findings = Vec::new();
        Rules::new().check(path, text, &mut findings);
        findings.into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn words_are_found_in_text_and_in_names() {
        let text = "fn the_page_is_told() {}\nlet tolded = 1;\n// Nobody reads it.\n\"for ever\"\n";
        assert_eq!(problems("a.rs", text), [1, 3, 4]);
        assert_eq!(problems("a.md", "It is\nmended.\n"), [2]);
        assert_eq!(
            problems("a.rs", "struct Behaviours;\n// recognise\n// modeled\n"),
            [1, 2]
        );
    }

    #[test]
    fn comments_are_at_most_as_wide_as_allowed() {
        let words = "word ".repeat(20);
        let exact = format!("// {}", &words[..97]);
        assert_eq!(exact.len(), 100);
        assert!(problems("a.rs", &exact).is_empty());
        assert_eq!(problems("a.rs", &format!("//  {}", &words[..97])), [1]);
        assert_eq!(problems("a.rs", &format!("    /// {words}{words}")), [1]);
        assert!(problems("a.rs", &format!("let a = \"{words}{words}\";")).is_empty());
    }

    #[test]
    fn text_is_measured_in_characters() {
        let wide = format!("// {}", "é ".repeat(48));
        assert!(problems("a.rs", &wide).is_empty());
    }

    #[test]
    fn tables_code_and_single_words_may_be_wider() {
        let words = "word ".repeat(30);
        let address = format!("- https://example.org/{}", "a".repeat(120));
        let text = format!("| {words} |\n```text\n{words}\n```\n{address}\n{words}\n");
        assert_eq!(problems("a.md", &text), [6]);
        let link = format!("[a link of words](https://example.org/{})", "a".repeat(120));
        assert!(problems("a.md", &link).is_empty());
        assert_eq!(problems("a.md", &format!("{link} and text")), [1]);
    }

    #[test]
    fn paths_that_name_nothing_are_found() {
        let mut findings = Vec::new();
        let text = "`crates/a/src/{one,two}.rs`\n`crates/NAME/x`, `testing/*`, `gone.rs`\n";
        let exists = |path: &str| path == "crates/a/src/one.rs";
        check_paths("a.md", text, &exists, &mut findings);
        let problems: Vec<_> = findings
            .iter()
            .map(|found| found.problem.as_str())
            .collect();
        assert_eq!(problems, ["there is no crates/a/src/two.rs"]);
        assert_eq!(findings[0].line, 1);
    }
}
