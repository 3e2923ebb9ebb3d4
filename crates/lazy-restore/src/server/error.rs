//! Errors of serving a VMM.

use std::io;

use thiserror::Error;

use super::message::MessageError;
use crate::error::LazyError;

/// A reason why a VMM that has connected is not served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// It has sent no complete message in time.
    #[error("the client sent no complete message in time: connect by a VMM that loads a snapshot")]
    Timeout,
    /// It has closed the connection before its message was complete.
    #[error("the client closed the connection before its message was complete")]
    Closed,
    /// It has sent no descriptor.
    #[error("the client sent its memory regions without the descriptor of a userfaultfd")]
    NoDescriptor,
    /// It has sent several descriptors.
    #[error("the client sent several descriptors: send one userfaultfd")]
    SeveralDescriptors,
    /// The connection has failed.
    #[error("failed to receive the message of the client: {0}")]
    Connection(#[source] io::Error),
    /// Its message is refused.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The descriptor that it has sent is not a userfaultfd.
    #[error("the descriptor that the client sent cannot be used: {0}")]
    Descriptor(#[source] io::Error),
    /// The process at the other end cannot be identified, or may not be killed.
    #[error(
        "the client cannot be served, because it could not be ended if that failed: {0}; run the \
         server as the user of the VMM, or notify the VMM of failures instead of killing it"
    )]
    Process(#[source] io::Error),
    /// A region is not memory that its userfaultfd can fill.
    #[error(
        "the memory region of length {len} at {address:#x} cannot be filled: {what}: send regions \
         that are registered with the userfaultfd"
    )]
    Region {
        /// The address of the region.
        address: u64,
        /// The size of the region in bytes.
        len: u64,
        /// The reason, as text.
        what: String,
    },
    /// Filling could not be started.
    #[error(transparent)]
    Start(#[from] LazyError),
}
