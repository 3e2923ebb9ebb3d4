//! Each verb that writes, with an output that is one of its inputs: it refuses, or the result is
//! right.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rstest::rstest;
use support::oracle::ram_of;
use support::{Work, list};

/// A second name of a file.
#[derive(Clone, Copy, Debug)]
enum Name {
    Same,
    HardLink,
    SymbolicLink,
    LinkedDirectory,
    HardLinkElsewhere,
    SymbolicLinkElsewhere,
}

impl Name {
    /// Gives `input` this name, and returns it.
    fn give(self, work: &Work, input: &str) -> String {
        let extension = Path::new(input).extension().unwrap_or_default();
        let named = |stem: &str| format!("{stem}.{}", extension.display());
        let (hard, soft) = (named("hard"), named("soft"));
        fs::create_dir(work.path("other")).unwrap();
        symlink(".", work.path("linked")).unwrap();
        match self {
            Self::Same => input.to_owned(),
            Self::HardLink => {
                fs::hard_link(work.path(input), work.path(&hard)).unwrap();
                hard
            }
            Self::SymbolicLink => {
                symlink(input, work.path(&soft)).unwrap();
                soft
            }
            Self::LinkedDirectory => format!("linked/{input}"),
            Self::HardLinkElsewhere => {
                let name = format!("other/{hard}");
                fs::hard_link(work.path(input), work.path(&name)).unwrap();
                name
            }
            Self::SymbolicLinkElsewhere => {
                let name = format!("other/{soft}");
                symlink(format!("../{input}"), work.path(&name)).unwrap();
                name
            }
        }
    }
}

/// Returns a chain, and the inputs that verbs read beside images.
fn inputs() -> Work {
    static MADE: OnceLock<Work> = OnceLock::new();
    let (made, work) = (MADE.get_or_init(make_inputs), Work::empty());
    for name in made.files() {
        fs::copy(made.path(&name), work.path(&name)).unwrap();
    }
    work
}

fn make_inputs() -> Work {
    let work = Work::with_chain();
    work.copy("full.mem", "full.svg");
    work.copy("first", "registers");
    work.good("convert full.mem -o full.zst --zstd");
    work.good("dump ram -o sealed.mem --layout sealed");
    work.good("convert sealed.mem -o guest.elf --to elf");
    work
}

/// Returns the contents of all files, by their paths.
fn contents(work: &Work) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for dir in ["", "other/"] {
        for name in list(&work.path(dir)) {
            let path = work.path(&format!("{dir}{name}"));
            if path.is_file() {
                found.push((format!("{dir}{name}"), fs::read(path).unwrap()));
            }
        }
    }
    found
}

/// Asserts that each diff that `command` does not name, not even as `input`, has the RAM that it
/// had before, on top of `full.mem` or of `output`, which may have its state now.
fn assert_others_are_readable(work: &Work, command: &str, input: &str, output: &str) {
    let path = |name: &str| work.path(name);
    for (newest, state) in [("d1.mem", "second"), ("d2.mem", "ram")] {
        if command.contains(newest) || input == newest || !path(newest).exists() {
            continue;
        }
        let bases = ["full.mem", output];
        let is_readable = |base: &&str| {
            let chains = [vec![*base, newest], vec![*base, "d1.mem", newest]];
            let mut chains = chains.iter().map(|files| files.iter().map(|it| path(it)));
            chains.any(|files| {
                let files: Vec<_> = files.collect();
                ram_of(&files).is_ok_and(|ram| ram == work.read(state))
            })
        };
        let found = bases.iter().any(is_readable);
        assert!(found, "{newest} cannot be read after {command}");
    }
}

