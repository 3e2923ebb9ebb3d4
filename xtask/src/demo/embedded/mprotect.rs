//! Writes tracked by `mprotect`: a store to a protected page raises a signal, whose handler marks the page and makes
//! it writable. Works on every Unix.
//!
//! The handler does what a signal handler may: it reads atomics, marks (lock-free, without allocating), and calls `mprotect`.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use dirty_bitmap::DirtyBitmap;
use nix::errno::Errno;

use super::Tracker;
use super::memory::Memory;

/// The signals of a store to a protected page: SIGSEGV by POSIX, SIGBUS on macOS.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Tracks the writes to one [`Memory`].
pub struct Mprotect {
    region: Box<Region>,
    slot: usize,
}

struct Region {
    memory: Arc<Memory>,
    dirty: Arc<DirtyBitmap>,
}

impl Mprotect {
    /// Protects all of `memory`; from now on `dirty` says what is written.
    pub fn new(memory: Arc<Memory>, dirty: Arc<DirtyBitmap>) -> io::Result<Self> {
        install_handler()?;
        let region = Box::new(Region { memory, dirty });
        let slot = occupy(&region)?;
        let tracker = Self { region, slot };
        let whole = 0..tracker.region.memory.len() as u64;
        tracker.protect(&mut [whole].into_iter())?;
        Ok(tracker)
    }
}

impl Tracker for Mprotect {
    fn protect(&self, runs: &mut dyn Iterator<Item = Range<u64>>) -> io::Result<()> {
        for run in runs {
            let memory = &self.region.memory;
            memory.set_writable(run.start as usize..run.end as usize, false)?;
        }
        Ok(())
    }
}

impl Drop for Mprotect {
    fn drop(&mut self) {
        let memory = &self.region.memory;
        // Unprotected first: a fault after the slot is free would be nobody's.
        let writable = memory.set_writable(0..memory.len(), true);
        debug_assert!(writable.is_ok());
        SLOTS[self.slot].len.store(0, Ordering::Release);
        SLOTS[self.slot]
            .region
            .store(ptr::null_mut(), Ordering::Release);
    }
}

/// A tracked range of addresses, for the handler to find. A length of 0: nothing tracked.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    region: AtomicPtr<Region>,
}

static SLOTS: [Slot; 64] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        region: AtomicPtr::new(ptr::null_mut()),
    }
}; 64];

/// Held by whoever occupies a slot.
static OCCUPYING: Mutex<()> = Mutex::new(());

fn occupy(region: &Region) -> io::Result<usize> {
    let _one = OCCUPYING.lock().unwrap_or_else(PoisonError::into_inner);
    let is_free = |slot: &Slot| slot.region.load(Ordering::Acquire).is_null();
    let index = SLOTS
        .iter()
        .position(is_free)
        .ok_or_else(|| io::Error::other("too many tracked guests in one process"))?;
    let slot = &SLOTS[index];
    slot.region
        .store(ptr::from_ref(region).cast_mut(), Ordering::Release);
    slot.start
        .store(region.memory.start() as usize, Ordering::Release);
    // Last: the handler looks at the rest only where the length says so.
    slot.len.store(region.memory.len(), Ordering::Release);
    Ok(index)
}

/// Marks the page of `address` and makes it writable, if it belongs to a tracked memory.
fn handle(address: usize) -> bool {
    for slot in &SLOTS {
        let len = slot.len.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        // Read twice: a slot that changes hands meanwhile is not the one of this fault.
        if address.wrapping_sub(start) >= len || slot.len.load(Ordering::Acquire) != len {
            continue;
        }
        // SAFETY: the address lies in the slot's memory, so the faulting thread is inside `Memory::store` on it. It
        // holds the memory borrowed from a guest that owns the tracker, so the region is not dropped before it returns.
        let region = unsafe { &*slot.region.load(Ordering::Acquire) };
        return region.open(address - start).is_ok();
    }
    false
}

impl Region {
    /// Marks the page at `offset`, then makes it writable.
    fn open(&self, offset: usize) -> nix::Result<()> {
        let mut block = self.dirty.page_size() as usize;
        loop {
            let start = offset & !(block - 1);
            let end = (start + block).min(self.memory.len());
            let marked = self.dirty.set_range(start as u64, (end - start) as u64);
            if marked.is_err() {
                return Err(Errno::ERANGE);
            }
            match self.memory.set_writable(start..end, true) {
                // Too many mappings (Linux: vm.max_map_count). A larger block is one mapping where there were many; its
                // clean pages are marked as well, which costs bytes and loses nothing.
                Err(Errno::ENOMEM) if end - start < self.memory.len() => block *= 8,
                done => return done,
            }
        }
    }
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// What was installed before, for faults that are none of ours: Rust's own stack overflow report.
static PREVIOUS: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

fn install_handler() -> io::Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let mut previous = [const { None }; 2];
    for (signal, previous) in SIGNALS.into_iter().zip(&mut previous) {
        // SAFETY: a sigaction is plain data; a null new action only asks for the present one.
        *previous = Some(unsafe {
            let mut action = std::mem::zeroed();
            Errno::result(libc::sigaction(signal, ptr::null(), &raw mut action))?;
            action
        });
    }
    let _ = PREVIOUS.set(previous.map(|action| action.expect("asked for every signal")));
    for signal in SIGNALS {
        let handler: Handler = on_fault;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, runs on the thread's alternate stack where
        // there is one, and only does what a signal handler may (see above).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            Errno::result(libc::sigemptyset(&raw mut action.sa_mask))?;
            Errno::result(libc::sigaction(signal, &raw const action, ptr::null_mut()))?;
        }
    }
    Ok(())
}

extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, whose address field these two signals fill.
    let address = unsafe { (*info).si_addr() } as usize;
    if handle(address) {
        return;
    }
    let previous = PREVIOUS.get().map(|previous| {
        let index = SIGNALS.iter().position(|known| *known == signal);
        &previous[index.unwrap_or(0)]
    });
    match previous {
        Some(action) if action.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: an action with SA_SIGINFO has a handler of this very signature.
            let handler: Handler = unsafe { std::mem::transmute(action.sa_sigaction) };
            handler(signal, info, context);
        }
        // SAFETY: the default action is always valid; the instruction faults again and ends the process.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}
