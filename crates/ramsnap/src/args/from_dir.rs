//! The option by which the images of a chain are found in a directory.

use std::path::PathBuf;

use clap::Args;

use crate::args::ImageFile;
use crate::catalog::Catalog;
use crate::failure::ImagesFailure;

/// Where the images of a chain are found.
#[derive(Clone, Debug, Default, Args)]
pub struct FromDir {
    /// Find the images that FILE builds on in this directory, by their ids
    ///
    /// FILE is the newest image: a path, a name in the directory, or an id. Only sealed and packed
    /// images are found. `ramsnap list` shows the chains of a directory.
    #[arg(long, value_name = "DIR")]
    pub chain: Option<PathBuf>,
}

impl FromDir {
    /// Replaces the newest image in `files` by all images of its chain, oldest first. Does nothing
    /// without the option.
    pub fn find(&self, files: &mut Vec<ImageFile>) -> anyhow::Result<()> {
        let Some(dir) = &self.chain else {
            return Ok(());
        };
        let [newest] = &files[..] else {
            return Err(ImagesFailure::SeveralNewest.into());
        };
        let chain = Catalog::of(dir)?.chain(&newest.path)?;
        *files = chain.into_iter().map(ImageFile::at).collect();
        Ok(())
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
