//! What a VMM sends after it has connected: its regions and its userfaultfd.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::ServeError;
use super::message::MessageError;

/// The most bytes of a message: more than the longest list of regions has.
const MAX_MESSAGE: usize = 256 << 10;
/// The most parts of a message that are received, so that a message of single bytes ends.
const MAX_PARTS: usize = 1024;
/// The size of the buffer for a part.
const PART: usize = 16 << 10;

/// A message and the descriptor that came with it.
#[derive(Debug, Default)]
pub(super) struct Received {
    bytes: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

impl Received {
    /// Receives a message of JSON and one descriptor, in any number of parts and in any order, into
    /// `self`, so that a descriptor is kept if the rest fails.
    pub(super) fn receive(
        &mut self,
        connection: &UnixStream,
        limit: Duration,
    ) -> Result<(), ServeError> {
        let deadline = Instant::now() + limit;
        connection
            .set_nonblocking(true)
            .map_err(ServeError::Connection)?;
        let mut part = vec![0; PART];
        for _ in 0..MAX_PARTS {
            if self.descriptor.is_some() && self.message().is_some() {
                return Ok(());
            }
            wait(connection, deadline)?;
            match self.receive_part(connection, &mut part)? {
                Some(0) => {
                    return Err(match self.message() {
                        Some(_) => ServeError::NoDescriptor,
                        None => ServeError::Closed,
                    });
                }
                Some(len) => self.bytes.extend_from_slice(&part[..len]),
                // Not ready after all.
                None => {}
            }
            if self.bytes.len() > MAX_MESSAGE {
                return Err(MessageError::TooLong.into());
            }
        }
        Err(MessageError::TooLong.into())
    }

    /// Receives a part, and returns its length. Returns `None` if there is none.
    fn receive_part(
        &mut self,
        connection: &UnixStream,
        part: &mut [u8],
    ) -> Result<Option<usize>, ServeError> {
        let mut slices = [IoSliceMut::new(part)];
        match receive_with_descriptors(connection.as_raw_fd(), &mut slices) {
            Ok((len, descriptors)) => {
                for descriptor in descriptors {
                    if self.descriptor.replace(descriptor).is_some() {
                        return Err(ServeError::SeveralDescriptors);
                    }
                }
                Ok(Some(len))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(ServeError::Connection(errno.into())),
        }
    }

    /// Returns the message once it is complete: the first array, with the descriptor or before it.
    pub(super) fn message(&self) -> Option<&[u8]> {
        array(&self.bytes)
    }
}

/// Returns the bytes up to the end of the outermost array or object, if it has ended. Bytes that do
/// not begin as JSON does end at once, for the parser to refuse them.
fn array(bytes: &[u8]) -> Option<&[u8]> {
    let start = bytes.iter().position(|byte| !byte.is_ascii_whitespace())?;
    if !matches!(bytes[start], b'[' | b'{') {
        return Some(bytes);
    }
    let (mut depth, mut in_string, mut escaped) = (0_u32, false, false);
    for (at, byte) in bytes.iter().enumerate().skip(start) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return Some(&bytes[..=at]);
        }
    }
    None
}

/// Waits until the connection can be read.
fn wait(connection: &UnixStream, deadline: Instant) -> Result<(), ServeError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ServeError::Timeout);
        }
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, limit) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(ServeError::Connection(io::Error::from(errno))),
        }
    }
}

use sys::receive_with_descriptors;

mod sys {
    #![allow(unsafe_code)]

    use std::os::fd::{FromRawFd, RawFd};

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

    use super::*;

    /// The most descriptors that a part is received with. Further ones are closed by the kernel.
    const DESCRIPTORS: usize = 8;

    /// Receives bytes and the descriptors that come with them.
    pub(super) fn receive_with_descriptors(
        socket: RawFd,
        bytes: &mut [IoSliceMut<'_>],
    ) -> nix::Result<(usize, Vec<OwnedFd>)> {
        let mut space = cmsg_space!([RawFd; DESCRIPTORS]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<UnixAddr>(socket, bytes, Some(&mut space), flags)?;
        let mut descriptors = Vec::new();
        // Truncated control messages still contain descriptors that this process got.
        for message in received.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just opened these descriptors for this process, and
                // nothing else has their numbers.
                let owned = numbers
                    .into_iter()
                    .map(|number| unsafe { OwnedFd::from_raw_fd(number) });
                descriptors.extend(owned);
            }
        }
        Ok((received.bytes, descriptors))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::whole("[{}]", Some("[{}]"))]
    #[case::more_follows("[{}] [", Some("[{}]"))]
    #[case::space_before(" \n[1]", Some(" \n[1]"))]
    #[case::open("[{\"size\": 5", None)]
    #[case::bracket_in_a_string("[\"]\"", None)]
    #[case::quote_in_a_string("[\"\\\"]\"", None)]
    #[case::string("[\"\\\"]\"]", Some("[\"\\\"]\"]"))]
    #[case::nothing("  ", None)]
    #[case::no_json("GET / HTTP", Some("GET / HTTP"))]
    fn messages_end_where_their_array_does(#[case] bytes: &str, #[case] expected: Option<&str>) {
        assert_eq!(array(bytes.as_bytes()), expected.map(str::as_bytes));
    }

    #[test]
    fn endless_messages_are_refused() {
        let (client, server) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            let mut client = client;
            while client.write_all(&[b'['; 4096]).is_ok() {}
        });
        let mut received = Received::default();
        let refused = received.receive(&server, Duration::from_secs(600));
        drop(server);
        writer.join().unwrap();
        assert!(
            matches!(refused, Err(ServeError::Message(MessageError::TooLong))),
            "{refused:?}"
        );
    }

    #[test]
    fn client_that_sends_nothing_is_given_up() {
        let (_client, server) = UnixStream::pair().unwrap();
        let refused = Received::default().receive(&server, Duration::from_millis(1));
        assert!(matches!(refused, Err(ServeError::Timeout)), "{refused:?}");
    }

    #[test]
    fn client_that_closes_its_connection_is_given_up() {
        for (message, says) in [("[{", "closed"), ("[]", "descriptor")] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(message.as_bytes()).unwrap();
            drop(client);
            let refused = Received::default().receive(&server, Duration::from_secs(600));
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
