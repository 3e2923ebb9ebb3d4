//! The sessions in the README and in the guides equal the output of the tool.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{RAMSNAP, Work};

/// Returns each command of the session in a page with its output.
fn session(page: &str) -> Vec<(String, String)> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
    let blocks = page.split("```console\n").skip(1);
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
    check("README.md", work.path(""));
}

#[test]
fn the_session_in_the_firecracker_guide_is_what_happens() {
    let work = Work::empty();
    let mut ram = vec![0; 64 << 20];
    ram[..8 << 20].fill(0xa5);
    fs::write(work.path("full.mem"), &ram).unwrap();
    let diff = fs::File::create(work.path("diff.mem")).unwrap();
    diff.set_len(64 << 20).unwrap();
    for (page, byte) in [(3, 0x11), (4, 0x11), (5, 0), (1900, 0x11)] {
        diff.write_all_at(&[byte; 4096], page * 4096).unwrap();
        let start = page as usize * 4096;
        ram[start..start + 4096].fill(byte);
    }
    check("../../docs/guides/firecracker-files.md", work.path(""));
    assert!(fs::read(work.path("new.mem")).unwrap() == ram);
}

/// Set if the sessions are to be written into their pages, as `cargo xtask record-sessions` does.
const RECORD: &str = "RAMSNAP_RECORD_SESSIONS";

/// Runs the commands of a session and writes their output into the page.
fn record(page: &str, mut dir: PathBuf) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
    let text = fs::read_to_string(&path).unwrap();
    let mut blocks = text.split("```console\n");
    let mut written = blocks.next().unwrap().to_owned();
    for block in blocks {
        let (session, after) = block.split_once("```").unwrap();
        written += "```console\n";
        for step in session.split("$ ").skip(1) {
            let command = step.lines().next().unwrap();
            written += &format!("$ {command}\n");
            match command.strip_prefix("cd ") {
                Some(to) => dir = dir.join(to),
                None => written += &shell(command, &dir),
            }
        }
        written += &format!("```{after}");
    }
    fs::write(path, written).unwrap();
}

/// Runs the commands of a session and compares their output, or records it.
fn check(page: &str, dir: PathBuf) {
    if std::env::var_os(RECORD).is_some() {
        return record(page, dir);
    }
    let (steps, mut dir) = (session(page), dir);
    assert!(steps.len() > 3, "{steps:?}");
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
