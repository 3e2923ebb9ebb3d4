//! Images as compressed streams.

mod support;

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::process::{Command, Stdio};

use rstest::rstest;
use support::{Ended, RAMSNAP, Work};
#[cfg(target_os = "linux")]
use test_machine::needs;

#[rstest]
fn an_image_of_any_layout_arrives_as_it_was_sent(
    #[values("raw", "sealed", "packed")] from: &str,
    #[values("raw", "sealed", "packed")] to: &str,
) {
    let work = Work::with_ram();
    work.good(&format!("dump ram -o one --layout {from}"));
    let one = if from == "raw" { "raw:one" } else { "one" };
    let other = if to == "raw" { "raw:other" } else { "other" };
    let script = format!(
        "{RAMSNAP} convert {one} -o - --zstd | {RAMSNAP} convert - --zstd -o other --layout {to}"
    );
    let mut shell = Command::new("sh");
    Ended::of(shell.args(["-c", &script]).current_dir(work.path(""))).good();
    work.good(&format!("diff {other} --ram ram"));
    assert_eq!(work.files(), ["one", "other", "ram"]);
    if from != "raw" && to != "raw" {
        let info = work.good("info one other --json").json();
        assert_eq!(info[0]["id"], info[1]["id"]);
    }
}

#[test]
fn a_packed_image_and_a_diff_arrive_byte_for_byte() {
    let work = Work::with_chain();
    for name in ["full.mem", "d1.mem"] {
        send(&work, name);
        Ended::of(receive(&work).args(["-o", "arrived"])).good();
        work.assert_same("arrived", name);
        fs::remove_file(work.path("arrived")).unwrap();
    }
    // The stream has the format of zstd.
    assert_eq!(work.read("stream")[..4], [0x28, 0xb5, 0x2f, 0xfd]);
}

#[test]
fn a_stream_is_passed_on() {
    let work = Work::with_chain();
    send(&work, "full.mem");
    let mut pass = receive(&work);
    pass.args(["-o", "-"])
        .stdout(File::create(work.path("passed")).unwrap());
    assert!(pass.status().unwrap().success());
    fs::rename(work.path("passed"), work.path("stream")).unwrap();
    Ended::of(receive(&work).args(["-o", "arrived"])).good();
    work.assert_same("arrived", "full.mem");
}

#[rstest]
#[case::cut_short(|bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2))]
#[case::flipped(|bytes: &mut Vec<u8>| { let middle = bytes.len() / 2; bytes[middle] ^= 1; })]
#[case::nothing(|bytes: &mut Vec<u8>| bytes.clear())]
#[case::something_else(|bytes: &mut Vec<u8>| *bytes = b"not a stream".to_vec())]
fn an_incomplete_stream_is_refused_before_the_output_appears(#[case] spoil: fn(&mut Vec<u8>)) {
    let work = Work::with_chain();
    send(&work, "full.mem");
    let mut bytes = work.read("stream");
    spoil(&mut bytes);
    fs::write(work.path("stream"), bytes).unwrap();
    let before = work.files();
    Ended::of(receive(&work).args(["-o", "arrived"])).fails(1, &["stream"]);
    assert_eq!(work.files(), before);
}

/// For example, sent with --no-verify: the stream is whole, and the image in it is damaged.
#[test]
fn a_damaged_image_in_a_whole_stream_is_refused() {
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    let stream = File::create(work.path("stream")).unwrap();
    let mut command = work.command("convert full.mem -o - --zstd --no-verify");
    assert!(command.stdout(stream).status().unwrap().success());
    let before = work.files();
    Ended::of(receive(&work).args(["-o", "arrived"])).fails(1, &["stream is damaged in 1 place"]);
    assert_eq!(work.files(), before);
}

/// Returns a pipe whose reader is closed.
fn closed() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[rstest]
#[case::as_it_is("convert full.mem -o - --zstd")]
#[case::packed_first("convert raw:ram -o - --zstd")]
fn a_stream_whose_reader_has_gone_is_an_error(#[case] command: &str) {
    let work = Work::with_chain();
    let before = work.files();
    let mut command = work.command(command);
    command.stdout(closed()).env("TMPDIR", work.path(""));
    Ended::of(&mut command).fails(3, &["not sent whole", "Broken pipe"]);
    assert_eq!(work.files(), before);
}

#[rstest]
#[case::dump("dump ram -o out", 0)]
#[case::info("info full.mem d1.mem", 0)]
#[case::compare("diff full.mem --ram ram", 1)]
#[case::completions("completions bash", 0)]
#[case::demo("demo", 0)]
fn a_reader_that_has_gone_does_not_change_what_is_done(#[case] command: &str, #[case] code: i32) {
    let work = Work::with_chain();
    for both in [false, true] {
        let mut command = work.command(&command.replace("out", &format!("out-{both}")));
        command.stdout(closed());
        if both {
            command.stderr(closed());
        }
        assert_eq!(command.status().unwrap().code(), Some(code), "{both}");
    }
}

