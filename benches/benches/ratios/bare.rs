//! The limits of packed images and of reading: the same bytes, without checks.

#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types::Fd};
use page_reader::PageReader;

use crate::cases::raw::{IN_FLIGHT, PIECE, change, replace, write};

/// Writes `runs` of `ram` contiguously to a new file, syncs it, and renames it to `dest`.
pub fn packed(dest: &Path, runs: &[Range<u64>], ram: &dyn PageReader) {
    replace(dest, |file| pack(file, runs, ram));
}

/// Writes `runs` of `ram` contiguously over the existing file, and syncs it.
pub fn packed_over(dest: &Path, runs: &[Range<u64>], ram: &dyn PageReader) {
    change(dest, |file| pack(file, runs, ram));
}

fn pack(file: &File, runs: &[Range<u64>], ram: &dyn PageReader) {
    let len: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let mut bytes = vec![0; len as usize + 4096];
    let start = bytes.as_ptr().align_offset(4096);
    let packed = &mut bytes[start..][..len as usize];
    let mut at = 0;
    for run in runs {
        let len = (run.end - run.start) as usize;
        let memory = ram.host_memory(run.start, len).unwrap();
        memory.copy_to(&mut packed[at..at + len]);
        at += len;
    }
    if file.metadata().unwrap().len() < len {
        file.set_len(len).unwrap();
    }
    write(file, &[0..len], &&*packed);
}

/// Reads all of a file with direct I/O, as fast as possible.
pub fn read(path: &Path) {
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap();
    let len = file.metadata().unwrap().len();
    let buffers: Vec<Vec<u8>> = (0..IN_FLIGHT).map(|_| vec![0; 2 * PIECE]).collect();
    let mut ring = IoUring::new(IN_FLIGHT).unwrap();
    let mut free: Vec<u64> = (0..u64::from(IN_FLIGHT)).collect();
    let mut at = 0;
    while at < len || free.len() < buffers.len() {
        while at < len
            && let Some(number) = free.pop()
        {
            let buffer = &buffers[number as usize];
            let start = buffer.as_ptr().align_offset(4096);
            let read = opcode::Read::new(
                Fd(file.as_raw_fd()),
                buffer[start..].as_ptr().cast_mut(),
                PIECE as u32,
            );
            // SAFETY: only the kernel uses the buffer until its completion was seen, and Rust reads
            // none of its bytes. The loop ends when nothing is in flight.
            unsafe {
                ring.submission()
                    .push(&read.offset(at).build().user_data(number))
                    .unwrap();
            }
            at += PIECE as u64;
        }
        ring.submit_and_wait(1).unwrap();
        for done in ring.completion() {
            assert!(done.result() > 0);
            free.push(done.user_data());
        }
    }
}
