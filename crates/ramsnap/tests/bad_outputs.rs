//! Outputs that cannot or must not be written: links, inputs, full disks, limits.

mod support;

use std::fs::{self};
use std::process::Command;

use rstest::rstest;
use support::{Ended, RAMSNAP, Work};
#[cfg(target_os = "linux")]
use test_machine::needs;

#[test]
fn an_output_that_is_a_dangling_link_is_explained() {
    let work = Work::with_chain();
    std::os::unix::fs::symlink("away", work.path("link")).unwrap();
    let says = ["link", "away", "; name the file"];
    work.run("dump ram --force -o link").fails(3, &says);
}

/// The text of such a link may be the path of another file.
#[cfg(target_os = "linux")]
#[rstest]
#[case::dump("dump ram -o OUT --force")]
#[case::dump_by_a_link("dump ram -o link --force")]
#[case::diff("diff full.mem --ram ram -o OUT --force")]
#[case::merge_in_place("merge --in-place OUT d1.mem")]
#[case::received("convert - --zstd -o OUT --force")]
#[case::picture("map full.mem -o link.svg --force")]
fn an_output_that_is_a_link_to_an_open_file_is_refused(#[case] command: &str) {
    use std::os::fd::AsRawFd;

    let work = Work::with_chain();
    work.copy("full.mem", "open.mem");
    let open = fs::File::open(work.path("open.mem")).unwrap();
    fs::rename(work.path("open.mem"), work.path("moved.mem")).unwrap();
    fs::remove_file(work.path("moved.mem")).unwrap();
    work.copy("d2.mem", "moved.mem (deleted)");
    let path = format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd());
    for link in ["link", "link.svg"] {
        std::os::unix::fs::symlink(&path, work.path(link)).unwrap();
    }
    let files = || {
        let names = work.files().into_iter();
        let names = names.filter(|name| !name.starts_with("link"));
        Vec::from_iter(names.map(|name| (work.read(&name), name)))
    };
    let before = files();
    let says = [&path, "a link to an open file", "by its path"];
    work.run(&command.replace("OUT", &path)).fails(2, &says);
    assert!(files() == before, "{:?} changed", work.files());
}

/// The descriptor is refused before the process is examined, which does not exist.
#[cfg(target_os = "linux")]
#[rstest]
#[case::descriptor("/dev/fd/0")]
#[case::stdout("/dev/stdout")]
fn an_open_file_is_refused_before_the_process(#[case] output: &str) {
    let work = Work::with_chain();
    let pid = u32::MAX >> 1;
    for verb in ["dump", "diff full.mem"] {
        work.fails(
            &format!("{verb} --pid {pid} --region ram -o {output} --force --quiet"),
            2,
            &["a link to an open file"],
        );
    }
}

/// Verifying checksums takes as long as the rest: all checks that can precede it must do so.
#[rstest]
#[case::merged("merge full.mem d1.mem -o none/out")]
#[case::converted("convert full.mem -o none/out")]
#[case::compared("diff raw:second full.mem -o none/out")]
#[case::restored("restore full.mem d1.mem -o none/out")]
fn a_place_for_the_output_is_made_before_sums_are_checked(#[case] command: &str) {
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    work.fails(command, 3, &["none"]);
}

/// The output is the same name, a hard link, or a symbolic link.
#[rstest]
#[case::dump("dump ram -o OUT --force", "ram")]
#[case::metadata("dump ram -o OUT --force --metadata full.mem", "full.mem")]
#[case::old("diff full.mem --ram ram -o OUT --force", "full.mem")]
#[case::new("diff full.mem --ram ram -o OUT --force", "ram")]
#[case::state("diff full.mem --to first -o OUT --force", "first")]
#[case::metadata_of_a_diff("diff full.mem --ram ram -o OUT --force --metadata first", "first")]
#[case::merged("merge full.mem d1.mem -o OUT --force", "d1.mem")]
#[case::converted("convert full.mem -o OUT --force", "full.mem")]
#[case::parent("convert ram --raw-diff --parent full.mem -o OUT --force", "full.mem")]
#[case::metadata_of_an_image("convert full.mem --metadata d1.mem -o OUT --force", "d1.mem")]
#[case::restored("restore full.mem d1.mem -o OUT --force", "d1.mem")]
#[case::picture("map OUT full.mem -o OUT --force", "full.mem")]
fn an_output_that_is_an_input_is_refused(#[case] command: &str, #[case] input: &str) {
    let work = Work::with_chain();
    fs::hard_link(work.path(input), work.path("hard.svg")).unwrap();
    std::os::unix::fs::symlink(input, work.path("soft.svg")).unwrap();
    let names = match command.starts_with("map") {
        true => ["hard.svg", "soft.svg", "hard.svg"],
        false => ["hard.svg", "soft.svg", input],
    };
    for name in names {
        let says = match command.starts_with("merge") {
            true => "would replace one of its inputs",
            false => "is one of the inputs",
        };
        work.fails(&command.replace("OUT", name), 2, &[name, says]);
    }
}

