//! The session in the README equals the output of the tool.

mod support;

use std::path::Path;
use std::process::Command;

use support::{RAMSNAP, Work};

const README: &str = include_str!("../README.md");

/// Returns each command of the session with its output.
fn session() -> Vec<(String, String)> {
    let blocks = README.split("```console\n").skip(1);
    let session: String = blocks
        .map(|block| block.split("```").next().unwrap())
        .collect();
    let steps = session.split("$ ").skip(1);
    steps
        .map(|step| {
            let (command, printed) = step.split_once('\n').unwrap();
            (command.to_owned(), printed.to_owned())
        })
        .collect()
}

/// Returns the text without values that differ between runs: ids and allocated sizes.
fn comparable(text: &str) -> Vec<String> {
    let is_id = |word: &str| word.len() == 32 && word.bytes().all(|it| it.is_ascii_hexdigit());
    let line = |line: &str| {
        let size = line
            .rsplit_once(", ")
            .filter(|_| line.ends_with(" allocated"));
        let kept = size.map_or(line, |(size, _)| size);
        let words = kept.split([' ', ',', ':']);
        let words: Vec<_> = words
            .map(|word| if is_id(word) { "ID" } else { word })
            .collect();
        words.join(" ")
    };
    text.lines().map(line).collect()
}

#[test]
fn the_session_in_the_readme_is_what_happens() {
    let work = Work::empty();
    let mut dir = work.path("");
    let steps = session();
    assert!(steps.len() > 8, "{steps:?}");
    for (command, expected) in steps {
        if let Some(to) = command.strip_prefix("cd ") {
            dir = dir.join(to);
            continue;
        }
        let printed = shell(&command, &dir);
        assert_eq!(
            comparable(&printed),
            comparable(&expected),
            "$ {command}\n{printed}"
        );
    }
}

/// Returns the output of a command in a terminal without colors.
fn shell(command: &str, dir: &Path) -> String {
    let tool = Path::new(RAMSNAP).parent().unwrap();
    let path = format!("{}:{}", tool.display(), std::env::var("PATH").unwrap());
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1; {command}")])
        .env("PATH", path)
        .env_remove("CLICOLOR_FORCE")
        .current_dir(dir)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}
