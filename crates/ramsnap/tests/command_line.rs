//! Options that do what their help says, and messages that name what to do.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::process::{Command, Stdio};

use nix::pty::openpty;
use rstest::rstest;
use support::held::{Held, calls};
use support::{Ended, PAGE, RAM, RAMSNAP, Work};
use test_machine::needs;

/// Creates `full.mem` and `d1.raw`, a raw diff whose holes were filled by a copy.
fn with_filled_diff() -> Work {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem");
    work.good("convert full.mem -o full.raw --layout raw");
    work.change(10, 5);
    work.good("diff raw:full.raw --ram ram -o holes.raw --layout raw");
    fs::write(work.path("d1.raw"), work.read("holes.raw")).unwrap();
    work
}

#[rstest]
#[case::converted("convert d1.raw --raw-diff --parent full.mem --layout packed -o out")]
#[case::merged("merge --raw-diffs d1.raw holes.raw --layout packed -o out")]
fn the_holes_of_the_first_diff_are_trusted_on_request(#[case] command: &str) {
    let work = with_filled_diff();
    work.fails(command, 1, &["d1.raw", "--trust-holes"]);
    let warned = work.good(&format!("{command} --trust-holes"));
    warned.warns(&["d1.raw"]);
}

#[test]
fn the_way_back_in_the_help_of_diff_is_a_chain() {
    let work = Work::with_chain();
    let help = work.good("diff --help").out;
    let back = help.lines().find(|line| line.ends_with("-o back.mem"));
    let back = back.unwrap().trim().strip_prefix("ramsnap ").unwrap();
    work.good(back);
    work.good("verify full.mem d1.mem d2.mem back.mem");
    work.good("restore full.mem d1.mem d2.mem back.mem -o out");
    work.assert_same("out", "second");
}

#[test]
fn links_that_files_do_not_record_are_not_certified() {
    let work = Work::with_chain();
    // The diff of another guest.
    work.good("dump second -o other.raw --layout raw");
    work.good("diff raw:other.raw --ram ram -o foreign.raw --layout raw");
    work.good("diff raw:other.raw --ram ram -o foreign.mem");
    for files in ["full.mem raw:foreign.raw", "raw:first foreign.mem"] {
        let found = work.good(&format!("verify {files} --allow-raw"));
        assert!(!found.out.contains("each follows"), "{found:?}");
        assert!(found.out.contains("link NOT CHECKED"), "{found:?}");
        let json = work
            .good(&format!("verify {files} --allow-raw --json"))
            .json();
        assert_eq!(json["links"]["state"], "unnamed", "{json}");
        assert_eq!(json["links"]["unchecked"].as_array().unwrap().len(), 1);
    }
    // Diffs that name another parent fail.
    work.fails("verify raw:first d1.mem --allow-raw", 1, &[]);
}

/// The last sync is that of the directory, after the rename.
#[test]
fn a_result_that_is_moved_at_once_is_described() {
    needs!(Strace);
    let work = Work::with_ram();
    let command = work.command("dump ram -o out");
    let mut syncs = calls(&command, true).into_iter().rev();
    let last = syncs.find(|(name, _)| name == "fsync").unwrap();
    fs::remove_file(work.path("out")).unwrap();
    let held = Held::before(&command, &last).expect("held");
    fs::rename(work.path("out"), work.path("elsewhere")).unwrap();
    let (status, message) = held.release();
    assert_eq!((status.code(), message.as_str()), (Some(0), ""));
    work.good("diff elsewhere --ram ram");
}

