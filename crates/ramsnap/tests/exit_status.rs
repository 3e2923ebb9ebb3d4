//! Each exit status, as `docs/command-line.md` and `--help` describe it.

mod support;

use std::fs;
use std::path::Path;

use rstest::rstest;
use support::Work;

#[rstest]
#[case::written("dump ram -o out", 0)]
#[case::verified("verify full.mem d1.mem", 0)]
#[case::no_difference("diff full.mem --ram first", 0)]
#[case::same_states("compare full.mem full.mem", 0)]
#[case::damaged("verify rotten.mem", 1)]
#[case::damage_found_on_the_way("merge rotten.mem d1.mem -o out", 1)]
#[case::not_linked("verify full.mem d2.mem", 1)]
#[case::difference("diff full.mem --ram ram", 1)]
#[case::other_states("compare full.mem other.mem", 1)]
#[case::not_an_image("info ram", 1)]
#[case::no_parent_in_the_directory("restore --chain dir d2.mem -o out", 1)]
#[case::unlinked_in_the_directory("list dir", 1)]
#[case::no_metadata("metadata full.mem -o out", 1)]
#[case::pages_in_no_diff("cat d1.mem --at 0", 2)]
#[case::unknown_option("info full.mem --unknown", 2)]
#[case::output_exists("dump ram -o full.mem", 2)]
#[case::output_is_an_input("convert full.mem -o full.mem --force", 2)]
#[case::page_size("dump ram -o out --page-size 16MiB", 2)]
#[case::no_ram_at_the_address("cat full.mem --at 0x100000000", 2)]
#[case::no_policy("compact dir", 2)]
#[case::a_diff_alone("restore d1.mem -o out", 2)]
#[case::another_order("merge full.mem d2.mem d1.mem -o out", 2)]
#[case::an_image_twice("merge full.mem d1.mem d1.mem -o out", 2)]
#[case::the_full_image_later("commit d1.mem full.mem", 2)]
#[case::one_state("compare full.mem", 2)]
#[case::a_diff_as_the_other_state("compare full.mem d1.mem", 2)]
#[case::a_diff_as_a_core("convert d1.mem -o out --to elf", 2)]
#[case::info_of_a_directory("info dir", 2)]
#[case::verify_of_a_directory("verify full.mem dir", 2)]
#[case::map_of_a_device("map raw:/dev/null", 2)]
#[case::dump_of_a_directory("dump dir -o out", 2)]
#[case::diff_of_a_device("diff full.mem --ram /dev/null", 2)]
#[case::core_in_a_directory("convert elf:dir -o out", 2)]
#[case::core_in_a_device("convert elf:/dev/null -o out", 2)]
#[case::metadata_in_a_directory("dump ram -o out --metadata dir", 2)]
#[case::output_is_a_directory("dump ram -o dir --force", 2)]
#[case::output_is_a_device("merge full.mem d1.mem -o /dev/null --force", 2)]
#[case::output_ends_in_a_slash("convert full.mem -o dir/ --force", 2)]
#[case::output_below_a_file("dump ram -o full.mem/out", 2)]
#[case::restore_to_a_directory("restore full.mem -o dir --force", 2)]
#[case::restore_to_a_device("restore full.mem -o /dev/null", 2)]
#[case::restore_to_the_root("restore full.mem -o /", 2)]
#[case::list_of_a_file("list full.mem", 2)]
#[case::compact_of_a_file("compact full.mem --keep 1", 2)]
#[case::sweep_of_a_file("sweep full.mem", 2)]
#[case::chain_in_a_file("info --chain full.mem d1.mem", 2)]
#[case::manual_in_a_file("man full.mem", 2)]
#[case::unknown_format("convert foo:full.mem -o out", 2)]
#[case::ram_block_of_an_image("convert full.mem -o out --ram-block pc.ram", 2)]
#[case::no_file("info none.mem", 3)]
#[case::no_directory("list none", 3)]
#[case::no_place("dump ram -o none/out", 3)]
fn the_status_says_what_happened(#[case] command: &str, #[case] status: i32) {
    let work = Work::with_chain();
    work.good("dump ram -o other.mem");
    work.copy("full.mem", "rotten.mem");
    work.rot("rotten.mem", 5000);
    fs::create_dir(work.path("dir")).unwrap();
    work.copy("d2.mem", "dir/d2.mem");
    let ended = work.run(command);
    assert_eq!(ended.code, Some(status), "{ended:?}");
    if status > 1 {
        // One error, with what it is about.
        let errors = ended.err.lines().filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{ended:?}");
    }
}

/// The signals are tested in `signals_at_calls.rs`.
#[test]
fn every_status_is_documented() {
    let help = Work::empty().good("--help").out;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/command-line.md");
    let page = fs::read_to_string(page).unwrap();
    for status in ["0", "1", "2", "3", "128 + N"] {
        assert!(page.contains(&format!("\n| {status} |")), "{status}");
    }
    let (_, listed) = help.split_once("Exit status:").unwrap();
    for status in ["0", "1", "2", "3", "128"] {
        let is_of = |line: &str| line.trim_start().starts_with(&format!("{status} "));
        assert!(listed.lines().any(is_of), "{status}: {listed}");
    }
    for signal in [
        "SIGINT (130)",
        "SIGTERM (143)",
        "SIGHUP (129)",
        "SIGQUIT (131)",
    ] {
        assert!(page.contains(signal) && help.contains(signal.split(' ').next().unwrap()));
    }
}
