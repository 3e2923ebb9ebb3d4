//! A chain as one full image.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use atomic_file::AtomicWriter;
use page_reader::PageReader;
use sparse_file::{Source, WriteOptions, grow, write_runs};

use crate::chain::Chain;
use crate::error::ImageError;

impl Chain {
    /// Writes the chain as one full raw image, staged beside `dest` and committed durably with mode 0600; what none of the images
    /// stores stays a hole. `dest` may be one of the chain's own images. Returns the bytes written.
    ///
    /// # Errors
    /// [`ImageError`]; unless it is [`Commit`](ImageError::Commit), which says more, `dest` is as it was. Nothing is left behind.
    pub fn flatten(&self, dest: impl AsRef<Path>) -> Result<u64, ImageError> {
        self.flatten_with(&AtomicWriter::options(), dest, &mut |_| {
            ControlFlow::Continue(())
        })
    }

    /// [`flatten`](Self::flatten), staged as `options` say, telling `progress` the bytes written so far; it may cancel.
    ///
    /// # Errors
    /// See [`flatten`](Self::flatten).
    pub fn flatten_with(
        &self,
        options: &atomic_file::Options,
        dest: impl AsRef<Path>,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<u64, ImageError> {
        let stage = options.open(dest)?;
        let dest = || stage.dest_path().to_owned();
        let size = self.size();
        grow(stage.file(), size).map_err(|source| ImageError::SetSize {
            dest: dest(),
            size,
            source,
        })?;
        let written = write_runs(
            stage.file(),
            self.stored_runs(),
            &Pages(self),
            &WriteOptions::new(),
            progress,
        )
        .map_err(|source| ImageError::Write {
            dest: dest(),
            source,
        })?;
        stage.commit()?;
        Ok(written)
    }
}

struct Pages<'c>(&'c Chain);

impl Source for Pages<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        PageReader::read_at(self.0, offset, buf)
    }
}