#[test]
fn a_raw_copy_of_a_parent_is_sealed_with_its_id() {
    let work = Work::with_chain();
    work.good("convert full.mem -o full.raw --layout raw");
    let refused = work.run("restore raw:full.raw d1.mem -o out");
    refused.fails(1, &["d1.mem", "convert raw:FILE", "--id"]);
    let info = work.good("info full.mem --json").json();
    let id = info[0]["id"].as_str().unwrap();
    let convert = "convert raw:full.raw -o sealed.mem --layout sealed --id";
    work.fails(&format!("{convert} 1234"), 2, &["32 hexadecimal digits"]);
    work.good(&format!("{convert} {id}"));
    work.good("verify sealed.mem d1.mem d2.mem");
    let kept = format!("convert d1.mem -o out --id {id}");
    work.fails(&kept, 2, &["d1.mem", "leave out --id"]);
    let raw = format!("convert raw:ram -o out --layout raw --id {id}");
    work.fails(&raw, 2, &["--layout sealed"]);
}

#[rstest]
#[case::dump("dump ram -o -")]
#[case::diff("diff full.mem --ram ram -o -")]
#[case::merge("merge full.mem d1.mem -o -")]
#[case::restore("restore full.mem -o -")]
fn a_hyphen_is_not_the_name_of_an_output(#[case] command: &str) {
    let work = Work::with_chain();
    work.fails(command, 2, &["`-`", "stdout", "./-"]);
    work.good(&command.replace("-o -", "-o ./-"));
}

#[test]
fn info_writes_and_syncs_nothing() {
    needs!(Strace);
    let work = Work::with_ram();
    let run = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-e",
            "trace=openat,fsync,fdatasync,pwrite64,ftruncate",
            RAMSNAP,
        ])
        .args(["info", "raw:ram"])
        .current_dir(work.path(""))
        .output()
        .unwrap();
    let (log, out) = (String::from_utf8(run.stderr).unwrap(), run.stdout);
    assert!(run.status.success() && log.contains("openat("), "{log}");
    assert!(String::from_utf8(out).unwrap().contains("raw image"));
    for call in ["sync(", "pwrite64(", "ftruncate(", "O_TMPFILE", "O_CREAT"] {
        assert!(!log.contains(call), "{call}: {log}");
    }
}

#[test]
fn a_merge_in_place_keeps_owner_and_mode() {
    needs!(Root);
    let work = Work::with_chain();
    fs::set_permissions(work.path("full.mem"), Permissions::from_mode(0o640)).unwrap();
    chown(work.path("full.mem"), Some(1_234_567), Some(7_654_321)).unwrap();
    work.good("merge --in-place full.mem d1.mem");
    let now = fs::metadata(work.path("full.mem")).unwrap();
    assert_eq!((now.uid(), now.gid()), (1_234_567, 7_654_321));
    assert_eq!(now.mode() & 0o777, 0o640);
    work.good("verify full.mem d2.mem");
}

#[rstest]
#[case::one("map full.mem")]
#[case::several("map full.mem d1.mem")]
fn a_map_may_be_as_wide_as_asked(#[case] command: &str, #[values(1, 80, 65535)] width: u32) {
    let work = Work::with_chain();
    let map = work.good(&format!("{command} --width {width}")).out;
    assert!(map.contains("of RAM"), "{map}");
    let wider = format!("{command} --width 99999999999999999999");
    work.fails(&wider, 2, &["--width"]);
}

#[rstest]
#[case::hexadecimal_size("0x0:0x800000")]
#[case::first_and_end("0x0-0x800000")]
#[case::as_info_prints_it("0x0..0x800000")]
fn regions_are_given_in_the_forms_that_are_printed(#[case] region: &str) {
    let work = Work::with_ram();
    work.good(&format!("dump ram -o full.mem --region-at {region}"));
    let info = work.good("info full.mem").out;
    assert!(info.contains("0x0..0x800000"), "{info}");
}

#[test]
fn a_raw_diff_is_reported_as_one() {
    let work = Work::with_chain();
    work.good("convert full.mem -o full.raw --layout raw");
    let taken = work.good("diff raw:full.raw --ram ram -o d.raw --layout raw");
    assert!(
        taken.out.starts_with("d.raw: raw diff image of 8.00 MiB"),
        "{taken:?}"
    );
    let converted = work.good("convert d1.mem -o d1.raw --layout raw");
    assert!(
        converted.out.starts_with("d1.raw: raw diff image of"),
        "{converted:?}"
    );
    let merged = work.good("merge d1.mem d2.mem -o both.raw --layout raw");
    assert!(
        merged.out.starts_with("both.raw: raw diff image of"),
        "{merged:?}"
    );
    let full = work.good("merge full.mem d1.mem -o all.raw --layout raw");
    assert!(full.out.starts_with("all.raw: raw image of"), "{full:?}");
}

