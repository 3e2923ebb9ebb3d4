//! The memory that sending and receiving a stream takes.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use support::{Work, noise};

/// Returns the peak of the resident memory so far, in bytes.
fn peak_of(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// `stream/compression.rs` bounds it for any number of CPUs.
#[test]
fn the_memory_of_a_sender_does_not_depend_on_the_image() {
    const MIB: u64 = 1 << 20;
    let work = Work::empty();
    let ram = work.create("ram", 128 * MIB);
    // It repeats beyond any window, and does not compress.
    let part = noise(1, 16 * MIB);
    for at in 0..8 {
        ram.write_all_at(&part, at * 16 * MIB).unwrap();
    }
    work.good("dump ram -o full.mem");
    let mut command = work.command("convert full.mem -o - --zstd");
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stream = child.stdout.take().unwrap();
    let (mut buffer, mut sent, mut peak) = (vec![0; MIB as usize], 0, 0);
    loop {
        let len = stream.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        sent += len as u64;
        peak = peak.max(peak_of(child.id()).unwrap_or(0));
    }
    assert!(child.wait().unwrap().success());
    assert!(sent > 128 * MIB, "{sent}");
    assert!(peak > 0 && peak <= 48 * MIB, "{peak}");
}

/// The report waits for room in a full pipe, so that the peak is read once all work is done. The
/// stream has the largest window that is received.
#[test]
fn the_memory_of_a_receiver_does_not_depend_on_the_image() {
    const MIB: u64 = 1 << 20;
    let work = Work::empty();
    let ram = work.create("ram", 128 * MIB);
    let part = noise(1, 16 * MIB);
    for at in 0..8 {
        ram.write_all_at(&part, at * 16 * MIB).unwrap();
    }
    work.good("dump ram -o full.mem");
    let mut stream = zstd::Encoder::new(Vec::new(), 1).unwrap();
    stream.window_log(23).unwrap();
    stream.write_all(&work.read("full.mem")).unwrap();
    fs::write(work.path("stream"), stream.finish().unwrap()).unwrap();
    for layout in ["packed", "sealed"] {
        let out = format!("{layout}.mem");
        let (reader, writer) = std::io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while (&writer).write(&[0; 4096]).is_ok() {}
        let mut command = work.command(&format!("convert - --zstd -o {out} --layout {layout}"));
        command.stdin(File::open(work.path("stream")).unwrap());
        let mut child = command.stdout(writer).spawn().unwrap();
        drop(command);
        while !work.path(&out).exists() {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        let peak = peak_of(child.id()).unwrap();
        drop(reader);
        assert!(child.wait().unwrap().success());
        assert!(peak > MIB && peak <= 48 * MIB, "{layout}: {peak}");
    }
}