/// The output is no input, but its id is that of an image which the diff needs.
#[rstest]
#[case::full("convert d.raw --raw-diff --parent d1.mem --layout packed", "full.mem")]
#[case::diff("convert d.raw --raw-diff --parent d2.mem --layout packed", "d1.mem")]
#[case::merged("merge d1.mem d2.mem", "full.mem")]
#[case::merged_raw("merge d1.mem d2.mem --layout raw", "full.mem")]
fn an_output_that_the_diff_builds_on_is_refused(#[case] command: &str, #[case] output: &str) {
    let work = Work::with_chain();
    work.good("diff full.mem d1.mem --ram ram -o d.raw --layout raw");
    let before = work.read(output);
    work.fails(
        &format!("{command} -o {output} --force"),
        2,
        &[output, "builds on"],
    );
    assert!(work.read(output) == before);
    work.good(&format!("{command} -o new.mem"));
}

/// A file has different device and inode numbers in the layer and in the overlay.
#[cfg(target_os = "linux")]
#[rstest]
#[case::the_layer("restore raw:LAYER -o MERGED --force")]
#[case::the_overlay("restore raw:MERGED -o LAYER --force")]
#[case::a_dump("dump LAYER -o MERGED --force")]
#[case::merged("merge LAYER d1.mem -o MERGED --force")]
fn an_output_that_is_an_input_on_an_overlay_is_refused(
    #[case] command: &str,
    #[values("lower", "upper")] layer: &str,
) {
    use test_machine::{Overlay, TinyTmpfs};

    needs!(Root);
    let work = Work::with_chain();
    let layers = TinyTmpfs::new(64 << 20).unwrap();
    let [lower, upper, inside] = ["lower", "upper", "work"].map(|name| layers.path().join(name));
    for dir in [&lower, &upper, &inside] {
        fs::create_dir(dir).unwrap();
    }
    fs::copy(work.path("first"), layers.path().join(layer).join("image")).unwrap();
    let overlay = Overlay::of(&lower, &upper, &inside).unwrap();
    let stored = layers.path().join(layer).join("image");
    let merged = overlay.path().join("image");
    let says = match command.starts_with("merge") {
        true => "would replace one of its inputs",
        false => "is one of the inputs",
    };
    let command = command
        .replace("LAYER", stored.to_str().unwrap())
        .replace("MERGED", merged.to_str().unwrap());
    work.fails(&command, 2, &["image", says]);
    for path in [&stored, &merged] {
        assert!(fs::read(path).unwrap() == work.read("first"), "{path:?}");
    }
    if command.starts_with("restore") {
        let mut send = work.command(&format!("convert {} -o - --zstd", stored.display()));
        let stdout = fs::File::options().append(true).open(&merged).unwrap();
        // If the file was copied up to the upper layer, it is another file.
        if layer == "upper" {
            send.stdout(stdout);
            Ended::of(&mut send).fails(2, &["image", "stdout is the file"]);
        }
    }
}

#[test]
fn a_stream_is_not_written_to_the_file_it_comes_from() {
    let work = Work::with_chain();
    let open = || {
        fs::File::options()
            .read(true)
            .append(true)
            .open(work.path("full.mem"))
    };
    let before = work.read("full.mem");
    let mut receive = work.command("convert - --zstd -o full.mem --force");
    receive.stdin(open().unwrap());
    Ended::of(&mut receive).fails(2, &["full.mem", "one of the inputs"]);
    let mut send = work.command("convert full.mem -o - --zstd");
    send.stdout(open().unwrap());
    Ended::of(&mut send).fails(2, &["full.mem", "stdout is the file"]);
    assert!(work.read("full.mem") == before);
}