#[test]
fn an_image_whose_description_cannot_be_printed_is_in_place() {
    let work = Work::with_ram();
    let full = File::options().write(true).open("/dev/full");
    let Ok(full) = full else {
        test_machine::not_run(
            "an_image_whose_description_cannot_be_printed_is_in_place",
            "this machine has no /dev/full",
        );
        return;
    };
    let mut command = work.command("dump ram -o out");
    Ended::of(command.stdout(full)).fails(3, &["in place"]);
    work.good("diff out --ram ram");
}

fn send(work: &Work, name: &str) {
    let stream = File::create(work.path("stream")).unwrap();
    let mut command = work.command(&format!("convert {name} -o - --zstd"));
    assert!(command.stdout(stream).status().unwrap().success());
}

fn receive(work: &Work) -> Command {
    let mut command = work.command("convert - --zstd");
    let stream = File::open(work.path("stream")).unwrap();
    command.stdin(Stdio::from(stream));
    command
}

#[test]
fn no_name_in_the_temporary_directory_blocks_a_stream() {
    let work = Work::with_ram();
    std::fs::create_dir_all(work.path("tmp/ramsnap-stream/taken")).unwrap();
    let mut command = work.command("convert raw:ram -o - --zstd");
    let output = command.env("TMPDIR", work.path("tmp")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(support::list(&work.path("tmp")), ["ramsnap-stream"]);
}

/// The stream must not be read first, as it may take hours to arrive.
#[rstest]
#[case::no_metadata("-o out --metadata none", 3, &["cannot read the metadata", "none"])]
#[case::large_metadata("-o out --metadata large", 2, &["large", "more than 16 MiB"])]
#[case::regions("-o out --region-at 4096:4096 --region-at 0:4096", 2, &["regions"])]
#[case::a_parent("-o out --raw-diff --parent full.mem", 2, &["leave out --raw-diff"])]
#[case::a_format("-o out --format raw", 2, &["any format but packed"])]
#[case::no_directory("-o none/out", 3, &["none"])]
#[case::a_directory("-o dir --force", 2, &["dir"])]
#[case::a_dangling_link("-o link --force", 3, &["link"])]
#[case::a_file_that_exists("-o ram", 2, &["ram", "--force"])]
fn errors_known_in_advance_precede_reading_the_stream(
    #[case] arguments: &str,
    #[case] code: i32,
    #[case] words: &[&str],
) {
    let work = Work::with_chain();
    send(&work, "full.mem");
    work.create("large", (16 << 20) + 1);
    fs::create_dir(work.path("dir")).unwrap();
    std::os::unix::fs::symlink("nowhere", work.path("link")).unwrap();
    let before = work.files();
    let mut stdin = File::open(work.path("stream")).unwrap();
    let mut command = work.command(&format!("convert - --zstd {arguments}"));
    command.stdin(stdin.try_clone().unwrap());
    Ended::of(&mut command).fails(code, words);
    assert_eq!(stdin.stream_position().unwrap(), 0, "bytes were read");
    assert_eq!(work.files(), before);
}

/// Writes a compressed stream without its end.
fn begun(work: &Work, bytes: &[u8]) {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.flush().unwrap();
    fs::write(work.path("stream"), encoder.get_ref()).unwrap();
}

/// Writes a complete compressed stream.
fn compressed(work: &Work, bytes: &[u8]) {
    let stream = zstd::encode_all(bytes, 1).unwrap();
    fs::write(work.path("stream"), stream).unwrap();
}

/// Receives the stream with a limit of the file size in KiB.
fn receive_limited(work: &Work, kib: usize, arguments: &str) -> Ended {
    let script = format!(
        "ulimit -f {}; exec {RAMSNAP} convert - --zstd {arguments} < stream",
        kib * 2
    );
    let mut shell = Command::new("sh");
    Ended::of(shell.args(["-c", &script]).current_dir(work.path("")))
}

#[test]
fn the_first_page_of_a_stream_says_that_pages_are_too_large() {
    let work = Work::with_chain();
    begun(&work, &work.read("d1.mem")[..4096]);
    let mut receive = receive(&work);
    let ended = Ended::of(receive.args(["-o", "out", "--page-size", "16K"]));
    ended.fails(2, &["at most 4096"]);
}

#[cfg(target_os = "linux")]
#[rstest]
#[case::as_it_is("", 1)]
#[case::written_twice(" --layout sealed", 2)]
fn the_first_page_of_a_stream_says_that_there_is_no_room(#[case] more: &str, #[case] times: u64) {
    needs!(Root);
    let work = Work::with_chain();
    let bytes = work.read("full.mem");
    begun(&work, &bytes[..4096]);
    let room = (bytes.len() as u64 * times - 8192) / 4096 * 4096;
    let disk = test_machine::TinyTmpfs::new(room).unwrap();
    let mut receive = work.command(&format!("convert - --zstd -o out{more}"));
    receive
        .stdin(File::open(work.path("stream")).unwrap())
        .current_dir(disk.path());
    Ended::of(&mut receive).fails(3, &["make room", &format!("{room} are available")]);
    assert_eq!(support::list(disk.path()), [""; 0]);
}

#[rstest]
#[case::zeros(|_: &Work| vec![0; 64 << 20])]
#[case::a_sealed_image(|work: &Work| {
    work.good("convert full.mem -o sealed.mem --layout sealed");
    work.read("sealed.mem")
})]
#[case::a_damaged_header(|work: &Work| {
    let mut bytes = work.read("full.mem");
    bytes[48] ^= 1;
    bytes
})]
#[case::less_than_a_page(|work: &Work| work.read("full.mem")[..4000].to_vec())]
fn a_stream_of_another_format_is_refused_by_its_first_page(
    #[case] bytes: fn(&Work) -> Vec<u8>,
    #[values("", " --layout raw")] more: &str,
) {
    let work = Work::with_chain();
    compressed(&work, &bytes(&work));
    let before = work.files();
    let ended = receive_limited(&work, 0, &format!("-o out{more}"));
    ended.fails(1, &["stream does not begin as a packed image"]);
    assert_eq!(work.files(), before);
}

