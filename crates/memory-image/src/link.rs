//! Whether an image follows the ones below it.

use image_format::ImageId;

use crate::chain::Chain;
use crate::error::{ImageError, Link};
use crate::image::Image;

impl Chain {
    /// Whether `image` may be of a chain with pages of this size.
    pub(crate) fn check_pages(&self, image: &Image) -> Result<(), ImageError> {
        let (path, page_size) = (image.path.clone(), self.page_size());
        match &image.footer {
            Some(footer) if !footer.page_size.is_multiple_of(page_size) => {
                Err(ImageError::PageSizeDiffers {
                    path,
                    image: footer.page_size,
                    chain: page_size,
                })
            }
            None if !image.size.is_multiple_of(page_size) => Err(ImageError::NotWholePages {
                path,
                size: image.size,
                page_size,
            }),
            _ => Ok(()),
        }
    }

    /// Whether the chain has all of the RAM.
    pub(crate) fn check_full(&self) -> Result<(), ImageError> {
        if self.is_full() {
            return Ok(());
        }
        let path = self.base().path.clone();
        Err(ImageError::NotFull { path })
    }

    /// Whether `image` is the diff taken after the newest here.
    pub(crate) fn check_follows(&self, image: &Image) -> Result<(), ImageError> {
        let base = self.base();
        let path = || image.path.clone();
        if image.size != base.size {
            return Err(ImageError::SizeDiffers {
                path: path(),
                size: image.size,
                base: base.path.clone(),
                base_size: base.size,
            });
        }
        self.check_pages(image)?;
        if let (Some(theirs), Some(ours)) =
            (image.footer(), self.oldest_sealed().and_then(Image::footer))
            && theirs.regions != ours.regions
        {
            return Err(ImageError::RegionsDiffer {
                path: path(),
                base: base.path.clone(),
            });
        }
        self.check_link(image).map_err(|why| ImageError::Link {
            path: path(),
            newest: self.newest().path.clone(),
            why,
        })
    }

    fn check_link(&self, image: &Image) -> Result<(), Link> {
        if self.members.has_file_of(image) {
            return Err(Link::Repeated);
        }
        let Some(footer) = image.footer() else {
            // A raw diff names nobody.
            return Ok(());
        };
        match (footer.parent(), self.newest().id()) {
            // Its id may be in the chain: the guest is back in an older state.
            (Some(parent), Some(newest)) if parent == newest => Ok(()),
            _ if self.members.has_id_of(image) => Err(Link::Repeated),
            _ if !image.is_diff() => Err(Link::Full),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Link::NoParent),
            (Some(parent), newest) => Err(self.elsewhere(parent, newest)),
        }
    }

    /// Where the parent is that isn't the newest.
    fn elsewhere(&self, parent: ImageId, newest: Option<ImageId>) -> Link {
        let below = self.images().find(|image| image.id() == Some(parent));
        match (below, newest) {
            (Some(image), _) => Link::Reordered {
                parent: image.path.clone(),
            },
            (None, Some(newest)) => Link::Missing { parent, newest },
            (None, None) => Link::OnRaw { parent },
        }
    }

    fn newest(&self) -> &Image {
        self.layers.last().expect("there is always a base")
    }
}
