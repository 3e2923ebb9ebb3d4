//! Sending bytes with descriptors.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// Sends all bytes, the descriptors with the first of them.
pub(crate) fn send(
    connection: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> nix::Result<()> {
    let mut rest = bytes;
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut messages = match raw.is_empty() {
        true => Vec::new(),
        false => vec![ControlMessage::ScmRights(&raw)],
    };
    while !rest.is_empty() {
        let slices = [IoSlice::new(rest)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let socket = connection.as_raw_fd();
        let sent = sendmsg::<UnixAddr>(socket, &slices, &messages, flags, None)?;
        messages.clear();
        rest = &rest[sent..];
    }
    Ok(())
}
