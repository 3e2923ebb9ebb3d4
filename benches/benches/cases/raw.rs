//! The limit: writes the same bytes to the same offsets with a bare io_uring writer and direct I/O,
//! makes them durable and renames the file like a snapshot. It does none of the checks of a
//! snapshot.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types::Fd};
use page_reader::PageReader;

pub const PIECE: usize = 1 << 20;
pub const IN_FLIGHT: u32 = 32;

/// Writes `runs` of `ram` to a new file, syncs it, and renames it to `dest`.
pub fn fresh(dest: &Path, size: u64, runs: &[Range<u64>], ram: &dyn PageReader) {
    replace(dest, |file| {
        file.set_len(size).unwrap();
        write(file, runs, ram);
    });
}

/// Overwrites the existing file, and syncs it.
pub fn overwrite(dest: &Path, runs: &[Range<u64>], ram: &dyn PageReader) {
    change(dest, |file| write(file, runs, ram));
}

/// Calls `fill` with a new file, syncs it, and renames it to `dest`.
pub fn replace(dest: &Path, fill: impl FnOnce(&File)) {
    let stage = dest.with_extension("raw");
    let file = open(&stage, true);
    fill(&file);
    file.sync_all().unwrap();
    fs::rename(&stage, dest).unwrap();
    File::open(dest.parent().unwrap())
        .unwrap()
        .sync_all()
        .unwrap();
}

/// Calls `fill` with the existing file, and syncs it.
pub fn change(dest: &Path, fill: impl FnOnce(&File)) {
    let file = open(dest, false);
    fill(&file);
    file.sync_all().unwrap();
}

/// Opens a file for direct writes.
fn open(path: &Path, create: bool) -> File {
    let mut options = File::options();
    options
        .write(true)
        .create(create)
        .custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// Writes `runs` of `ram` to their offsets.
pub fn write(file: &File, runs: &[Range<u64>], ram: &dyn PageReader) {
    let mut ring = IoUring::new(IN_FLIGHT).unwrap();
    let mut in_flight = 0;
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let len = (run.end - at).min(PIECE as u64 - at % PIECE as u64) as usize;
            let memory = ram.host_memory(at, len).unwrap();
            let write =
                opcode::Write::new(Fd(file.as_raw_fd()), memory.as_ptr(), memory.len() as u32);
            let entry = write.offset(at).build().user_data(memory.len() as u64);
            if in_flight == IN_FLIGHT {
                reap(&mut ring, &mut in_flight, 1);
            }
            // SAFETY: the guest's memory stays mapped and the file open until `reap` has seen the
            // completion of everything submitted.
            unsafe { ring.submission().push(&entry).unwrap() };
            in_flight += 1;
            if in_flight % 8 == 0 {
                ring.submit().unwrap();
            }
            at += memory.len() as u64;
        }
    }
    let all = in_flight as usize;
    reap(&mut ring, &mut in_flight, all);
}

fn reap(ring: &mut IoUring, in_flight: &mut u32, at_least: usize) {
    ring.submit_and_wait(at_least).unwrap();
    for done in ring.completion() {
        assert_eq!(i64::from(done.result()), done.user_data() as i64);
        *in_flight -= 1;
    }
}
