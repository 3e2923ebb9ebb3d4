//! The id of an image, without the rest of its footer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::start::{FileStart, read_header};
use super::trailer::{Trailer, read_trailer};
use crate::error::FooterError;
use crate::footer::Footer;
use crate::id::ImageId;
use crate::layout::Layout;
use crate::version::RAW_UNIT;
use crate::wire::MAGIC;

/// The number of bytes of a footer before the id.
const FIELDS: usize = 16;
const ID_AT: u64 = FIELDS as u64;

impl Footer {
    /// Reads the id of a sealed or packed image. At most 5 KiB are read, regardless of the length
    /// of the footer, except of a sealed image whose RAM begins like a packed image: its footer is
    /// [read](Self::read).
    ///
    /// The checksum of the footer is not compared: a file whose footer is damaged may have an id
    /// too. Use the id only to recognize a file, such as a destination that must not be replaced,
    /// and [`read`](Self::read) to use the image.
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read), as far as the bytes that were read show them.
    ///
    /// # Examples
    /// ```
    /// use std::fs::File;
    ///
    /// use image_format::{Footer, FooterError};
    ///
    /// # let path = tempfile::NamedTempFile::new()?;
    /// let found = Footer::read_id(&File::open(&path)?);
    /// assert!(matches!(found, Err(FooterError::NotSealed))); // an empty file
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_id(file: &File) -> Result<ImageId, FooterError> {
        let failed = |source| FooterError::unreadable(0, source);
        let len = file.metadata().map_err(failed)?.len();
        Self::read_id_from(len, |buf, offset| file.read_exact_at(buf, offset))
    }

    /// Reads an id like [`read_id`](Self::read_id), from a file of `len` bytes. `read_at` fills the
    /// given buffer with the bytes at the given offset.
    ///
    /// # Errors
    /// Returns the errors of [`read_id`](Self::read_id).
    pub fn read_id_from(
        len: u64,
        mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<ImageId, FooterError> {
        let header = read_header(len, &mut read_at)?;
        let Some(trailer) = read_trailer(len, &mut read_at)? else {
            return Err(header.into_error(len));
        };
        if len.is_multiple_of(RAW_UNIT) {
            return Self::read_from(len, None, read_at).map(|footer| footer.id);
        }
        let start = Trailer::new(&trailer, len)?.start;
        let (mut fields, mut id) = ([0; FIELDS], [0; 16]);
        for (bytes, at) in [(&mut fields, start), (&mut id, start.saturating_add(ID_AT))] {
            read_at(bytes, at).map_err(|source| FooterError::unreadable(at, source))?;
        }
        let id = ImageId::from_bytes(id);
        let layout = Layout::from_number(fields[12]);
        let (Some(layout), true) = (layout, fields.starts_with(MAGIC)) else {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        };
        match header {
            FileStart::Header(header)
                if !layout.is_in_place() && header.len == len && header.id() == id =>
            {
                Ok(id)
            }
            FileStart::Other if layout.is_in_place() => Ok(id),
            // A packed image of version 1, a damaged header, or a part of an image whose RAM holds
            // another one.
            FileStart::Header(_) | FileStart::Damaged | FileStart::Other => {
                Self::read_from(len, None, read_at).map(|footer| footer.id)
            }
        }
    }
}
