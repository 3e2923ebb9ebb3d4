//! The command line decides the result: raw files, regions, options.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
#[cfg(target_os = "linux")]
use std::os::unix::fs::PermissionsExt;

use image_format::ImageKind;
use rstest::rstest;
use support::{PAGE, Work};
use test_images::write_version_1;

/// A full image, sealed and raw, and a raw diff of one page.
fn with_raw_diff() -> Work {
    let work = Work::with_chain();
    work.copy("first", "changed");
    let changed = File::options()
        .write(true)
        .open(work.path("changed"))
        .unwrap();
    changed.write_all_at(&[9; PAGE as usize], 5 * PAGE).unwrap();
    work.good("convert full.mem -o full.raw --layout raw");
    work.good("diff full.mem --ram changed -o diff.raw --layout raw");
    work
}

#[rstest]
#[case::last("diff full.mem raw:diff.raw")]
#[case::on_raw("diff raw:full.raw raw:diff.raw")]
#[case::by_to("diff full.mem --to raw:diff.raw")]
#[case::by_format("diff raw:full.raw raw:diff.raw --format auto")]
#[case::a_chain("diff full.mem --to raw:full.raw --to raw:diff.raw")]
fn a_raw_new_state_is_refused_unless_it_is_named(#[case] command: &str) {
    let work = with_raw_diff();
    for output in ["", " -o out"] {
        let command = format!("{command}{output}");
        work.fails(&command, 2, &[".raw", "--raw-full or --raw-diff"]);
    }
}

#[test]
fn a_raw_new_state_is_what_the_command_line_says() {
    let work = with_raw_diff();
    for old in ["full.mem", "raw:full.raw"] {
        for new in ["raw:diff.raw", "--to raw:diff.raw"] {
            work.good(&format!("diff {old} {new} --raw-diff -o d.mem --force"));
            let chain = format!("{old} d.mem");
            work.good(&format!("diff {chain} --ram changed"));
            work.good(&format!(
                "diff {old} raw:changed --raw-full -o d.mem --force"
            ));
            work.good(&format!("diff {chain} --ram changed"));
        }
        work.good(&format!(
            "diff {old} --to raw:full.raw --to raw:diff.raw --raw-full -o d.mem --force"
        ));
        work.good(&format!("diff {old} d.mem --ram changed"));
    }
    for unused in [
        "diff full.mem d1.mem --raw-diff",
        "diff full.mem --ram ram --raw-full",
        "diff full.mem d1.mem --raw-diff --raw-full",
    ] {
        work.fails(unused, 2, &["--raw-full"]);
    }
}

/// The arguments for RAM in two regions.
const REGIONS: &str = "--region-at 0:4MiB --region-at 0x100000000:4MiB";

fn regions(work: &Work, file: &str) -> serde_json::Value {
    let info = work.good(&format!("info {file} --json")).json();
    info[0]["regions"].clone()
}

fn with_regions() -> Work {
    let work = with_raw_diff();
    work.good(&format!("dump first -o two.mem {REGIONS}"));
    work
}

#[rstest]
#[case::merged("merge two.mem raw:diff.raw -o out")]
#[case::new_state("diff two.mem --to two.mem --to raw:diff.raw -o out")]
#[case::on_top("diff two.mem raw:diff.raw --raw-diff -o out")]
#[case::raw_full("diff two.mem raw:changed --raw-full -o out")]
#[case::sealed_later("convert raw:diff.raw --raw-diff --parent two.mem -o out --layout packed")]
#[case::of_ram("diff two.mem --ram changed -o out")]
fn regions_are_those_of_any_image_that_is_not_raw(#[case] command: &str) {
    let work = with_regions();
    work.good(command);
    assert_eq!(regions(&work, "out"), regions(&work, "two.mem"));
    if !command.starts_with("merge") {
        work.good("verify two.mem out");
        work.good("diff two.mem out --to raw:changed --raw-full");
    }
    work.good("merge --in-place --force two.mem raw:diff.raw");
    assert_eq!(regions(&work, "two.mem"), regions(&work, "out"));
}

#[rstest]
#[case::of_two_images("diff two.mem other.mem", 1, &["other addresses", "0x100000000"])]
#[case::saved("diff two.mem other.mem -o out", 1, &["other addresses"])]
#[case::of_ram("diff two.mem --ram changed -o out --region-at 0:8MiB", 2, &["--region-at", "0x100000000"])]
#[case::of_a_parent("convert raw:diff.raw --raw-diff --parent two.mem -o out --layout packed --region-at 0:8MiB", 2, &["--region-at"])]
fn other_regions_are_refused(#[case] command: &str, #[case] code: i32, #[case] words: &[&str]) {
    let work = with_regions();
    work.good("dump changed -o other.mem");
    work.fails(command, code, words);
}

#[test]
fn metadata_of_an_older_state_is_not_kept_in_silence() {
    let work = with_raw_diff();
    fs::write(work.path("vcpus"), b"state").unwrap();
    work.good("dump first -o with.mem --metadata vcpus");
    for command in [
        "merge with.mem raw:diff.raw -o out",
        "diff full.mem --to with.mem --to raw:diff.raw -o out --force",
    ] {
        let ended = work.good(command);
        assert!(ended.err.contains("with.mem"), "{}", ended.err);
        assert!(ended.err.contains("not kept"), "{}", ended.err);
        let info = work.good("info out --json").json();
        assert_eq!(info[0]["metadata_bytes"], 0);
    }
}

