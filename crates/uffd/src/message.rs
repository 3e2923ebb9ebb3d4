//! The messages of the kernel, decoded.

use std::io;
use std::mem::offset_of;
use std::ops::Range;

use linux_raw_sys::general::{
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    uffd_msg, uffd_msg__bindgen_ty_1__bindgen_ty_1 as fault,
    uffd_msg__bindgen_ty_1__bindgen_ty_2 as fork, uffd_msg__bindgen_ty_1__bindgen_ty_3 as remap,
    uffd_msg__bindgen_ty_1__bindgen_ty_4 as remove,
};

use crate::flags::FaultFlags;

/// The size of a message.
pub(crate) const MESSAGE: usize = size_of::<uffd_msg>();

/// A decoded message. The descriptor of a fork is a number that has no owner yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    PageFault {
        address: u64,
        flags: FaultFlags,
        thread: Option<u32>,
    },
    Fork {
        descriptor: u32,
    },
    Remap {
        from: Range<u64>,
        to: u64,
    },
    Remove {
        range: Range<u64>,
    },
    Unmap {
        range: Range<u64>,
    },
}

impl Message {
    /// Decodes a message of the kernel.
    pub(crate) fn decode(message: &[u8; MESSAGE]) -> io::Result<Self> {
        let argument = &message[offset_of!(uffd_msg, arg)..];
        let half = |at: usize| {
            let bytes = argument[at..].first_chunk();
            u32::from_ne_bytes(*bytes.expect("the offset is of a field of the message"))
        };
        let word = |at: usize| {
            let bytes = argument[at..].first_chunk();
            u64::from_ne_bytes(*bytes.expect("the offset is of a field of the message"))
        };
        let range = || word(offset_of!(remove, start))..word(offset_of!(remove, end));
        match u32::from(message[offset_of!(uffd_msg, event)]) {
            UFFD_EVENT_PAGEFAULT => Ok(Self::PageFault {
                address: word(offset_of!(fault, address)),
                flags: FaultFlags::from_bits_retain(word(offset_of!(fault, flags))),
                // No thread has the id 0, which is there without the feature.
                thread: Some(half(offset_of!(fault, feat))).filter(|id| *id != 0),
            }),
            UFFD_EVENT_FORK => Ok(Self::Fork {
                descriptor: half(offset_of!(fork, ufd)),
            }),
            UFFD_EVENT_REMAP => {
                let from = word(offset_of!(remap, from));
                Ok(Self::Remap {
                    from: from..from.saturating_add(word(offset_of!(remap, len))),
                    to: word(offset_of!(remap, to)),
                })
            }
            UFFD_EVENT_REMOVE => Ok(Self::Remove { range: range() }),
            UFFD_EVENT_UNMAP => Ok(Self::Unmap { range: range() }),
            event => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the kernel sent an unknown userfaultfd event {event:#x}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u32, arguments: [u64; 3]) -> [u8; MESSAGE] {
        let mut message = [0; MESSAGE];
        message[0] = event as u8;
        for (at, argument) in arguments.into_iter().enumerate() {
            message[8 + 8 * at..16 + 8 * at].copy_from_slice(&argument.to_ne_bytes());
        }
        message
    }

    #[test]
    fn every_event_is_decoded_from_its_fields() {
        let decode = |event, arguments| Message::decode(&message(event, arguments)).unwrap();
        let fault = |thread| Message::PageFault {
            address: 0x5000,
            flags: FaultFlags::WRITE | FaultFlags::MINOR,
            thread,
        };
        assert_eq!(decode(UFFD_EVENT_PAGEFAULT, [5, 0x5000, 0]), fault(None));
        let thread = u64::from_ne_bytes([7_u32.to_ne_bytes(), [0; 4]].concat().try_into().unwrap());
        assert_eq!(
            decode(UFFD_EVENT_PAGEFAULT, [5, 0x5000, thread]),
            fault(Some(7))
        );
        assert_eq!(
            decode(UFFD_EVENT_FORK, [thread, 0, 0]),
            Message::Fork { descriptor: 7 }
        );
        assert_eq!(
            decode(UFFD_EVENT_REMAP, [0x1000, 0x9000, 0x2000]),
            Message::Remap {
                from: 0x1000..0x3000,
                to: 0x9000
            }
        );
        let range = 0x1000..0x4000;
        assert_eq!(
            decode(UFFD_EVENT_REMOVE, [0x1000, 0x4000, 0]),
            Message::Remove {
                range: range.clone()
            }
        );
        assert_eq!(
            decode(UFFD_EVENT_UNMAP, [0x1000, 0x4000, 0]),
            Message::Unmap { range }
        );
    }

    #[test]
    fn unknown_events_are_errors_that_name_the_event() {
        let error = Message::decode(&message(0x17, [0; 3])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("0x17"), "{error}");
    }
}