/// The text of a picture is XML.
#[test]
fn names_do_not_break_a_picture() {
    let work = Work::with_chain();
    let name = "a<b>&\u{1b}[31m\u{1}.mem";
    work.copy("full.mem", name);
    Ended::of(work.command("map d1.mem -o map.svg").arg(name)).good();
    let svg = fs::read_to_string(work.path("map.svg")).unwrap();
    assert!(svg.contains("a&lt;b&gt;&amp;"), "{svg}");
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!svg.contains(control), "{svg:?}");
}

#[test]
fn one_damaged_place_is_one_place() {
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    work.run("merge full.mem d1.mem -o out")
        .fails(1, &["damaged in 1 place,"]);
}

#[test]
fn the_limit_of_descriptors_is_raised() {
    needs!(Strace);
    let work = Work::with_ram();
    let mut command = Command::new("prlimit");
    command
        .args(["--nofile=64:4096", RAMSNAP, "dump", "ram", "-o", "out"])
        .current_dir(work.path(""));
    let held = Held::before(&command, &("fsync".to_owned(), 1)).expect("held");
    let limits = fs::read_to_string(format!("/proc/{}/limits", held.id())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = files.unwrap().split_whitespace().nth(3).unwrap();
    assert_eq!(soft, "4096", "{limits}");
    held.release();
}

#[test]
fn progress_has_a_percentage_a_rate_and_the_time_left() {
    let work = Work::with_chain();
    let terminal = openpty(None, None).unwrap();
    let mut command = work.command("verify full.mem");
    let mut child = command
        .env("TERM", "xterm")
        .stdout(Stdio::null())
        .stderr(terminal.slave)
        .spawn()
        .unwrap();
    // The other end must close once the child has ended.
    drop(command);
    let (mut screen, mut piece) = (Vec::new(), [0; 4096]);
    let mut terminal = File::from(terminal.master);
    while let Ok(len) = terminal.read(&mut piece) {
        screen.extend_from_slice(&piece[..len]);
    }
    assert!(child.wait().unwrap().success());
    let screen = String::from_utf8_lossy(&screen);
    for part in ["checking full.mem", "%", "/s", " left"] {
        assert!(screen.contains(part), "no {part:?} in {screen:?}");
    }
}

#[test]
fn the_version_names_commit_formats_and_engines() {
    let work = Work::empty();
    let version = work.good("--version").out;
    for part in ["commit: ", "raw, sealed, packed", "pwrite", "target: "] {
        assert!(version.contains(part), "no {part:?} in {version}");
    }
    assert_eq!(work.good("-V").out.lines().count(), 1);
}

#[test]
fn colors_are_used_as_asked() {
    let work = Work::with_chain();
    let map = |color: &str| work.good(&format!("map full.mem {color}")).out;
    assert!(!map("--quiet").contains('\x1b'));
    assert!(map("--color always").contains("\x1b["));
    let forced = |color: &str| {
        let mut command = work.command(&format!("{color} map full.mem"));
        Ended::of(command.env("CLICOLOR_FORCE", "1")).good().out
    };
    assert!(forced("--color auto").contains("\x1b["));
    assert!(!forced("--color=never").contains('\x1b'));
    // Wrong usage, too.
    let usage = |color: &str| {
        work.run(&format!("map {color}"))
            .fails(2, &["required"])
            .err
    };
    assert!(usage("--color always").contains("\x1b["));
    assert!(!usage("--color never").contains('\x1b'));
}

#[rstest]
#[case::no_verb("")]
#[case::unknown_verb("explode ram")]
#[case::unknown_option("info full.mem --explode")]
#[case::id_of_a_sealed_image("convert full.mem -o out --id 88213de4bd9147c6bc3d68ecae6fdb8a")]
#[case::patience_without_a_process("dump ram -o out --patience 5")]
#[case::no_time("dump --pid 1 --patience soon -o out")]
#[case::region_that_ends_first("dump ram -o out --region-at 0x2000-0x1000")]
#[case::regions_that_overlap("dump ram -o out --region-at 0-8388608 --region-at 4096:4096")]
#[case::both_the_ram_and_a_process("dump ram --pid 1 --region largest -o out")]
#[case::unknown_color("info full.mem --color mauve")]
fn wrong_usage_has_exit_status_2(#[case] command: &str) {
    let work = Work::with_chain();
    work.fails(command, 2, &[]);
}

/// A size in pages, of which each byte is unlike that of a smaller RAM.
#[test]
fn sizes_may_be_hexadecimal() {
    let work = Work::with_ram();
    work.good("dump ram -o full.mem --page-size 0x4000");
    let info = work.good("info full.mem --json").json();
    assert_eq!(info[0]["page_bytes"], 4 * PAGE);
    assert_eq!(info[0]["ram_bytes"], RAM);
}

#[rstest]
#[case::option("info -x")]
#[case::long_option("info full.mem --explode")]
#[case::negative_address("cat full.mem --at -5")]
fn no_option_is_proposed_as_the_name_of_a_file(#[case] command: &str) {
    let error = Work::with_chain()
        .run(command)
        .fails(2, &["unexpected argument"]);
    assert!(!error.err.contains("as a value"), "{error:?}");
}

#[rstest]
#[case::order("merge full.mem d2.mem d1.mem -o out", &["d1.mem", "oldest first"])]
#[case::full_last("commit d1.mem full.mem", &["\"full.mem\" cannot follow \"d1.mem\"", "name it first"])]
#[case::missing("commit full.mem d2.mem", &["does not follow \"full.mem\"", "name the image"])]
#[case::rebased_last("rebase d1.mem full.mem --onto full.mem", &["full.mem", "the diff last"])]
#[case::compacted("compact full.mem --keep 1", &["\"full.mem\"", "Not a directory"])]
#[case::compared("compare full.mem d1.mem", &["d1.mem", "--to"])]
#[case::not_an_image("merge ram d1.mem -o out", &["\"ram\"", "give a raw image as raw:FILE"])]
fn an_error_is_one_line_with_file_and_remedy(#[case] command: &str, #[case] says: &[&str]) {
    let work = Work::with_chain();
    let error = work.run(command);
    assert!(
        error.code.is_some_and(|code| code == 1 || code == 2),
        "{error:?}"
    );
    assert!(
        says.iter().all(|word| error.err.contains(word)),
        "{error:?}"
    );
    assert_eq!(error.err.lines().count(), 1, "{error:?}");
    assert!(error.err.starts_with("error: "), "{error:?}");
}

#[test]
fn options_of_all_verbs_have_one_heading() {
    let work = Work::empty();
    let help = work.good("--help").out;
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    let verbs = commands.lines().filter_map(|line| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| format!("{name} -h"))
    });
    for command in verbs.chain(["-h".to_owned()]) {
        let help = work.good(&command).out;
        let (before, after) = help.split_once("Global options:\n").expect(&command);
        for option in ["-q, --quiet", "-v, --verbose", "--color", "-h, --help"] {
            assert!(!before.contains(option), "{option}: {help}");
            assert!(after.contains(option), "{option}: {help}");
        }
    }
}

#[test]
fn help_and_messages_have_no_contractions() {
    let work = Work::empty();
    for verb in ["restore", "serve", "verify", "merge", "diff", "convert"] {
        let help = work.good(&format!("{verb} --help")).out;
        assert!(!help.contains("n't "), "{help}");
    }
}
