//! The limit of tracking by userfaultfd: a handler that unprotects each written page, and does
//! nothing else.

#![allow(
    unsafe_code,
    reason = "a SAFETY comment states why the memory may be registered"
)]

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use kvm_backend::GuestRam;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_reader::PageReader;
use uffd::{Event, Features, Modes, Userfaultfd};

/// All of a guest's RAM is protected when this is created, and each page until its first write.
pub struct BareHandler {
    hang_up: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl BareHandler {
    pub fn start(ram: &GuestRam) -> Self {
        let features = Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED;
        let fault = Userfaultfd::options().features(features).open().unwrap();
        let memory = ram.host_memory(0, usize::MAX).unwrap();
        let start = memory.as_ptr().addr() as u64;
        let all = start..start + memory.len() as u64;
        // SAFETY: the caller keeps the RAM, and missing pages are filled as before.
        unsafe { fault.register(all.clone(), Modes::WRITE_PROTECT) }.unwrap();
        fault.write_protect(all).unwrap();
        let (closed, hang_up) = io::pipe().unwrap();
        let thread = thread::spawn(move || {
            let mut events = Vec::new();
            loop {
                let mut ready = [
                    PollFd::new(fault.as_fd(), PollFlags::POLLIN),
                    PollFd::new(closed.as_fd(), PollFlags::POLLIN),
                ];
                poll(&mut ready, PollTimeout::NONE).unwrap();
                fault.read_events(&mut events).unwrap();
                if events.is_empty() && ready[1].any() == Some(true) {
                    return;
                }
                for event in events.drain(..) {
                    let Event::PageFault { address, .. } = event else {
                        panic!("{event:?}");
                    };
                    let page = address - address % 4096;
                    fault.write_unprotect(page..page + 4096, true).unwrap();
                }
            }
        });
        Self {
            hang_up: Some(hang_up),
            thread: Some(thread),
        }
    }
}

impl Drop for BareHandler {
    fn drop(&mut self) {
        self.hang_up = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
