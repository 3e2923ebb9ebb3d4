//! The option by which the images of a chain are found in a directory.

use std::path::PathBuf;

use clap::Args;

use crate::args::ImageFile;
use crate::catalog::Catalog;
use crate::chain_lock::{ChainLock, Sharing};
use crate::failure::ImagesFailure;
use crate::input;
use crate::session::Session;

/// The number of times that a chain is looked for again while other runs change it.
const TRIES: u32 = 100;

/// Where the images of a chain are found.
#[derive(Clone, Debug, Default, Args)]
pub struct FromDir {
    /// Find the images that FILE builds on in this directory, by their ids
    ///
    /// FILE is the newest image: a path, a name in the directory, or an id. Only sealed and packed
    /// images are found. `ramsnap list` shows the chains of a directory.
    #[arg(long, value_name = "DIR")]
    pub chain: Option<PathBuf>,
    /// The newest images that were looked for.
    #[arg(skip)]
    newest: Vec<PathBuf>,
}

impl FromDir {
    /// Replaces the newest image in `files` by all images of its chain, oldest first. Does nothing
    /// without the option.
    pub fn find(&mut self, files: &mut Vec<ImageFile>) -> anyhow::Result<()> {
        if self.chain.is_none() {
            return Ok(());
        }
        let [newest] = &files[..] else {
            return Err(ImagesFailure::SeveralNewest.into());
        };
        self.newest.push(newest.path.clone());
        *files = self.find_again(self.newest.len() - 1, files)?;
        Ok(())
    }

    /// Returns the images of the chain that was found as the `number`-th one as they are now, or
    /// `files` without the option.
    pub fn find_again(&self, number: usize, files: &[ImageFile]) -> anyhow::Result<Vec<ImageFile>> {
        let (Some(dir), Some(newest)) = (&self.chain, self.newest.get(number)) else {
            return Ok(files.to_vec());
        };
        // Another run may rename a new state into place, and remove the files that it had, between
        // two looks at the directory.
        let mut catalog = Catalog::of(dir)?;
        let mut found = catalog.chain(newest);
        for _ in 0..TRIES {
            if found.is_ok() {
                break;
            }
            let now = Catalog::of(dir)?;
            if now == catalog {
                break;
            }
            catalog = now;
            found = catalog.chain(newest);
        }
        Ok(found?.into_iter().map(ImageFile::at).collect())
    }

    /// Locks the directories of the chain that was found as the `number`-th one, or of `files`
    /// without the option, and those of `others`. Returns the files of the chain as they are under
    /// the lock: another run may have changed them meanwhile.
    pub fn lock(
        &self,
        session: &Session,
        number: usize,
        files: &[ImageFile],
        others: &[PathBuf],
        sharing: Sharing,
    ) -> anyhow::Result<(ChainLock, Vec<ImageFile>)> {
        let mut files = files.to_vec();
        loop {
            let paths = [&input::paths(&files), others].concat();
            let lock = ChainLock::take(session, &paths, sharing)?;
            let now = self.find_again(number, &files)?;
            if input::paths(&now) == input::paths(&files) {
                return Ok((lock, files));
            }
            files = now;
        }
    }

    /// Opens the images of the chain that was found as the `number`-th one, or `files` without the
    /// option. Looks for the chain again if another run has changed it meanwhile.
    pub fn open<T>(
        &self,
        number: usize,
        files: &[ImageFile],
        open: impl Fn(&[ImageFile]) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.attempt(number, files, open, Result::is_ok)?
    }

    /// Returns the result of `attempt` with the images of the chain that was found as the
    /// `number`-th one, or with `files` without the option. If it is not good and another run has
    /// changed the chain meanwhile, looks for the chain again and repeats.
    pub fn attempt<T>(
        &self,
        number: usize,
        files: &[ImageFile],
        attempt: impl Fn(&[ImageFile]) -> T,
        is_good: impl Fn(&T) -> bool,
    ) -> anyhow::Result<T> {
        let mut files = files.to_vec();
        let mut is_last = self.newest.get(number).is_none();
        for _ in 0..TRIES {
            let result = attempt(&files);
            if is_last || is_good(&result) {
                return Ok(result);
            }
            let now = self.find_again(number, &files)?;
            // Files that are the same now may have been opened while they changed.
            is_last = input::paths(&now) == input::paths(&files);
            files = now;
        }
        Ok(attempt(&files))
    }

    /// Replaces `file` by the image that it names in the directory. The images that this builds on
    /// may be elsewhere. Does nothing without the option.
    pub fn find_newest(&self, file: &mut ImageFile) -> anyhow::Result<()> {
        if let Some(dir) = &self.chain {
            *file = ImageFile::at(Catalog::of(dir)?.newest(&file.path)?);
        }
        Ok(())
    }
}