#[cfg(target_os = "linux")]
#[rstest]
#[case::dump("dump ../ram -o out")]
#[case::raw("dump ../ram -o out --layout raw --keep-zeros")]
#[case::merged("merge ../full.mem ../d1.mem -o out")]
#[case::restored("restore ../full.mem -o out")]
#[case::received("convert ../sealed.mem -o out --layout packed")]
fn a_full_disk_is_an_error_that_says_so_and_leaves_nothing(#[case] command: &str) {
    needs!(Root);
    let work = Work::with_chain();
    work.good("convert full.mem -o sealed.mem --layout sealed");
    let disk = test_machine::TinyTmpfs::new(128 << 10).unwrap();
    let command = command.replace("../", &format!("{}/", work.path("").display()));
    let mut command = work.command(&command);
    let ended = Ended::of(command.current_dir(disk.path()));
    ended.fails(3, &["make room"]);
    assert_eq!(support::list(disk.path()), [""; 0]);
}

/// The damage would be found only after the images were read.
#[cfg(target_os = "linux")]
#[rstest]
#[case::merged("merge ../full.mem ../d1.mem -o out")]
#[case::restored("restore ../full.mem -o out")]
#[case::converted("convert ../full.mem -o out --layout raw")]
fn a_disk_without_room_is_noticed_before_images_are_read(#[case] command: &str) {
    needs!(Root);
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    let disk = test_machine::TinyTmpfs::new(128 << 10).unwrap();
    let command = command.replace("../", &format!("{}/", work.path("").display()));
    let mut command = work.command(&command);
    let ended = Ended::of(command.current_dir(disk.path()));
    ended.fails(3, &["make room", "131072 are available"]);
    assert_eq!(support::list(disk.path()), [""; 0]);
}

/// A raw diff stores zeros that other images do not store.
#[cfg(target_os = "linux")]
#[test]
fn a_raw_diff_of_zeros_without_room_is_refused_before_writes() {
    use memory_writer::{Layout, MemoryWriter, Seal};

    needs!(Root);
    let work = Work::empty();
    let zeros = work.path("zeros.mem");
    let options = MemoryWriter::options()
        .layout(Layout::Packed)
        .seal(Seal::new().on_raw_image());
    let mut writer = options.open(&zeros, 1 << 40, 4096).unwrap();
    writer
        .write_zeros(|| std::iter::once(4096..1 << 40))
        .unwrap();
    writer.commit().unwrap();
    let disk = test_machine::TinyTmpfs::new(128 << 10).unwrap();
    let mut command = work.command(&format!("convert {} -o out --layout raw", zeros.display()));
    let ended = Ended::of(command.current_dir(disk.path()));
    let needed = format!("needs {} bytes", (1_u64 << 40) - 4096);
    ended.fails(3, &[&needed, "131072 are available"]);
    assert_eq!(support::list(disk.path()), [""; 0]);
}

/// The images are damaged: the limit is compared before their checksums.
#[rstest]
#[case::merge("merge full.mem d1.mem -o out", 100)]
#[case::merge_in_place("merge --in-place full.mem d1.mem", 100)]
#[case::convert("convert full.mem -o out --page-size 4K", 100)]
#[case::diffs("merge d1.mem d2.mem -o out", 8)]
fn a_limit_of_the_file_size_is_known_before_an_image_is_read(
    #[case] command: &str,
    #[case] kib: u64,
) {
    let work = Work::with_chain();
    for image in ["full.mem", "d1.mem"] {
        work.rot(image, 5000);
    }
    let before = work.contents();
    let script = format!("ulimit -f {}; exec {RAMSNAP} {command}", kib * 2);
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(work.path(""));
    Ended::of(&mut shell).fails(
        3,
        &["File too large", "RLIMIT_FSIZE", "nothing was written"],
    );
    assert!(work.contents() == before);
}

#[rstest]
#[case::pages(8)]
#[case::footer(460)]
fn a_limit_of_the_file_size_is_an_error_and_no_signal(#[case] kib: u64) {
    let work = Work::with_ram();
    let script = format!("ulimit -f {}; exec {RAMSNAP} dump ram -o out", kib * 2);
    let mut shell = Command::new("sh");
    // POSIX counts in blocks of 512 bytes; so does bash if it is run as sh.
    shell.args(["-c", &script]).current_dir(work.path(""));
    Ended::of(&mut shell).fails(3, &["out", "File too large"]);
    assert_eq!(work.files(), ["ram"]);
}