/// The result of converting a raw image is raw by default.
#[rstest]
#[case::metadata("convert raw:full.raw -o out --metadata vcpus", &["raw image", "--layout"])]
#[case::regions("convert raw:full.raw -o out --region-at 0:8MiB", &["raw image", "--layout"])]
#[case::parent("convert raw:diff.raw --raw-diff -o out --parent full.mem", &["raw image", "--layout"])]
#[case::no_diff_to_keep_it("diff full.mem d1.mem --metadata vcpus", &["--output"])]
#[case::no_diff_with_regions("diff full.mem d1.mem --region-at 0:8MiB", &["--output"])]
#[case::no_diff_in_a_layout("diff full.mem d1.mem --layout sealed", &["--output"])]
#[case::no_holes_to_trust("convert full.mem -o out --trust-holes", &["--raw-diff"])]
#[case::no_columns("map full.mem --json --width 10", &["--width"])]
#[case::too_wide("map full.mem --width 18446744073709551615", &["--width"])]
#[case::no_width("map full.mem --width 0", &["--width"])]
fn options_without_effect_are_refused(#[case] command: &str, #[case] words: &[&str]) {
    let work = with_raw_diff();
    fs::write(work.path("vcpus"), b"state").unwrap();
    work.fails(command, 2, words);
}

/// The example of `diff --help`.
#[test]
fn a_diff_back_to_an_older_state_follows_the_newer_one() {
    let work = Work::with_chain();
    work.good("diff full.mem d1.mem d2.mem --to full.mem --to d1.mem -o back.mem");
    work.good("verify full.mem d1.mem d2.mem back.mem");
    work.good("restore full.mem d1.mem d2.mem back.mem -o out");
    work.assert_same("out", "second");
    work.good("merge full.mem d1.mem d2.mem back.mem -o merged.mem");
    work.good("diff merged.mem --ram second");
    let error = work.run("restore full.mem d1.mem d1.mem -o twice");
    error.fails(2, &["named twice"]);
}

#[test]
fn images_of_version_1_in_small_pages_stay_usable() {
    let work = Work::with_chain();
    write_version_1(&work.path("old.mem"), ImageKind::Full, &work.read("first"));
    for command in [
        "restore old.mem -o out",
        "convert old.mem -o out --layout raw",
        "merge old.mem -o out --layout raw",
    ] {
        work.good(command);
        work.assert_same("out", "first");
        fs::remove_file(work.path("out")).unwrap();
    }
    work.good("convert old.mem -o out --layout sealed");
    work.good("diff out --ram first");
    work.good("diff old.mem --ram second -o d.mem");
    work.good("diff old.mem d.mem --ram second");
    write_version_1(
        &work.path("diff.mem"),
        ImageKind::Diff { parent: None },
        &work.read("first"),
    );
    for command in [
        "convert diff.mem -o o",
        "convert diff.mem -o o --page-size 512",
        "merge diff.mem -o o",
    ] {
        work.fails(command, 2, &["256", "512", "full image"]);
    }
    work.good("restore raw:second diff.mem -o restored");
    work.assert_same("restored", "first");
}

/// A stream has version 2, for images of every version.
#[test]
fn an_image_of_version_1_is_sent_as_one_of_version_2() {
    let work = Work::with_chain();
    write_version_1(&work.path("old.mem"), ImageKind::Full, &work.read("first"));
    let send = work
        .command("convert packed:old.mem -o - --zstd")
        .output()
        .unwrap();
    assert!(send.status.success(), "{send:?}");
    fs::write(work.path("stream"), &send.stdout).unwrap();
    let mut receive = work.command("convert - --zstd -o got.mem");
    receive.stdin(File::open(work.path("stream")).unwrap());
    support::Ended::of(&mut receive).good();
    work.good("diff got.mem --ram first");
}

#[test]
fn manual_pages_replace_nothing_unless_forced() {
    let work = Work::empty();
    let own = work.path("man/ramsnap-dump.1");
    fs::create_dir(work.path("man")).unwrap();
    fs::write(&own, b"mine").unwrap();
    work.run("man man").fails(2, &["ramsnap-dump.1", "--force"]);
    assert_eq!(fs::read(&own).unwrap(), b"mine");
    assert_eq!(support::list(&work.path("man")).len(), 1);
    work.good("man man --force");
    assert_ne!(fs::read(&own).unwrap(), b"mine");
}

/// ext4 reports pages of such files as a hole until they are written back.
#[cfg(target_os = "linux")]
#[test]
fn ram_in_a_file_without_extents_is_not_taken_for_empty() {
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Root, Mount(FileSystem::EXT4_NO_EXTENTS));
    let work = Work::empty();
    let disk = LoopMount::new(FileSystem::EXT4_NO_EXTENTS).unwrap();
    let on_disk = |name: &str| disk.path().join(name);
    let guest = |name: &str| {
        let guest = File::create_new(on_disk(name)).unwrap();
        guest
            .set_permissions(fs::Permissions::from_mode(0o600))
            .unwrap();
        guest.set_len(256 * PAGE).unwrap();
        guest.write_all_at(b"guest", 20 * PAGE).unwrap();
        guest
    };
    let ram = guest("ram");
    ram.write_all_at(&support::noise(1, 40 * PAGE), 60 * PAGE)
        .unwrap();
    let dir = disk.path().display();
    work.good(&format!("dump {dir}/ram -o {dir}/full"));
    work.good(&format!("restore {dir}/full -o {dir}/back"));
    assert!(fs::read(on_disk("back")).unwrap() == fs::read(on_disk("ram")).unwrap());

    drop(guest("other"));
    let before = fs::read(on_disk("other")).unwrap();
    work.fails(
        &format!("restore {dir}/full -o {dir}/other"),
        2,
        &["--force"],
    );
    assert!(fs::read(on_disk("other")).unwrap() == before);
    work.fails(
        &format!("diff {dir}/full --ram {dir}/other -o {dir}/d --layout raw"),
        3,
        &["not stored in extents"],
    );
    assert!(!on_disk("d").exists());
}
