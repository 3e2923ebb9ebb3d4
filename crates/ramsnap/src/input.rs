//! The images that are the input of a verb.

use std::ops::Range;
use std::path::{Path, PathBuf};

use dirty_bitmap::coalesce;
use image_format::{Footer, ImageId};
use memory_image::{Chain, ChainError, Image, NotFullError, ReadAmbiguity, VerifyError};
use sparse_file::FileIdentity;

use crate::args::{Format, Formats, ImageFile, RawImages};
use crate::failure::{Failure, ImagesFailure};
use crate::session::Session;
use crate::{print, words};

/// The default page size of raw images: the smallest page size of any host.
pub const RAW_PAGE: u64 = 4096;

/// Opens images, oldest first, as one chain: a full image and its diffs, or diffs alone. The first
/// is taken for a full one if it is raw.
pub fn chain(
    session: &Session,
    files: &[ImageFile],
    formats: Formats,
    raw: &RawImages,
) -> anyhow::Result<Chain> {
    put_together(session, open(files, formats.format)?, raw, false)
}

/// Opens images as one chain, and refuses a chain that does not hold all of the RAM.
pub fn full_chain(
    session: &Session,
    files: &[ImageFile],
    formats: Formats,
    raw: &RawImages,
) -> anyhow::Result<Chain> {
    let chain = chain(session, files, formats, raw)?;
    if chain.is_full() {
        return Ok(chain);
    }
    let path = files[0].path.clone();
    Err(NotFullError::new(path).into())
}

/// Opens raw diffs as one chain. A raw diff does not record that it is a diff.
pub fn raw_diffs(session: &Session, files: &[ImageFile], raw: &RawImages) -> anyhow::Result<Chain> {
    put_together(session, open(files, Format::RAW)?, raw, true)
}

fn open(files: &[ImageFile], format: Format) -> anyhow::Result<Vec<Image>> {
    files.iter().map(|file| file.open(format)).collect()
}

/// Joins images to one chain, which is a chain of diffs if `diffs` is set or the first image is a
/// diff.
pub fn put_together(
    session: &Session,
    images: Vec<Image>,
    raw: &RawImages,
    diffs: bool,
) -> anyhow::Result<Chain> {
    let page = |image: &Image| image.footer().map_or(RAW_PAGE, |footer| footer.page_size);
    let smallest = images.iter().map(page).min().ok_or(ChainError::NoImages)?;
    let page_size = raw.page_size.unwrap_or(smallest);
    let warn = |path: &Path, ambiguity: Option<ReadAmbiguity>| {
        if let Some(why) = ambiguity {
            let why = words::text(&why.into());
            session.warn(&format!(
                "{path:?}: its clean and zero pages may be taken for each other: {why}"
            ));
        }
    };
    let id = |image: &Image| Some((image.id()?, image.path().to_owned()));
    let ids: Vec<_> = images.iter().filter_map(id).collect();
    let mut images = images.into_iter();
    let first = images.next().ok_or(ChainError::NoImages)?;
    let by_holes = |image: &Image| image.footer().is_none() && raw.trust_holes;
    let mut chain = match diffs {
        true if by_holes(&first) => {
            let path = first.path().to_owned();
            let (chain, ambiguity) = Chain::from_diff_trusting_holes(first, page_size)?;
            warn(&path, ambiguity);
            chain
        }
        true => Chain::from_diff(first, page_size)?,
        false => Chain::from_image(first, page_size)?,
    };
    for image in images {
        check_order(&chain, &image, &ids)?;
        if by_holes(&image) {
            let ambiguity = chain.push_trusting_holes(image.path())?;
            warn(image.path(), ambiguity);
        } else {
            chain.push_image(image)?;
        }
    }
    Ok(chain)
}

/// Refuses a diff that is named before the image that it was taken after, one of `ids`.
fn check_order(
    chain: &Chain,
    image: &Image,
    ids: &[(ImageId, PathBuf)],
) -> Result<(), ImagesFailure> {
    let Some(parent) = image.footer().and_then(Footer::parent) else {
        return Ok(());
    };
    let named = ids.iter().find(|(id, _)| *id == parent);
    match named.filter(|_| chain.ids().all(|id| id != parent)) {
        Some((_, after)) => Err(ImagesFailure::OutOfOrder {
            path: image.path().to_owned(),
            after: after.clone(),
        }),
        None => Ok(()),
    }
}

/// Returns the guest-physical addresses of the RAM. Raw images do not record them.
pub fn regions(chain: &Chain) -> Option<&[Range<u64>]> {
    let footer = chain.images().find_map(Image::footer);
    footer.map(|footer| &footer.regions[..])
}

/// Returns whether two lists of regions are of the same RAM: adjacent regions are the same as one.
pub fn same_regions(one: &[Range<u64>], other: &[Range<u64>]) -> bool {
    coalesce(one.iter().cloned()).eq(coalesce(other.iter().cloned()))
}

/// Warns if the result of `chain` has no metadata because its newest image is raw. The metadata of
/// an older image describes an older state.
pub fn warn_of_old_metadata(session: &Session, chain: &Chain) {
    let newest_is_raw = chain
        .images()
        .last()
        .is_some_and(|it| it.footer().is_none());
    let has_some = |image: &&Image| image.footer().is_some_and(|it| !it.metadata.is_empty());
    if let (true, Some(image)) = (newest_is_raw, chain.images().find(has_some)) {
        session.warn(&format!(
            "the metadata of {:?} is not kept: it is of an older state than the last file, which is raw and has none",
            image.path()
        ));
    }
}

/// Verifies the checksums of all sealed and packed images. The result gets new checksums, which
/// would match damaged bytes.
pub fn check_sums<'i>(
    session: &Session,
    images: impl IntoIterator<Item = &'i Image>,
) -> anyhow::Result<()> {
    for image in images {
        if image.footer().is_none() {
            continue;
        }
        let found = sum(session, image)?;
        if !found.is_ok() {
            let path = image.path().to_owned();
            let found = found.damage_count;
            return Err(Failure::Damaged { path, found }.into());
        }
    }
    Ok(())
}

/// Runs [`Image::verify`] with a progress bar.
pub fn sum(session: &Session, image: &Image) -> Result<memory_image::VerifyReport, VerifyError> {
    let name = print::path(image.path().file_name().unwrap_or_default().as_ref());
    image.verify(&mut session.progress(&format!("checking {name}")))
}

/// Returns whether `path` is one of `inputs`, by any name.
pub fn is_one_of(path: &Path, inputs: &[PathBuf]) -> bool {
    let Ok(output) = FileIdentity::at(path) else {
        return false;
    };
    let is_it = |input: &PathBuf| FileIdentity::at(input).is_ok_and(|input| input.may_be(&output));
    inputs.iter().any(is_it)
}

/// Returns the paths of the images.
pub fn paths(files: &[ImageFile]) -> Vec<PathBuf> {
    files.iter().map(|file| file.path.clone()).collect()
}
