//! Invalid input: the tool refuses it with the right exit code, and changes no file.

mod support;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rstest::rstest;
use support::{Ended, PAGE, RAM, RAMSNAP, Work};
use test_machine::needs;

#[rstest]
#[case::nothing_named("merge -o out", "required")]
#[case::no_place("merge full.mem d1.mem", "--output")]
#[case::two_places("merge full.mem d1.mem -o out --in-place", "cannot be used with")]
#[case::no_layout("convert full.mem -o out --layout tar", "possible values")]
#[case::page_of_no_power("dump ram -o out --page-size 5000", "power of two")]
#[case::no_size("dump ram -o out --page-size huge", "give bytes")]
#[case::no_new_state("diff full.mem -o out", "name the new state")]
#[case::an_image_is_no_ram("dump full.mem -o out", "use `ramsnap convert`")]
#[case::raw_with_metadata("dump ram -o out --layout raw --metadata vcpus", "--layout sealed")]
#[case::too_much_metadata("dump ram -o out --metadata huge", "16 MiB")]
#[case::regions_of_other_ram("dump ram -o out --region-at 0:4MiB", "4194304 bytes")]
#[case::regions_that_overlap("dump ram -o out --region-at 0:4MiB --region-at 4096:4MiB", "apart")]
#[case::regions_in_disorder(
    "dump ram -o out --region-at 8388608:4MiB --region-at 0:4MiB",
    "ascending"
)]
#[case::region_inside_a_page("dump ram -o out --region-at 0x800:8MiB", "first address")]
#[case::stream_not_compressed("convert full.mem -o -", "add --zstd")]
#[case::no_stream("convert full.mem -o out --zstd", "name `-`")]
#[case::stream_of_other_layout("convert full.mem -o - --zstd --layout raw", "packed")]
#[case::picture_of_no_kind("map full.mem -o map.gif", ".svg or .png")]
#[case::output_is_there("dump ram -o d1.mem", "--force")]
#[case::picture_is_there("map full.mem -o there.svg", "--force")]
#[case::dump_onto_the_ram("dump ram -o ram --force", "one of the inputs")]
#[case::merged_onto_an_input("merge full.mem d1.mem -o full.mem", "--in-place")]
#[case::merged_onto_the_last("merge full.mem d1.mem -o d1.mem --force", "--in-place")]
#[case::converted_onto_itself("convert full.mem -o ./full.mem --force", "one of the inputs")]
#[case::onto_a_link_to_it("convert full.mem -o link --force", "one of the inputs")]
#[case::diff_onto_the_old("diff full.mem --ram ram -o full.mem --force", "one of the inputs")]
#[case::restored_onto_an_image("restore full.mem d1.mem -o d1.mem --force", "one of the inputs")]
#[case::ram_in_use("restore full.mem -o ram", "--force")]
fn wrong_usage_is_refused_before_anything_is_written(#[case] command: &str, #[case] says: &str) {
    let work = Work::with_chain();
    fs::write(work.path("there.svg"), "").unwrap();
    work.create("huge", (16 << 20) + 1);
    std::os::unix::fs::symlink("full.mem", work.path("link")).unwrap();
    work.fails(command, 2, &[says]);
}

#[rstest]
#[case::missing("full.mem d2.mem", 1, &["d2.mem", "not in the chain"])]
#[case::reordered("full.mem d2.mem d1.mem", 2, &["d2.mem\" was taken after \"d1.mem", "oldest first"])]
#[case::repeated("full.mem d1.mem d1.mem", 2, &["d1.mem", "name each image once"])]
#[case::late("full.mem d1.mem other.mem", 1, &["other.mem", "not in the chain"])]
#[case::two_full("full.mem full2.mem", 2, &["full2.mem", "is a full image: name it first"])]
#[case::another_guest("full.mem small.mem", 1, &["small.mem", "bytes of RAM"])]
#[case::other_addresses("full.mem moved.mem", 1, &["moved.mem", "other addresses"])]
#[case::onto_raw("raw:ram d1.mem", 1, &["d1.mem", "newest image is raw"])]
#[case::diff_first("d1.mem full.mem", 2, &["full.mem", "is a full image: name it first"])]
fn images_that_form_no_chain_are_refused_by_every_verb(
    #[case] files: &str,
    #[case] status: i32,
    #[case] says: &[&str],
) {
    let work = Work::with_chain();
    work.good("dump ram -o full2.mem");
    work.good("diff full2.mem --ram first -o other.mem");
    work.create("small", RAM / 2);
    work.good("dump small -o small.mem");
    work.good("dump first -o moved-full.mem --region-at 0x40000000:8MiB");
    work.good("diff moved-full.mem --ram ram -o moved.mem");
    work.fails(&format!("merge {files} -o out"), status, says);
    work.fails(&format!("restore {files} -o out"), status, says);
    let found = work.run(&format!("verify {files} --allow-raw"));
    assert_eq!(found.code, Some(1), "{found:?}");
    assert!(
        says.iter().all(|word| found.out.contains(word)),
        "{found:?}"
    );
    assert!(found.out.contains("NOT LINKED"), "{found:?}");
}

