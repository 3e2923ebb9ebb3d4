//! Output of the tool: reports that cannot be written, paths that are not UTF-8, and failures of
//! one of several files.

#![cfg(target_os = "linux")]

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::Command;

use rstest::rstest;
use support::{Ended, Work};

const ORPHAN: &str = ".atomic-file-00000000-0123456789abcdef.stage";

/// The manual has a page for each verb.
const PAGES: &str = match cfg!(target_os = "linux") {
    true => "out: 21 pages",
    false => "out: 20 pages",
};

/// Runs the command with a standard output that is full.
#[rstest]
#[case::dump("dump ram -o out", "out", "out: packed full image")]
#[case::diff("diff full.mem --ram ram -o out", "out", "out: packed diff image")]
#[case::merged("merge full.mem d1.mem -o out", "out", "out: packed full image")]
#[case::converted("convert full.mem -o out --layout raw", "out", "out: raw image")]
#[case::restored("restore full.mem -o out", "out", "out: raw image")]
#[case::in_place("restore full.mem -o target", "target", "target: 8.00 MiB of RAM")]
#[case::drawn("map full.mem -o out.svg", "out.svg", "out.svg: ")]
#[case::manual("man out", "out/ramsnap.1", PAGES)]
fn a_report_that_cannot_be_written_says_what_was_done(
    #[case] command: &str,
    #[case] made: &str,
    #[case] report: &str,
) {
    let work = Work::with_chain();
    work.create("target", support::RAM);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = work
        .command(command)
        .stdout(full)
        .stderr(std::process::Stdio::piped())
        .spawn();
    let output = child.unwrap().wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    for words in ["the work is done", "stdout", report, "No space left"] {
        assert!(error.contains(words), "no {words} in {error}");
    }
    let metadata = fs::metadata(work.path(made)).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) > 0);
}

#[rstest]
#[case::text("sweep dir", "1 file removed")]
#[case::json("sweep --json dir", "\"removed\"")]
fn a_sweep_whose_report_cannot_be_written_says_what_it_did(
    #[case] command: &str,
    #[case] report: &str,
) {
    let work = Work::empty();
    fs::create_dir(work.path("dir")).unwrap();
    fs::write(work.path("dir").join(ORPHAN), "").unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = work
        .command(command)
        .stdout(full)
        .stderr(std::process::Stdio::piped())
        .spawn();
    let output = child.unwrap().wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    for words in ["the work is done", ORPHAN, report] {
        assert!(error.contains(words), "no {words} in {error}");
    }
    assert_eq!(support::list(&work.path("dir")), [""; 0]);
}

#[test]
fn paths_that_are_not_utf8_are_given_as_text_and_bytes() {
    let work = Work::with_chain();
    let name = OsStr::from_bytes(b"odd\xff.mem");
    fs::rename(work.path("full.mem"), work.path("").join(name)).unwrap();
    let expected =
        serde_json::json!({ "text": "odd\u{fffd}.mem", "bytes_hex": "6f6464ff2e6d656d" });
    let run = |verb: &str| {
        let mut command = work.command(verb);
        Ended::of(command.arg("--json").arg(name)).good().json()
    };
    assert_eq!(run("info")[0]["file"], expected);
    assert_eq!(run("map")[0]["file"], expected);
    assert_eq!(run("verify")["files"][0]["file"], expected);
    // Other paths are strings.
    assert_eq!(work.good("info --json d1.mem").json()[0]["file"], "d1.mem");
    let dir = OsStr::from_bytes(b"dir\xfe");
    fs::create_dir(work.path("").join(dir)).unwrap();
    let path: PathBuf = [dir, OsStr::new(ORPHAN)].iter().collect();
    fs::write(work.path("").join(&path), "").unwrap();
    let mut command = work.command("sweep --json");
    let found = Ended::of(command.arg(dir)).good().json();
    let removed = &found["removed"][0];
    let text = format!("dir\u{fffd}/{ORPHAN}");
    assert_eq!(removed["text"], text.as_str());
    let hex = removed["bytes_hex"].as_str().unwrap();
    assert!(hex.starts_with("646972fe2f"), "{hex}");
    assert!(!work.path("").join(&path).exists());
    for verb in ["info", "map", "verify", "sweep"] {
        let help = work.good(&format!("{verb} --help")).out;
        assert!(help.contains("not UTF-8"), "{help}");
    }
}

