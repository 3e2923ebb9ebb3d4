//! The images that a verb is given.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memory_image::{Chain, Image, ImageError};

use crate::args::RawImages;
use crate::failure::Failure;
use crate::session::Session;

/// The page of raw images, unless told: the smallest that hosts have.
const RAW_PAGE: u64 = 4096;

/// Opens images, oldest first, as one chain: a full image and its diffs, or diffs alone. The first is taken for a full one if it is raw.
pub fn chain(session: &Session, files: &[PathBuf], raw: &RawImages) -> anyhow::Result<Chain> {
    let first = files.first().ok_or(ImageError::NoImages)?;
    open(session, files, raw, Image::open(first)?.is_diff())
}

/// The same with all of the RAM.
pub fn full_chain(session: &Session, files: &[PathBuf], raw: &RawImages) -> anyhow::Result<Chain> {
    let chain = chain(session, files, raw)?;
    if chain.is_full() {
        return Ok(chain);
    }
    let path = files[0].clone();
    Err(ImageError::NotFull { path }.into())
}

/// The same of diffs, also where they are raw and don't say so.
pub fn diffs(session: &Session, files: &[PathBuf], raw: &RawImages) -> anyhow::Result<Chain> {
    open(session, files, raw, true)
}

fn open(
    session: &Session,
    files: &[PathBuf],
    raw: &RawImages,
    diffs: bool,
) -> anyhow::Result<Chain> {
    let (first, later) = files.split_first().ok_or(ImageError::NoImages)?;
    let page_size = match raw.page_size {
        Some(page_size) => page_size,
        None => smallest_page(files)?,
    };
    let mut chain = match diffs {
        true => Chain::open_diff(first, page_size)?,
        false => Chain::open(first, page_size)?,
    };
    for diff in later {
        if !raw.trust_holes {
            chain.push(diff)?;
        } else if let Some(why) = chain.push_by_holes(diff)? {
            let why = anyhow::Error::from(why);
            session.warn(&format!(
                "{diff:?}: its clean and zero pages may be taken for each other: {why:#}"
            ));
        }
    }
    Ok(chain)
}

fn smallest_page(files: &[PathBuf]) -> Result<u64, ImageError> {
    let page = |file| {
        let image = Image::open(file)?;
        Ok(image.footer().map_or(RAW_PAGE, |footer| footer.page_size))
    };
    let pages = files
        .iter()
        .map(page)
        .collect::<Result<Vec<_>, ImageError>>()?;
    pages.into_iter().min().ok_or(ImageError::NoImages)
}

/// Sums the pages of all sealed images: what is made of them gets checksums of its own, which would be right for wrong bytes.
pub fn check_sums<'i>(
    session: &Session,
    images: impl IntoIterator<Item = &'i Image>,
) -> anyhow::Result<()> {
    for image in images {
        if image.footer().is_none() {
            continue;
        }
        let found = sum(session, image)?;
        if !found.is_whole() {
            let path = image.path().to_owned();
            let found = found.found;
            return Err(Failure::Damaged { path, found }.into());
        }
    }
    Ok(())
}

/// [`Image::verify`], with a bar.
pub fn sum(session: &Session, image: &Image) -> Result<memory_image::Verified, ImageError> {
    let name = image.path().file_name().unwrap_or_default().display();
    let bar = session.bar(&format!("checking {name}"));
    image.verify(&|done, total| {
        bar.set_length(total);
        bar.set_position(done);
        session.flow()
    })
}

/// Whether `path` is, by whatever name, one of `inputs`.
pub fn is_one_of(path: &Path, inputs: &[PathBuf]) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|it| (it.dev(), it.ino()));
    let output = identity(path);
    output.is_some() && inputs.iter().any(|input| identity(input) == output)
}