#[rstest]
#[case::diff_alone("restore d1.mem -o out", 2, &["d1.mem", "is a diff"])]
#[case::old_state_is_a_diff("diff d1.mem --ram ram -o out", 2, &["d1.mem", "is a diff"])]
#[case::new_state_is_a_diff("diff full.mem --to d1.mem --to d2.mem -o out", 2, &["d1.mem", "is a diff"])]
#[case::raw_where_sealed_is_demanded("convert full.raw --raw-diff --parent ram -o out --layout sealed", 1, &["ram", "neither sealed nor packed"])]
#[case::other_size("diff full.mem --ram small -o out", 1, &["of different guests"])]
#[case::target_of_other_size("restore full.mem -o small", 2, &["small", "must be equal"])]
#[case::maps_of_two_guests("map full.mem raw:small", 1, &["of different guests"])]
#[case::same_state("diff full.mem full.mem -o out", 2, &["the same one"])]
#[case::same_state_twice("diff full.mem --to full.mem -o out", 2, &["the same one"])]
#[case::a_page_larger_than_the_ram("dump ram -o out --page-size 16MiB", 2, &["larger than the RAM"])]
#[case::a_page_larger_than_an_image("convert full.mem -o out --page-size 16MiB", 2, &["larger than the RAM"])]
#[case::a_page_too_small("dump ram -o out --page-size 64", 2, &["too small"])]
#[case::a_page_larger_than_a_raw_image("convert raw:ram -o out --page-size 16MiB", 2, &["16777216-byte pages"])]
#[case::larger_pages_than_the_old_state("diff full.mem --ram ram --page-size 8KiB", 2, &["smaller than", "8192"])]
#[case::no_file("info none.mem", 3, &["none.mem", "No such file"])]
#[case::no_directory("dump ram -o none/out", 3, &["none", "No such file"])]
#[case::a_directory("dump . -o out", 2, &["not a regular file"])]
#[case::a_device("info /dev/null", 2, &["/dev/null", "not a regular file"])]
#[case::empty("info empty", 1, &["empty"])]
#[case::empty_ram("dump empty -o out", 3, &["empty"])]
#[case::no_whole_pages("dump odd -o out", 2, &["whole number of pages"])]
#[case::no_pages("restore raw:odd -o out", 1, &["odd", "is not a raw image"])]
#[case::of_unknown_format("restore small -o out", 1, &["small", "neither sealed nor packed", "raw:FILE"])]
#[case::of_another_format("restore sealed:full.mem -o out", 1, &["full.mem", "is packed"])]
#[case::a_raw_parent("convert full.raw --raw-diff --parent raw:full.raw -o out --layout sealed", 2, &["full.raw", "no id"])]
#[case::a_parent_of_another_size("convert small --raw-diff --parent full.mem -o out --layout sealed", 1, &["of different guests"])]
#[case::metadata_missing("dump ram -o out --metadata none", 3, &["metadata", "none"])]
fn other_bad_input_is_named(#[case] command: &str, #[case] code: i32, #[case] says: &[&str]) {
    let work = Work::with_chain();
    work.good("dump ram -o full.raw --layout raw");
    work.create("small", RAM / 2);
    work.create("empty", 0);
    work.create("odd", RAM + 5);
    work.fails(command, code, says);
}

/// This includes a sealed image that is opened as raw.
#[test]
fn images_without_checksums_are_refused_with_verify() {
    let work = Work::with_chain();
    work.good("dump ram -o full.raw --layout raw");
    work.good("dump ram -o sealed.mem --layout sealed");
    fs::write(
        work.path("cut.mem"),
        &work.read("sealed.mem")[..RAM as usize / 2],
    )
    .unwrap();
    for image in ["full.raw", "cut.mem"] {
        let restore = format!("restore --verify raw:{image} -o out");
        work.fails(&restore, 1, &[image, "no checksums", "--verify"]);
    }
}

#[rstest]
#[case::merged("merge full.mem d1.mem -o out")]
#[case::merged_in_place("merge --in-place full.mem d1.mem")]
#[case::converted("convert full.mem -o out --layout raw")]
#[case::sent("convert full.mem -o - --zstd")]
#[case::the_new_state("diff other.mem full.mem -o out")]
#[case::the_old_state("diff full.mem other.mem -o out")]
#[case::below_ram("diff full.mem d1.mem --ram ram -o out")]
#[case::restored("restore full.mem d1.mem -o out")]
#[case::restored_in_place("restore full.mem d1.mem -o second --force")]
fn damaged_pages_do_not_get_valid_checksums(#[case] command: &str) {
    let work = Work::with_chain();
    work.good("dump ram -o other.mem");
    work.rot("full.mem", 5000);
    work.fails(command, 1, &["full.mem", "damaged", "ramsnap verify"]);
}