#[rstest]
#[case::text("")]
#[case::dry("--dry-run ")]
#[case::recovering("--recover ")]
#[case::json("--json ")]
fn a_sweep_goes_on_after_a_directory_that_fails(#[case] flags: &str) {
    let work = Work::empty();
    for dir in ["one", "other"] {
        fs::create_dir(work.path(dir)).unwrap();
        fs::write(work.path(dir).join(ORPHAN), "").unwrap();
    }
    fs::write(work.path("file"), "").unwrap();
    let ended = work.run(&format!("sweep {flags}one missing file other"));
    let ended = ended.fails(
        3,
        &["\"missing\"", "\"file\"", "No such file", "Not a directory"],
    );
    if flags == "--json " {
        let found = ended.json();
        assert_eq!(found["removed"].as_array().unwrap().len(), 2, "{found}");
        assert_eq!(found["failed"][0]["dir"], "missing");
        assert_eq!(found["failed"][1]["dir"], "file");
        let reason = found["failed"][1]["reason"].as_str().unwrap();
        assert!(reason.contains("Not a directory"), "{found}");
    } else {
        assert!(ended.out.contains("2 files"), "{ended:?}");
        assert!(ended.out.contains("2 failures"), "{ended:?}");
    }
    for dir in ["one", "other"] {
        let left = support::list(&work.path(dir)).len();
        assert_eq!(left, usize::from(flags == "--dry-run "), "{dir}");
    }
}

#[test]
fn checks_go_on_after_a_file_that_cannot_be_read() {
    let work = Work::with_chain();
    let info = work.run("info full.mem none.mem d1.mem");
    let info = info.fails(3, &["none.mem", "No such file"]);
    assert!(info.out.contains("full.mem: packed") && info.out.contains("d1.mem: packed"));
    let json = work
        .run("info --json none.mem d1.mem")
        .fails(3, &["none.mem"]);
    assert_eq!(json.json()[0]["file"], "d1.mem");
    let checked = work.run("verify full.mem none.mem d1.mem");
    let checked = checked.fails(3, &["none.mem", "No such file"]);
    for line in ["full.mem: whole", "none.mem: NOT READ: ", "d1.mem: whole"] {
        assert!(checked.out.contains(line), "{checked:?}");
    }
    let json = work
        .run("verify --json none.mem d1.mem")
        .fails(3, &[])
        .json();
    assert_eq!(json["good"], false);
    assert_eq!(json["files"][0]["state"], "unreadable");
    assert_eq!(json["files"][1]["state"], "whole");
}

#[test]
fn errors_name_commands_and_options_not_functions() {
    let work = Work::with_chain();
    let receive = |bytes: &[u8]| {
        fs::write(work.path("stream"), bytes).unwrap();
        let mut command = work.command("convert - --zstd -o out");
        command.stdin(File::open(work.path("stream")).unwrap());
        Ended::of(&mut command)
    };
    let sent = Command::new(support::RAMSNAP)
        .args(["convert", "full.mem", "-o", "-", "--zstd"])
        .current_dir(work.path(""))
        .output()
        .unwrap()
        .stdout;
    for bytes in [b"no stream", &sent[..sent.len() / 2], &sent[..3]] {
        let ended = receive(bytes);
        assert_eq!(
            ended.err,
            "error: the stream is cut short, or not one that `ramsnap convert --zstd` wrote: send it again\n"
        );
    }
    // An invalid number, a page size larger than that of an image, metadata that a raw image would
    // lose.
    work.fails("dump ram -o out --region-at 0x:4KiB", 2, &["give a number"]);
    work.fails(
        "merge full.mem d1.mem -o out --page-size 8KiB",
        2,
        &["--page-size"],
    );
    fs::write(work.path("vcpus"), "registers").unwrap();
    let lost = "convert raw:ram -o out --metadata vcpus";
    work.fails(lost, 2, &["no parent, id or metadata"]);
}

/// The path of the working directory is longer than the limit for absolute paths.
#[test]
fn raw_outputs_beyond_absolute_paths_are_described_and_read() {
    let work = Work::with_chain();
    let dir = work.path("").display().to_string();
    let (ramsnap, ram) = (support::RAMSNAP, work.path("ram").display().to_string());
    let script = format!(
        "set -e; cd {dir}; name=$(printf 'd%.0s' $(seq 250)); \
         for level in $(seq 20); do mkdir $name; cd -P $name; done; \
         {ramsnap} dump {ram} -o x.raw --layout raw; \
         {ramsnap} diff {dir}/full.mem --ram {ram} -o d.raw --layout raw; \
         {ramsnap} restore {dir}/full.mem -o new; \
         {ramsnap} restore {dir}/full.mem raw:d.raw -o again; \
         cmp again x.raw"
    );
    support::Ended::of(std::process::Command::new("sh").args(["-c", &script])).good();
}

/// The limit does not apply to root.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_threads_is_named_or_tolerated() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    test_machine::needs!(Root);
    const USER: u32 = 1_234_567;
    let work = Work::with_chain();
    let public = tempfile::tempdir().unwrap();
    let open_to_all = || fs::Permissions::from_mode(0o755);
    fs::set_permissions(public.path(), open_to_all()).unwrap();
    let copies = [
        (work.path("full.mem"), public.path().join("full.mem")),
        (support::RAMSNAP.into(), public.path().join("ramsnap")),
    ];
    for (from, to) in copies {
        fs::copy(from, &to).unwrap();
        fs::set_permissions(to, open_to_all()).unwrap();
    }
    let limited = |threads: u32| {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nproc={threads}"));
        command.arg(public.path().join("ramsnap"));
        command.args(["convert", "full.mem", "-o", "-", "--zstd"]);
        command.current_dir(public.path()).uid(USER).gid(USER);
        command.output().unwrap()
    };
    let refused = limited(1);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{error}");
    assert!(error.contains("ulimit -u"), "{error}");
    // One thread to listen for signals, and none to compress.
    let sent = limited(2);
    assert!(sent.status.success(), "{sent:?}");
    fs::write(work.path("stream"), sent.stdout).unwrap();
    let mut receive = work.command("convert - --zstd -o got.mem");
    receive.stdin(File::open(work.path("stream")).unwrap());
    Ended::of(&mut receive).good();
    assert!(work.read("got.mem") == work.read("full.mem"));
}

