//! Parses a footer from untrusted bytes.

mod body;
mod identity;
mod start;
mod trailer;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::{FooterError, InvalidFooter};
use crate::footer::Footer;
use crate::header::Header;
use crate::layout::Layout;
use crate::version::RAW_UNIT;
use start::{FileStart, first_page_is_ram, read_header};
use trailer::{Trailer, read_trailer};

impl Footer {
    /// Reads the footer of a sealed or packed image.
    ///
    /// Every field is checked before it is used. Memory is allocated only for runs and checksums
    /// that were read and found valid. A returned footer has passed [`check`](Self::check), and its
    /// own checksum matches. The pages are not read.
    ///
    /// Raw RAM is never recognized as an image, regardless of its contents. The length of raw RAM
    /// is a multiple of [`RAW_UNIT`]. Images of version 2 never have such a length, and images of
    /// version 1 with such a length are refused.
    ///
    /// If a file begins with the header of a packed image and ends with the footer of a sealed one,
    /// it is read as sealed only if the checksum of its first chunk matches. Otherwise it is a
    /// packed image that was cut off.
    ///
    /// # Errors
    /// Returns [`Truncated`](FooterError::Truncated) for a packed image that was cut off,
    /// [`Ambiguous`](FooterError::Ambiguous) for an image of version 1 that may be raw RAM, and
    /// [`NotSealed`](FooterError::NotSealed) for any other file that does not end in a footer. See
    /// [`FooterError`] for other errors.
    pub fn read(file: &File) -> Result<Self, FooterError> {
        Self::read_as(file, None)
    }

    /// Reads the footer of an image that the caller knows to be sealed or packed. This includes
    /// images of version 1 that [`read`](Self::read) cannot distinguish from raw RAM.
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read), except for
    /// [`Ambiguous`](FooterError::Ambiguous). Returns [`OtherLayout`](FooterError::OtherLayout) for
    /// an image of another format.
    pub fn read_as(file: &File, format: impl Into<Option<Layout>>) -> Result<Self, FooterError> {
        let failed = |source| FooterError::unreadable(0, source);
        let len = file.metadata().map_err(failed)?.len();
        Self::read_from(len, format, |buf, offset| file.read_exact_at(buf, offset))
    }

    /// Reads a footer like [`read_as`](Self::read_as), from a file of `len` bytes. `read_at` fills
    /// the given buffer with the bytes at the given offset.
    ///
    /// # Errors
    /// Returns the errors of [`read_as`](Self::read_as).
    pub fn read_from(
        len: u64,
        format: impl Into<Option<Layout>>,
        mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Self, FooterError> {
        let format = format.into();
        let header = read_header(len, &mut read_at)?;
        let trailer = read_trailer(len, &mut read_at)?;
        let Some(trailer) = trailer else {
            return Err(header.into_error(len));
        };
        if len.is_multiple_of(RAW_UNIT) && format.is_none() {
            // The file may be raw RAM, and all of its bytes those of the guest.
            return Err(match header {
                FileStart::Other => FooterError::Ambiguous { len },
                header => header.into_error(len),
            });
        }
        let trailer = Trailer::new(&trailer, len)?;
        let footer = trailer.footer(&mut read_at)?;
        if matches!(header, FileStart::Header(_))
            && footer.layout.is_in_place()
            && !first_page_is_ram(&footer, &mut read_at)?
        {
            return Err(header.into_error(len));
        }
        if format.is_some_and(|format| format != footer.layout) {
            let found = footer.layout;
            return Err(FooterError::OtherLayout { found });
        }
        // The first bytes of an image in place are those of the guest.
        if footer.data_start() > 0
            && header != FileStart::Header(Header::new(&footer, trailer.start, len))
        {
            return Err(match header {
                FileStart::Header(header) if header.len != len => {
                    FileStart::Header(header).into_error(len)
                }
                _ => FooterError::damaged(0, InvalidFooter::Header),
            });
        }
        Ok(footer)
    }
}
