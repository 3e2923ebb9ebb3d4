//! Linux's userfaultfd: page faults of a process, handled in user space.
//!
//! A program that restores, migrates or tracks memory must act when a page is first touched or
//! written: read the page from a file, receive it from another host, or record that it is dirty.
//! `SIGSEGV` handlers do not see the accesses of system calls and vCPUs. The kernel's
//! [userfaultfd](https://docs.kernel.org/admin-guide/mm/userfaultfd.html) does: the access waits,
//! any thread of the program receives an event and resolves the fault, and the access continues.
//!
//! [`Userfaultfd`] is one type for the whole interface of the kernel, with the structures that
//! `linux-raw-sys` generates from its headers. Requests return what they did and why they stopped
//! ([`Filled`], [`Stop`]): if mappings change during a request, the kernel completes a part of it.
//!
//! A page is missing until it is touched, and is then filled:
//! ```
//! # #![allow(unsafe_code)]
//! # if !test_machine::Need::Userfaultfd.met("the first example of uffd") { return Ok(()); }
//! # use nix::poll::{PollFd, PollFlags, PollTimeout};
//! # use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
//! # use std::os::fd::AsFd;
//! # const PAGE: usize = 0x1_0000; // a multiple of every page size
//! # let size = std::num::NonZeroUsize::new(PAGE).ok_or("no bytes")?;
//! # let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
//! # // SAFETY: a new mapping, which nothing else uses.
//! # let memory = unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE) }?;
//! # let start = memory.expose_provenance().get();
//! # let range = start as u64..(start + PAGE) as u64;
//! use uffd::{Event, FillFlags, Modes, Userfaultfd};
//!
//! let fault = Userfaultfd::options().open()?;
//! // SAFETY: the range is mapped, and accessed by raw pointers only.
//! unsafe { fault.register(range, Modes::MISSING) }?;
//! # // SAFETY: mapped, and accessed by raw pointers only.
//! # let reader = std::thread::spawn(move || unsafe {
//! #     std::ptr::with_exposed_provenance::<u8>(start + 5).read_volatile()
//! # });
//! # let poll_fd = PollFd::new(fault.as_fd(), PollFlags::POLLIN);
//! # nix::poll::poll(&mut [poll_fd], PollTimeout::NONE)?;
//! // ... wait with poll(2) until another thread touches the page ...
//! if let Some(Event::PageFault { address, .. }) = fault.read_event()? {
//!     fault.copy_bytes(address, &[7; PAGE], FillFlags::empty()).complete()?;
//! }
//! # assert_eq!(reader.join().unwrap(), 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Example
//! The same as a complete program, with the mapping and the thread that waits for the page:
//! ```
//! # #![allow(unsafe_code)]
//! # if !test_machine::Need::Userfaultfd.met("the second example of uffd") { return Ok(()); }
//! use std::num::NonZeroUsize;
//! use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
//! use uffd::{Event, FillFlags, Modes, Userfaultfd};
//!
//! let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
//! let size = NonZeroUsize::new(0x1_0000).ok_or("no bytes")?;
//! let fault = Userfaultfd::options().open()?;
//! // SAFETY: a new mapping, which nothing else uses.
//! let memory = unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE) }?;
//! let start = memory.expose_provenance().get() as u64;
//! // SAFETY: the mapping was just made.
//! unsafe { fault.register(start..start + 0x1_0000, Modes::MISSING) }?;
//!
//! // SAFETY: mapped, and accessed by raw pointers only.
//! let reader = std::thread::spawn(move || unsafe {
//!     std::ptr::with_exposed_provenance::<u8>(start as usize + 5).read_volatile()
//! });
//! let address = loop {
//!     match fault.read_event()? {
//!         Some(Event::PageFault { address, .. }) => break address,
//!         _ => std::thread::yield_now(), // or wait with poll(2)
//!     }
//! };
//! assert_eq!(address, start);
//! fault.copy_bytes(start, &[7; 0x1_0000], FillFlags::empty()).complete()?;
//! assert_eq!(reader.join().unwrap(), 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # By task
//! **Open a descriptor**: [`Userfaultfd::options`]. It uses the system call, or `/dev/userfaultfd`
//! if the call is not permitted. [`Features`] are requested when it is opened.
//! [`UserfaultfdOptions::adopt`] uses a descriptor that a privileged process has passed, or that
//! was opened before privileges were given up. [`Userfaultfd::from_fd`] handles the faults of
//! another process.
//!
//! **Receive events**: [`Userfaultfd::read_event`] and [`read_events`](Userfaultfd::read_events).
//! The descriptor is non-blocking, and `poll` reports it as readable.
//!
//! **Fill missing pages**: [`copy_bytes`](Userfaultfd::copy_bytes),
//! [`copy`](Userfaultfd::copy), [`zeropage`](Userfaultfd::zeropage),
//! [`move_`](Userfaultfd::move_), [`poison`](Userfaultfd::poison), and for pages of a file
//! [`continue_`](Userfaultfd::continue_).
//!
//! **Track writes**: [`write_protect`](Userfaultfd::write_protect) and
//! [`write_unprotect`](Userfaultfd::write_unprotect).
//!
//! # Limitations
//! - Memory is given by address. No reference may cover a registered missing page: the compiler
//!   assumes that a reference can be read at any time, and the read would wait.
//! - A thread that resolves faults must not touch the memory itself. It would wait for itself.
//! - With [`Features::EVENT_UNMAP`], `EVENT_REMOVE` or `EVENT_REMAP`, a thread that unmaps,
//!   discards or moves registered memory waits until its event is read: see
//!   [`Userfaultfd`](Userfaultfd#events-of-changed-mappings).
//! - Linux only: on other systems the crate is empty.
#![cfg(target_os = "linux")]

mod abi;
mod adopt;
#[cfg(test)]
mod auto_traits;
mod error;
mod event;
mod filled;
mod flags;
mod message;
mod open;
mod options;
mod probe;
mod sys;
mod userfaultfd;

// The crates whose types are in public signatures.
pub use bitflags;

pub use error::{AdoptError, OpenError, RegisterError};
pub use event::Event;
pub use filled::{Filled, Stop};
pub use flags::{FaultFlags, Features, FillFlags, Modes, MoveFlags, Operations};
pub use options::UserfaultfdOptions;
pub use userfaultfd::Userfaultfd;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
