//! Images as compressed streams.

mod support;

use std::fs::{self, File};
use std::process::{Command, Stdio};

use rstest::rstest;
use support::{Ended, MEMSNAP, Work};

#[rstest]
fn an_image_arrives_as_it_was_sent_whatever_its_layout(
    #[values("raw", "sealed", "packed")] from: &str,
    #[values("raw", "sealed", "packed")] to: &str,
) {
    let work = Work::with_ram();
    work.good(&format!("full ram -o one --layout {from}"));
    let one = if from == "raw" { "raw:one" } else { "one" };
    let other = if to == "raw" { "raw:other" } else { "other" };
    let script = format!(
        "{MEMSNAP} convert {one} -o - --zstd | {MEMSNAP} convert - --zstd -o other --layout {to}"
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
    // It is zstd's own format.
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
fn a_stream_that_is_not_whole_is_refused_before_the_output_appears(
    #[case] spoil: fn(&mut Vec<u8>),
) {
    let work = Work::with_chain();
    send(&work, "full.mem");
    let mut bytes = work.read("stream");
    spoil(&mut bytes);
    fs::write(work.path("stream"), bytes).unwrap();
    let before = work.files();
    Ended::of(receive(&work).args(["-o", "arrived"])).fails(1, &["stream"]);
    assert_eq!(work.files(), before);
}

/// Sent with --no-verify, say: the stream is whole, the image in it isn't.
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

/// A pipe that nothing reads any more.
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
#[case::full("full ram -o out", 0)]
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
    let mut command = work.command("full ram -o out");
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
    std::fs::create_dir_all(work.path("tmp/memsnap-stream/taken")).unwrap();
    let mut command = work.command("convert raw:ram -o - --zstd");
    let output = command.env("TMPDIR", work.path("tmp")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(support::list(&work.path("tmp")), ["memsnap-stream"]);
}