/// `OUT` is the output, which is `input` by another name. `state` is the RAM of the chain in
/// `result`, of which files that a verb has removed are left out.
#[rstest]
#[case::dump("dump ram -o OUT --force", "ram", &["OUT"], "ram")]
#[case::dump_metadata("dump ram --metadata registers -o OUT --force", "registers", &["OUT"], "ram")]
#[case::dump_raw("dump first -o OUT --force --layout raw", "first", &["OUT"], "first")]
#[case::diff_old("diff full.mem --ram ram -o OUT --force", "full.mem", &["OUT"], "ram")]
#[case::diff_middle("diff full.mem d1.mem --ram ram -o OUT --force", "d1.mem", &["OUT"], "ram")]
#[case::diff_new("diff full.mem d1.mem d2.mem -o OUT --force", "d2.mem", &["OUT"], "ram")]
#[case::diff_ram("diff full.mem --ram ram -o OUT --force", "ram", &["OUT"], "ram")]
#[case::diff_to("diff full.mem --to sealed.mem -o OUT --force", "sealed.mem", &["OUT"], "ram")]
#[case::diff_raw("diff full.mem d1.mem --ram ram -o OUT --layout raw --force", "full.mem", &["OUT"], "ram")]
#[case::convert_full("convert full.mem -o OUT --force --layout sealed", "full.mem", &["OUT"], "first")]
#[case::convert_diff("convert d1.mem -o OUT --force", "d1.mem", &["OUT"], "first")]
#[case::convert_to_parent("convert d1.mem -o OUT --force", "full.mem", &["OUT"], "first")]
#[case::convert_raw("convert d1.mem -o OUT --force --layout raw", "full.mem", &["OUT"], "first")]
#[case::convert_parent("convert ram --raw-diff --parent full.mem -o OUT --force --layout packed", "full.mem", &["OUT"], "ram")]
#[case::receive("convert full.zst -o OUT --force", "full.zst", &["OUT"], "first")]
#[case::send("convert full.zst -o OUT --force --zstd", "full.zst", &["OUT"], "first")]
#[case::export("convert sealed.mem -o OUT --force --to elf", "sealed.mem", &["OUT"], "ram")]
#[case::import("convert elf:guest.elf -o OUT --force", "guest.elf", &["OUT"], "ram")]
#[case::merge_first("merge full.mem d1.mem -o OUT --force", "full.mem", &["OUT"], "second")]
#[case::merge_last("merge full.mem d1.mem -o OUT --force", "d1.mem", &["OUT"], "second")]
#[case::merge_to_parent("merge d1.mem d2.mem -o OUT --force", "full.mem", &["OUT"], "first")]
#[case::merge_in_place("merge --in-place OUT d1.mem", "full.mem", &["OUT"], "second")]
#[case::merge_diffs_in_place("merge --in-place OUT d2.mem", "d1.mem", &["full.mem", "OUT"], "ram")]
#[case::merge_twice("merge --in-place full.mem OUT", "full.mem", &["full.mem"], "first")]
#[case::rebase("rebase full.mem d1.mem OUT --onto full.mem", "d2.mem", &["full.mem", "OUT"], "ram")]
#[case::rebase_onto_itself("rebase full.mem d1.mem --onto full.mem --onto OUT", "d1.mem", &["full.mem", "d1.mem"], "second")]
#[case::rebase_twice("rebase full.mem d1.mem OUT --onto full.mem", "d1.mem", &["full.mem", "d1.mem"], "second")]
#[case::commit("commit OUT d1.mem d2.mem", "full.mem", &["OUT"], "ram")]
#[case::commit_and_remove("commit OUT d1.mem --remove", "full.mem", &["OUT"], "second")]
#[case::commit_last("commit full.mem d1.mem OUT --remove", "d2.mem", &["full.mem"], "ram")]
#[case::commit_diffs("commit OUT d2.mem", "d1.mem", &["full.mem", "OUT"], "ram")]
#[case::commit_twice("commit full.mem OUT", "full.mem", &["full.mem"], "first")]
#[case::compact("compact . --keep 1", "full.mem", &["full.mem", "d1.mem", "d2.mem"], "ram")]
#[case::compact_linked("compact linked --keep 1", "d1.mem", &["full.mem", "d1.mem", "d2.mem"], "ram")]
#[case::restore_first("restore full.mem d1.mem -o OUT --force", "full.mem", &["OUT"], "second")]
#[case::restore_last("restore full.mem d1.mem -o OUT --force", "d1.mem", &["OUT"], "second")]
#[case::restore_raw("restore raw:second -o OUT --force", "second", &["OUT"], "second")]
#[case::map("map full.svg -o OUT --force", "full.svg", &["OUT"], "first")]
#[case::metadata("metadata full.mem -o OUT --force", "full.mem", &["OUT"], "first")]
fn no_verb_damages_an_input_that_is_its_output(
    #[case] command: &str,
    #[case] input: &str,
    #[case] result: &[&str],
    #[case] state: &str,
    #[values(
        Name::Same,
        Name::HardLink,
        Name::SymbolicLink,
        Name::LinkedDirectory,
        Name::HardLinkElsewhere,
        Name::SymbolicLinkElsewhere
    )]
    name: Name,
) {
    let work = inputs();
    let output = name.give(&work, input);
    let command = command.replace("OUT", &output);
    let before = contents(&work);
    let ended = work.run(&command);
    if ended.code != Some(0) {
        assert!(matches!(ended.code, Some(1 | 2)), "{command}: {ended:?}");
        assert!(ended.err.starts_with("error: "), "{command}: {ended:?}");
        assert!(contents(&work) == before, "{command}: {ended:?}");
        return;
    }
    let names = result.iter().map(|name| name.replace("OUT", &output));
    let paths: Vec<PathBuf> = names.map(|name| work.path(&name)).collect();
    let paths: Vec<PathBuf> = paths.into_iter().filter(|path| path.exists()).collect();
    let ram = ram_of(&paths).unwrap_or_else(|error| panic!("{command}: {error}"));
    assert!(ram == work.read(state), "{command}: another RAM");
    assert_others_are_readable(&work, &command, input, &output);
}
