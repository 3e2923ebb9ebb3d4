//! Checks that an image follows the newest image of a chain.

use dirty_bitmap::coalesce;
use image_format::ImageId;

use crate::chain::Chain;
use crate::error::{ChainError, LinkError, NotFullError};
use crate::image::Image;

impl Chain {
    /// Checks that `image` fits the chain's page size.
    pub(crate) fn check_pages(&self, image: &Image) -> Result<(), ChainError> {
        let (path, page_size) = (image.path.clone(), self.page_size());
        match &image.footer {
            Some(footer) if !footer.page_size.is_multiple_of(page_size) => {
                Err(ChainError::PageSizeDiffers {
                    path,
                    image: footer.page_size,
                    chain: page_size,
                })
            }
            None if !image.size.is_multiple_of(page_size) => Err(ChainError::NotWholePages {
                path,
                size: image.size,
                page_size,
            }),
            _ => Ok(()),
        }
    }

    /// Checks that the chain has a full base.
    ///
    /// # Errors
    /// Returns [`NotFullError`], which names the oldest diff.
    pub fn check_full(&self) -> Result<(), NotFullError> {
        if self.is_full() {
            return Ok(());
        }
        Err(NotFullError::new(self.base().path.clone()))
    }

    /// Checks that `image` is the diff taken after the newest image of the chain.
    pub(crate) fn check_follows(&self, image: &Image) -> Result<(), ChainError> {
        let base = self.base();
        let path = || image.path.clone();
        if image.size != base.size {
            return Err(ChainError::SizeDiffers {
                path: path(),
                size: image.size,
                base: base.path.clone(),
                base_size: base.size,
            });
        }
        self.check_pages(image)?;
        if let (Some(theirs), Some(ours)) =
            (image.footer(), self.oldest_sealed().and_then(Image::footer))
            && !coalesce(theirs.regions.iter().cloned()).eq(coalesce(ours.regions.iter().cloned()))
        {
            return Err(ChainError::RegionsDiffer {
                path: path(),
                regions: theirs.regions.clone(),
                base: base.path.clone(),
                base_regions: ours.regions.clone(),
            });
        }
        self.check_link(image).map_err(|why| ChainError::Link {
            path: path(),
            newest: self.newest().path.clone(),
            why,
        })
    }

    fn check_link(&self, image: &Image) -> Result<(), LinkError> {
        if self.members.has_file_of(image) {
            return Err(LinkError::Repeated);
        }
        let Some(footer) = image.footer() else {
            // A raw diff has no parent.
            return Ok(());
        };
        match (footer.parent(), self.newest().id()) {
            // Its id may be in the chain: the guest is in an older state again.
            (Some(parent), Some(newest)) if parent == newest => Ok(()),
            _ if self.members.has_id_of(image) => Err(LinkError::Repeated),
            _ if !image.is_diff() => Err(LinkError::Full),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(LinkError::NoParent),
            (Some(parent), newest) => Err(self.classify_parent(parent, newest)),
        }
    }

    /// Explains why `parent` is not the newest image.
    fn classify_parent(&self, parent: ImageId, newest: Option<ImageId>) -> LinkError {
        let below = self.images().find(|image| image.id() == Some(parent));
        match (below, newest) {
            (Some(image), _) => LinkError::Reordered {
                parent: image.path.clone(),
            },
            (None, Some(newest)) => LinkError::Missing { parent, newest },
            (None, None) => LinkError::OnRaw { parent },
        }
    }

    fn newest(&self) -> &Image {
        self.layers.last().expect("there is always a base")
    }
}