#[rstest]
fn a_stream_that_goes_on_is_written_no_further_than_its_image(
    #[values("", " --layout sealed")] more: &str,
) {
    let work = Work::with_chain();
    let mut bytes = work.read("full.mem");
    let len = bytes.len();
    bytes.resize(len + (64 << 20), 0);
    compressed(&work, &bytes);
    let before = work.files();
    let ended = receive_limited(&work, len.div_ceil(1024), &format!("-o out{more}"));
    ended.fails(1, &["stream goes on", &len.to_string()]);
    assert_eq!(work.files(), before);
}

#[test]
fn a_truncated_stream_is_refused_with_its_length() {
    let work = Work::with_chain();
    let bytes = work.read("full.mem");
    compressed(&work, &bytes[..bytes.len() - 100]);
    let before = work.files();
    let says = format!(
        "after {} bytes of an image of {}",
        bytes.len() - 100,
        bytes.len()
    );
    Ended::of(receive(&work).args(["-o", "out"])).fails(1, &[&says]);
    assert_eq!(work.files(), before);
}

#[test]
fn a_limit_of_the_file_size_is_known_by_the_first_page() {
    let work = Work::with_chain();
    begun(&work, &work.read("full.mem")[..4096]);
    let before = work.files();
    receive_limited(&work, 64, "-o out").fails(3, &["cannot keep", "File too large"]);
    assert_eq!(work.files(), before);
}

#[cfg(target_os = "linux")]
#[test]
fn if_a_stream_fills_the_disk_the_error_names_it() {
    needs!(Strace);
    let work = Work::with_chain();
    send(&work, "full.mem");
    let len = work.read("full.mem").len();
    let before = work.files();
    // Only the first page is written.
    let inject = "inject=write:error=ENOSPC:when=2";
    let mut strace = Command::new("strace");
    strace
        .args([
            "-o",
            "/dev/null",
            "-e",
            "trace=write",
            "-e",
            inject,
            RAMSNAP,
        ])
        .args(["convert", "-", "--zstd", "-o", "out", "--layout", "raw"])
        .current_dir(work.path(""))
        .stdin(File::open(work.path("stream")).unwrap());
    let full = format!("4096 of {len} bytes of the stream were written");
    Ended::of(&mut strace).fails(
        3,
        &["the file system", "is full", &full, "more are available"],
    );
    assert_eq!(work.files(), before);
}

/// The stream has begun, and stalls.
#[cfg(target_os = "linux")]
#[test]
fn a_partly_received_stream_has_no_name_and_is_private() {
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};

    let work = Work::with_chain();
    let mut shell = Command::new("sh");
    let script = format!("umask 0; exec {RAMSNAP} convert - --zstd -o out --layout raw");
    let mut child = shell
        .args(["-c", &script])
        .current_dir(work.path(""))
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    begun(&work, &work.read("full.mem")[..100_000]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&work.read("stream")).unwrap();
    let is_there = || {
        let links = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        let links = links.filter_map(|link| Some(link.ok()?.path()));
        let is_nameless = |target: &std::path::Path| {
            target.starts_with(work.path("")) && target.to_string_lossy().ends_with("(deleted)")
        };
        let mut spools = links.filter(|link| fs::read_link(link).is_ok_and(|it| is_nameless(&it)));
        let found = spools.next()?.metadata().ok()?;
        (found.size() > 0).then_some(found.mode() & 0o7777)
    };
    let start = Instant::now();
    let mode = loop {
        if let Some(mode) = is_there() {
            break mode;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "no such file");
        std::thread::yield_now();
    };
    assert_eq!(mode, 0o600);
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(
        work.files(),
        [
            "d1.mem", "d2.mem", "first", "full.mem", "ram", "second", "stream"
        ]
    );
}
