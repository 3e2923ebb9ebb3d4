//! Reading images that are in memory.

use std::io;

use image_format::{Footer, FooterError, Placement};

/// Reads the footer of the image `bytes`.
pub(crate) fn read_as(bytes: &[u8], format: Option<Placement>) -> Result<Footer, FooterError> {
    Footer::read_from(bytes.len() as u64, format, |buf, offset| {
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let from = from.get(..buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    })
}
