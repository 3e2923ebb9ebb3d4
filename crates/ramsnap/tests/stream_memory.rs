//! The memory that sending a stream takes.

#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

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
