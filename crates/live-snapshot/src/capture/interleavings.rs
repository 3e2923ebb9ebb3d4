//! Models of every interleaving of vCPUs that write and the thread that reads the image. Run them
//! with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p ramsnap-live-snapshot --lib --release
//! interleavings`.
//!
//! A page is a word. The machine is modeled like a hypervisor: a store checks the protection and
//! writes in one step.
//!
//! With `RAMSNAP_THOROUGH=1`, the models are exhaustive unless they state a bound. Without it, at
//! most 2 preemptions are tried.

use std::io;
use std::ops::Range;
// It only counts references, which no interleaving depends on.
use std::sync::Arc;

use loom::model::Builder;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread::{self, JoinHandle};

use super::{Capture, Failure, PageMemory};
use crate::options::WhenPoolFull;

/// The size of a page.
const PAGE: u64 = 8;

/// The words of a guest's RAM.
struct Ram {
    words: Vec<AtomicU64>,
    protected: Vec<Mutex<bool>>,
}

/// The RAM as the memory of a capture.
struct Memory(Arc<Ram>);

impl PageMemory for Memory {
    fn copy(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for byte in buf {
            let word = self.0.words[(at / PAGE) as usize].load(Relaxed);
            *byte = word.to_ne_bytes()[(at % PAGE) as usize];
            at += 1;
        }
        Ok(())
    }

    fn is_protected(&self, range: Range<u64>) -> io::Result<bool> {
        let mut pages = range.start / PAGE..range.end / PAGE;
        Ok(pages.all(|page| *self.0.protected[page as usize].lock().unwrap()))
    }
}

/// A guest whose RAM is captured: page `n` has the word `n + 1` at the point in time.
struct Guest {
    ram: Arc<Ram>,
    capture: Arc<Capture>,
}

impl Guest {
    fn new(pages: u64, pool_pages: usize) -> Self {
        let ram = Arc::new(Ram {
            words: (0..pages).map(|page| AtomicU64::new(page + 1)).collect(),
            protected: (0..pages).map(|_| Mutex::new(true)).collect(),
        });
        let memory = Arc::new(Memory(Arc::clone(&ram)));
        let when_full = WhenPoolFull::Wait;
        let capture = Capture::new(memory, pages * PAGE, PAGE, pool_pages, when_full);
        capture.add(0..pages * PAGE);
        capture.activate();
        Self {
            ram,
            capture: Arc::new(capture),
        }
    }

    /// Starts a vCPU that writes 100 to pages.
    fn vcpu(&self, pages: &'static [u64]) -> JoinHandle<()> {
        let (ram, capture) = (Arc::clone(&self.ram), Arc::clone(&self.capture));
        thread::spawn(move || {
            for page in pages {
                loop {
                    let mut protected = ram.protected[*page as usize].lock().unwrap();
                    if !*protected {
                        ram.words[*page as usize].store(100, Relaxed);
                        break;
                    }
                    drop(protected);
                    capture.save(page * PAGE..(page + 1) * PAGE);
                    protected = ram.protected[*page as usize].lock().unwrap();
                    *protected = false;
                }
            }
        })
    }

    /// Reads the bytes of a range of the image, and compares them.
    fn read(&self, range: Range<u64>) {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.capture.read(range.start, &mut bytes).unwrap();
        let expected = |at: u64| (at / PAGE + 1).to_ne_bytes()[(at % PAGE) as usize];
        assert_eq!(bytes, range.map(expected).collect::<Vec<_>>());
    }
}

fn check(bound: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let thorough = std::env::var_os("RAMSNAP_THOROUGH").is_some_and(|value| value == "1");
    let mut builder = Builder::new();
    builder.preemption_bound = match thorough {
        true => bound,
        false => Some(bound.map_or(2, |bound| bound.min(2))),
    };
    builder.check(model);
}

#[test]
fn a_read_racing_a_write_has_the_old_bytes() {
    check(None, || {
        let guest = Guest::new(1, 1);
        let vcpu = guest.vcpu(&[0]);
        guest.read(0..PAGE);
        vcpu.join().unwrap();
        assert_eq!(guest.ram.words[0].load(Relaxed), 100);
        assert_eq!(guest.capture.needed(0..PAGE).count(), 0);
    });
}

#[test]
fn a_read_racing_two_writes_of_a_page_has_the_old_bytes() {
    check(Some(3), || {
        let guest = Guest::new(1, 2);
        let vcpus = [guest.vcpu(&[0]), guest.vcpu(&[0])];
        guest.read(0..PAGE);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

#[test]
fn a_page_that_is_read_in_parts_has_the_old_bytes() {
    check(Some(4), || {
        let guest = Guest::new(2, 2);
        let vcpu = guest.vcpu(&[1, 0]);
        guest.read(0..PAGE + 3);
        guest.read(PAGE + 3..2 * PAGE);
        vcpu.join().unwrap();
    });
}

#[test]
fn a_write_that_waits_for_the_pool_continues_after_reads() {
    check(Some(3), || {
        let guest = Guest::new(2, 1);
        let vcpus = [guest.vcpu(&[0]), guest.vcpu(&[1])];
        guest.read(0..2 * PAGE);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        assert_eq!(guest.ram.words[0].load(Relaxed), 100);
        assert_eq!(guest.ram.words[1].load(Relaxed), 100);
    });
}

#[test]
fn a_write_that_waits_for_the_pool_continues_after_the_end() {
    check(Some(4), || {
        let guest = Guest::new(2, 1);
        let vcpu = guest.vcpu(&[0, 1]);
        guest.capture.end();
        vcpu.join().unwrap();
        assert_eq!(guest.ram.words[1].load(Relaxed), 100);
        let failure = guest.capture.read(0, &mut [0; 8]);
        assert!(matches!(failure, Err(Failure::Ended)));
    });
}

#[test]
fn a_chunk_with_a_saved_page_is_returned_once() {
    check(Some(3), || {
        let guest = Guest::new(2, 2);
        let vcpus = [guest.vcpu(&[0]), guest.vcpu(&[1])];
        let pool = guest.capture.pool();
        let mut returned = u32::from(pool.list(0));
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        returned += std::iter::from_fn(|| pool.next_chunk()).count() as u32;
        assert_eq!(returned, 1);
        guest.read(0..2 * PAGE);
    });
}
