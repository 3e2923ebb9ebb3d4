//! The signals that threads block.

use std::fs;
use std::thread;

/// `SIGHUP`, `SIGINT`, `SIGUSR1`, `SIGALRM` and `SIGTERM` of Linux.
const FROM_OUTSIDE: [u32; 5] = [1, 2, 10, 14, 15];
/// `SIGILL`, `SIGBUS`, `SIGFPE` and `SIGSEGV` of Linux. Blocking them would end the process.
const OF_THE_THREAD: [u32; 4] = [4, 7, 8, 11];

/// Waits until this process has a thread with this name, and asserts that all threads with it block
/// the signals that other processes and timers send, and no others.
///
/// # Panics
/// Panics if a thread does not.
pub fn assert_handles_no_signals(thread: &str) {
    loop {
        let masks = masks_of(thread);
        for mask in &masks {
            assert_mask(mask);
        }
        if !masks.is_empty() {
            return;
        }
        thread::yield_now();
    }
}

/// Asserts that the calling thread blocks the signals that other processes and timers send, and no
/// others.
///
/// # Panics
/// Panics if it does not.
pub fn assert_this_thread_handles_no_signals() {
    let status = fs::read_to_string("/proc/thread-self/status").expect("a thread");
    assert_mask(mask_in(&status).expect("a mask"));
}

fn masks_of(name: &str) -> Vec<String> {
    let threads = fs::read_dir("/proc/self/task").expect("threads").flatten();
    threads
        .filter_map(|thread| {
            // The thread may have ended.
            let comm = fs::read_to_string(thread.path().join("comm")).ok()?;
            let status = fs::read_to_string(thread.path().join("status")).ok()?;
            let mask = mask_in(&status)?.to_owned();
            (comm.trim() == name).then_some(mask)
        })
        .collect()
}

fn mask_in(status: &str) -> Option<&str> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    mask.map(str::trim)
}

fn assert_mask(mask: &str) {
    let bits = u64::from_str_radix(mask, 16).expect("a mask");
    let blocked = |signal: u32| bits >> (signal - 1) & 1 == 1;
    for signal in FROM_OUTSIDE {
        assert!(blocked(signal), "signal {signal} is not blocked: {mask}");
    }
    for signal in OF_THE_THREAD {
        assert!(!blocked(signal), "signal {signal} is blocked: {mask}");
    }
}
