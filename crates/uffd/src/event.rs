//! What happens to registered memory, and how it is read.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::unistd::read;

use crate::flags::FaultFlags;
use crate::message::{MESSAGE, Message};
use crate::sys;
use crate::userfaultfd::Userfaultfd;

/// The number of messages that one call reads at most: 1 KiB.
const BATCH: usize = 32;

/// An event in registered memory.
///
/// The thread that causes an event other than a page fault continues when the event is read.
/// Pages cannot be filled until it has continued ([`Stop::Changing`](crate::Stop::Changing)).
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a thread may wait until the event is handled"]
pub enum Event {
    /// A thread waits for a page.
    PageFault {
        /// The start of the page, or with
        /// [`Features::EXACT_ADDRESS`](crate::Features::EXACT_ADDRESS) the accessed address.
        address: u64,
        /// The kind of the fault.
        flags: FaultFlags,
        /// The id of the thread, with [`Features::THREAD_ID`](crate::Features::THREAD_ID).
        thread: Option<u32>,
    },
    /// The process was forked. Needs [`Features::EVENT_FORK`](crate::Features::EVENT_FORK).
    Fork {
        /// The descriptor for the memory of the child, in which the same ranges are registered.
        child: Userfaultfd,
    },
    /// `mremap` has moved memory, whose registration moved with it. Needs
    /// [`Features::EVENT_REMAP`](crate::Features::EVENT_REMAP).
    Remap {
        /// The old addresses.
        from: Range<u64>,
        /// The start of the new addresses.
        to: u64,
    },
    /// `madvise` discards pages: `MADV_DONTNEED`, `MADV_FREE` or `MADV_REMOVE`. Needs
    /// [`Features::EVENT_REMOVE`](crate::Features::EVENT_REMOVE).
    Remove {
        /// The addresses, which stay registered.
        range: Range<u64>,
    },
    /// `munmap`, or a mapping in the same place, has removed memory. Needs
    /// [`Features::EVENT_UNMAP`](crate::Features::EVENT_UNMAP).
    Unmap {
        /// The addresses, which are no longer registered.
        range: Range<u64>,
    },
}

impl Userfaultfd {
    /// Reads an event, or returns `None` if there is none. Page faults come before other events,
    /// regardless of their order.
    ///
    /// # Errors
    /// Returns the errors of the operating system, and [`InvalidData`](io::ErrorKind::InvalidData)
    /// for an event of a newer kernel.
    pub fn read_event(&self) -> io::Result<Option<Event>> {
        let mut message = [[0; MESSAGE]];
        match self.read_messages(&mut message)? {
            0 => Ok(None),
            _ => self.event(&message[0]).map(Some),
        }
    }

    /// Appends the events that are there to `events`, up to 32, and returns their number.
    ///
    /// # Errors
    /// Returns the errors of [`read_event`](Self::read_event). The other events of the call are
    /// appended nevertheless.
    pub fn read_events(&self, events: &mut Vec<Event>) -> io::Result<usize> {
        let mut messages = [[0; MESSAGE]; BATCH];
        let count = self.read_messages(&mut messages)?;
        let mut failed = None;
        for message in &messages[..count] {
            match self.event(message) {
                Ok(event) => events.push(event),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(count), Err)
    }

    /// Reads messages, and returns their number: 0 if there are none.
    fn read_messages(&self, messages: &mut [[u8; MESSAGE]]) -> io::Result<usize> {
        loop {
            match read(self, messages.as_flattened_mut()) {
                Ok(len) if len > 0 && len.is_multiple_of(MESSAGE) => return Ok(len / MESSAGE),
                Ok(len) => {
                    let short = format!("the kernel sent userfaultfd messages of length {len}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, short));
                }
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn event(&self, message: &[u8; MESSAGE]) -> io::Result<Event> {
        Ok(match Message::decode(message)? {
            Message::PageFault {
                address,
                flags,
                thread,
            } => Event::PageFault {
                address,
                flags,
                thread,
            },
            Message::Fork { descriptor } => {
                // SAFETY: the event was just read, and each message is converted once.
                let child = unsafe { sys::take_forked(descriptor) };
                Event::Fork {
                    child: Self::new(child, self.features()),
                }
            }
            Message::Remap { from, to } => Event::Remap { from, to },
            Message::Remove { range } => Event::Remove { range },
            Message::Unmap { range } => Event::Unmap { range },
        })
    }
}