#[rstest]
#[case::merged("merge --no-verify full.mem d1.mem -o out")]
#[case::converted("convert --no-verify full.mem -o out --layout raw")]
#[case::restored("restore --no-verify full.mem d1.mem -o out")]
#[case::compared("diff --no-verify full.mem d1.mem --ram ram -o out")]
fn checksums_are_not_compared_on_request(#[case] command: &str) {
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    work.good(command);
    assert!(work.files().contains(&"out".to_owned()));
}

#[test]
fn a_truncated_image_is_refused() {
    let work = Work::with_chain();
    let bytes = work.read("d1.mem");
    fs::write(work.path("d1.mem"), &bytes[..bytes.len() - 1]).unwrap();
    let found = work.run("verify full.mem d1.mem");
    assert_eq!(found.code, Some(1));
    let says = format!("cut off at length {} of {}", bytes.len() - 1, bytes.len());
    assert!(found.out.contains(&says), "{found:?}");
    work.fails("merge full.mem d1.mem -o out", 1, &["d1.mem"]);
}

/// Resizes the RAM after its pages were read and before they are written.
#[cfg(target_os = "linux")]
#[rstest]
#[case::grows(1 << 20)]
#[case::shrinks(-(1 << 20))]
fn ram_that_changes_its_size_during_the_read_is_an_error(#[case] by: i64) {
    needs!(Strace);
    let work = Work::with_ram();
    let command = work.command("dump ram -o out");
    let held = support::held::Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    assert_eq!(work.files().len(), 2, "there is a stage");
    let ram = fs::File::options().write(true).open(work.path("ram"));
    let size = RAM.checked_add_signed(by).unwrap();
    ram.unwrap().set_len(size).unwrap();
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    assert!(error.contains("changed its size"), "{error}");
    assert_eq!(work.files(), ["ram"]);
}

#[test]
fn without_permission_the_error_names_the_file() {
    needs!(Root);
    let work = Work::with_chain();
    // Any user may run the copy. `cp` makes it, so that no child of another test has it open for
    // writing, which would make it busy.
    let copied = Command::new("cp")
        .args([RAMSNAP, "ramsnap"])
        .current_dir(work.path(""))
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(work.path(""), Permissions::from_mode(0o755)).unwrap();
    let as_other_user = |arguments: &str| {
        let mut command = Command::new(work.path("ramsnap"));
        command
            .args(arguments.split(' '))
            .current_dir(work.path(""));
        Ended::of(command.uid(65534).gid(65534))
    };
    as_other_user("info full.mem").fails(3, &["full.mem", "Permission denied"]);
    fs::set_permissions(work.path("full.mem"), Permissions::from_mode(0o644)).unwrap();
    as_other_user("info full.mem").good();
    as_other_user("verify full.mem").good();
    as_other_user("convert full.mem -o out").fails(3, &["cannot stage", "Permission denied"]);
    // RAM that is readable and not writable.
    let before = work.read("ram");
    let denied = [
        "\"ram\"",
        "belongs to user 0",
        "run ramsnap as user 0",
        "Permission denied",
    ];
    as_other_user("restore full.mem -o ram --force").fails(3, &denied);
    assert!(work.read("ram") == before);
}

#[rstest]
#[case::info("info full.mem", 0)]
#[case::map("map full.mem", 0)]
#[case::help("--help", 0)]
#[case::verified("verify full.mem", 0)]
#[case::damaged("verify rotten.mem", 1)]
#[case::different("diff full.mem --ram ram", 1)]
#[case::written("dump ram -o out", 0)]
#[case::stream("convert full.mem -o - --zstd", 3)]
fn a_closed_pipe_causes_no_panic_and_changes_no_answer(#[case] command: &str, #[case] code: i32) {
    let work = Work::with_chain();
    work.copy("full.mem", "rotten.mem");
    work.rot("rotten.mem", 5000);
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let child = work
        .command(command)
        .stdout(writer)
        .stderr(std::process::Stdio::piped())
        .spawn();
    let output = child.unwrap().wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(!error.contains("panicked"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_an_error() {
    let work = Work::with_ram();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = work.command("info raw:ram");
    let status = command
        .stdout(full)
        .stderr(std::process::Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(3));
}

#[test]
fn ram_that_is_no_whole_number_of_pages_takes_smaller_ones() {
    let work = Work::empty();
    work.create("ram", RAM + PAGE);
    work.good("dump ram -o full.mem --page-size 4KiB");
    work.fails(
        "dump ram -o out --page-size 8KiB",
        2,
        &[
            "not a multiple of the page size",
            "page size of at most 4096",
        ],
    );
}
