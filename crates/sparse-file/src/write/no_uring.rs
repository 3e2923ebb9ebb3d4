//! The io_uring engine on systems without io_uring.

use std::io;

use super::error::{WriteError, unavailable};
use super::job::{Job, Pieces};
use super::options::Engine;
use super::source::RunSource;

pub(super) fn write<I: Pieces, S: RunSource + ?Sized>(
    _: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let missing = io::Error::from_raw_os_error(libc::ENOSYS);
    Err(unavailable(Engine::IoUring)(missing))
}