#[test]
fn a_stream_is_sent_whole_to_a_nonblocking_pipe() {
    use std::io::Read as _;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let work = Work::with_chain();
    let (mut reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    // Fill the pipe, so that the first write of the stream already has to wait.
    let filled = fill(&writer);
    let mut send = work.command("convert full.mem -o - --zstd");
    send.stdout(writer).stderr(std::process::Stdio::piped());
    let mut sender = send.spawn().unwrap();
    drop(send);
    while sender.try_wait().unwrap().is_none() && !waits_in_poll(sender.id()) {
        std::thread::yield_now();
    }
    let mut stream = Vec::new();
    reader.read_to_end(&mut stream).unwrap();
    let sent = sender.wait_with_output().unwrap();
    assert!(sent.status.success(), "{sent:?}");
    fs::write(work.path("stream"), &stream[filled..]).unwrap();
    let mut receive = work.command("convert - --zstd -o got.mem");
    receive.stdin(File::open(work.path("stream")).unwrap());
    Ended::of(&mut receive).good();
    assert!(work.read("got.mem") == work.read("full.mem"));
}

/// Writes to a nonblocking pipe until it is full. Returns the number of bytes.
fn fill(mut pipe: &std::io::PipeWriter) -> usize {
    use std::io::Write as _;
    let mut filled = 0;
    while let Ok(written) = pipe.write(&[0; 4096]) {
        filled += written;
    }
    filled
}

/// Returns whether the main thread of the process waits in `poll(2)`.
fn waits_in_poll(pid: u32) -> bool {
    use nix::libc;
    #[cfg(target_arch = "x86_64")]
    const CALLS: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_ppoll];
    #[cfg(not(target_arch = "x86_64"))]
    const CALLS: &[libc::c_long] = &[libc::SYS_ppoll];
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let number = call
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    number.is_some_and(|number| CALLS.contains(&number))
}

/// The mode of a replaced file is kept, also one that does not let its owner read the image.
#[test]
fn an_output_that_its_owner_may_not_read_is_reported() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
    use std::os::unix::process::CommandExt as _;
    test_machine::needs!(Root);
    const USER: u32 = 1_234_567;
    let work = Work::with_chain();
    let public = tempfile::tempdir().unwrap();
    let files = [
        (work.path("full.mem"), "full.mem", 0o644),
        (work.path("d1.mem"), "d1.mem", 0o644),
        (work.path("full.mem"), "out", 0o200),
        (support::RAMSNAP.into(), "ramsnap", 0o755),
    ];
    for (from, to, mode) in files {
        let to = public.path().join(to);
        fs::copy(from, &to).unwrap();
        chown(&to, Some(USER), Some(USER)).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(mode)).unwrap();
    }
    chown(public.path(), Some(USER), Some(USER)).unwrap();
    let mut merge = Command::new(public.path().join("ramsnap"));
    merge.args(["merge", "full.mem", "d1.mem", "-o", "out", "--force"]);
    merge.current_dir(public.path()).uid(USER).gid(USER);
    let out = Ended::of(&mut merge).good().out;
    assert!(out.starts_with("out: packed full image of"), "{out}");
    let out = public.path().join("out");
    assert_eq!(fs::metadata(&out).unwrap().mode() & 0o777, 0o200);
    work.good("merge full.mem d1.mem -o expected");
    assert!(fs::read(out).unwrap() == work.read("expected"));
}

/// A name must not begin a line of its own, or control the terminal.
#[rstest]
#[case::info("info")]
#[case::verify("verify")]
#[case::map("map full.mem")]
#[case::dump("dump ram --force -o")]
#[case::restore("restore full.mem --force -o")]
#[case::converted("convert raw:ram --force -o")]
fn a_name_that_is_not_plain_is_printed_as_in_errors(#[case] command: &str) {
    let work = Work::with_chain();
    let name = "two\nlines\x1b[31m";
    work.copy(
        if command.contains("restore") {
            "ram"
        } else {
            "full.mem"
        },
        name,
    );
    let ended = Ended::of(work.command(command).arg(name)).good();
    let lines = |text: &str| text.lines().any(|line| line.starts_with("lines"));
    assert!(!ended.out.contains("\x1b[31m"), "{ended:?}");
    assert!(!lines(&ended.out), "{ended:?}");
    assert!(
        ended.out.contains("\"two\\nlines\\u{1b}[31m\""),
        "{ended:?}"
    );
}
