//! Write protection by `mprotect`: a store to a protected page raises a signal, whose handler calls
//! back. Works on every Unix.
//!
//! The handler is async-signal-safe: it only reads atomics, and the callback is bound to the same
//! rule.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use dirty_bitmap::WriteProtection;
use nix::errno::Errno;

use super::{FaultHandler, Memory, OnWrite, PageFaults};

/// The signals of a store to a protected page: SIGSEGV by POSIX, SIGBUS on macOS.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Protects a [`Memory`] by `mprotect`.
#[derive(Clone, Debug)]
pub struct Mprotect {
    memory: Arc<Memory>,
}

impl Mprotect {
    /// Creates a protection under which no page is protected yet.
    #[must_use]
    pub fn new(memory: &Arc<Memory>) -> Self {
        Self {
            memory: Arc::clone(memory),
        }
    }
}

impl WriteProtection for Mprotect {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        Ok(self.memory.set_writable(range, false)?)
    }

    /// Linux refuses if the process would have too many mappings (`vm.max_map_count`).
    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        Ok(self.memory.set_writable(range, true)?)
    }
}

impl PageFaults for Mprotect {
    fn answer(
        &self,
        on_write: impl Fn(u64) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<FaultHandler> {
        install_handler()?;
        let region = Box::new(Region {
            memory: Arc::clone(&self.memory),
            on_write: Box::new(on_write),
        });
        let slot = occupy(&region)?;
        Ok(FaultHandler::new(Occupied { region, slot }))
    }

    /// The writing thread runs the callback itself and continues afterwards.
    fn wait_until_answered(&self) {}
}

struct Region {
    memory: Arc<Memory>,
    on_write: OnWrite,
}

struct Occupied {
    region: Box<Region>,
    slot: usize,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let memory = &self.region.memory;
        // Unprotect first: after the slot is free, a fault has no handler.
        let writable = memory.set_writable(0..memory.len() as u64, true);
        debug_assert!(writable.is_ok());
        let slot = &SLOTS[self.slot];
        slot.len.store(0, Ordering::SeqCst);
        while slot.handlers.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        slot.region.store(ptr::null_mut(), Ordering::Release);
    }
}

/// A tracked range of addresses that the handler can find. A length of 0 means that it is free.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    region: AtomicPtr<Region>,
    /// The number of handlers that are reading the slot. They are counted before they read the
    /// length, and the slot is reassigned only if there are none.
    handlers: AtomicUsize,
}

static SLOTS: [Slot; 64] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        region: AtomicPtr::new(ptr::null_mut()),
        handlers: AtomicUsize::new(0),
    }
}; 64];

/// Held while a slot is being occupied.
static OCCUPYING: Mutex<()> = Mutex::new(());

fn occupy(region: &Region) -> io::Result<usize> {
    let _one = OCCUPYING.lock().unwrap_or_else(PoisonError::into_inner);
    let is_free = |slot: &Slot| slot.region.load(Ordering::Acquire).is_null();
    let index = SLOTS.iter().position(is_free).ok_or_else(|| {
        io::Error::other("too many tracked memories in this process: drop one first")
    })?;
    let slot = &SLOTS[index];
    slot.region
        .store(ptr::from_ref(region).cast_mut(), Ordering::Release);
    slot.start
        .store(region.memory.start() as usize, Ordering::Release);
    // Last: the handler reads the other fields only if the length is not 0.
    slot.len.store(region.memory.len(), Ordering::SeqCst);
    Ok(index)
}

/// Calls back for `address`, if it belongs to a tracked memory.
fn handle(address: usize) -> bool {
    SLOTS.iter().any(|slot| {
        slot.handlers.fetch_add(1, Ordering::SeqCst);
        let len = slot.len.load(Ordering::SeqCst);
        let start = slot.start.load(Ordering::Acquire);
        let offset = address.wrapping_sub(start);
        let opened = offset < len && {
            // SAFETY: the slot has a length, and this handler was counted before it was read: the
            // thread that frees the slot waits for the count before the region is dropped.
            let region = unsafe { &*slot.region.load(Ordering::Acquire) };
            (region.on_write)(offset as u64).is_ok()
        };
        slot.handlers.fetch_sub(1, Ordering::SeqCst);
        opened
    })
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// The previous handlers, for faults at other addresses: Rust's own stack overflow report.
static PREVIOUS: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

fn install_handler() -> io::Result<()> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let mut previous = [const { None }; 2];
    for (signal, previous) in SIGNALS.into_iter().zip(&mut previous) {
        // SAFETY: a sigaction is plain data; a null new action only queries the present one.
        *previous = Some(unsafe {
            let mut action = std::mem::zeroed();
            Errno::result(libc::sigaction(signal, ptr::null(), &raw mut action))?;
            action
        });
    }
    let _ = PREVIOUS.set(previous.map(|action| action.expect("queried for each signal")));
    for signal in SIGNALS {
        let handler: Handler = on_fault;
        // SAFETY: the handler has the signature that SA_SIGINFO requires, runs on the thread's
        // alternate stack if there is one, and is async-signal-safe (see above).
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
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, whose address field these two
    // signals fill.
    let address = unsafe { (*info).si_addr() } as usize;
    // The interrupted code may be about to read errno.
    let errno = Errno::last_raw();
    let handled = handle(address);
    Errno::set_raw(errno);
    if handled {
        return;
    }
    let previous = PREVIOUS.get().map(|previous| {
        let index = SIGNALS.iter().position(|known| *known == signal);
        &previous[index.unwrap_or(0)]
    });
    match previous {
        Some(action) if action.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: an action with SA_SIGINFO has a handler of this signature.
            let handler: Handler = unsafe { std::mem::transmute(action.sa_sigaction) };
            handler(signal, info, context);
        }
        // SAFETY: the default action is always valid; the instruction faults again and ends the
        // process.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}
