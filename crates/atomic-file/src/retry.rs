//! Repeating interrupted system calls.

use std::io;

use nix::errno::Errno;

/// Repeats `call` while a signal interrupts it. Only for calls that are harmless when repeated.
pub(crate) fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interrupted_calls_are_repeated() {
        let mut left = vec![Errno::EIO, Errno::EINTR, Errno::EINTR];
        let error =
            retry::<()>(|| Err(left.pop().expect("a call after a final failure"))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
        assert!(left.is_empty());
    }
}
