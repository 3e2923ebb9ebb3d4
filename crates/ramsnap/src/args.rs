//! Arguments that several verbs share.

mod format;
mod from_dir;
mod in_process;
mod prefix;
mod vmm;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use image_format::{Footer, ImageId, ParseIdError};
use memory_image::Image;
use memory_writer::Seal;
use vmm_files::Machine;

use crate::failure::Failure;
use crate::numbers::{page_size, range, text_of};
use crate::{device, input, ram_lock};

pub use format::{Format, check_records, kept_seal, layouts};
pub use from_dir::FromDir;
pub use in_process::InProcess;
pub use vmm::{To, VmmFiles};

/// An image to read: a path, and the format if it precedes the path, as in `raw:full.mem`.
#[derive(Clone, Debug)]
pub struct ImageFile {
    pub path: PathBuf,
    format: Option<Format>,
}

impl ImageFile {
    /// Returns the parser for clap.
    pub fn parser() -> impl TypedValueParser<Value = Self> {
        OsStringValueParser::new().map(|text: OsString| Self::parse(&text))
    }

    /// A file whose name begins like a format is given with its directory: `./raw:full.mem`.
    fn parse(text: &OsStr) -> Self {
        let prefixed = Format::all().find_map(|format| {
            let path = text.as_bytes().strip_prefix(format.name().as_bytes())?;
            let path = path.strip_prefix(b":")?;
            Some((OsStr::from_bytes(path), Some(format)))
        });
        let (path, format) = prefixed.unwrap_or((text, None));
        let path = path.into();
        Self { path, format }
    }

    /// Returns the image at `path`, in the format that it records.
    pub fn at(path: PathBuf) -> Self {
        Self { path, format: None }
    }

    /// Returns the format given with the path, or else `other`.
    pub fn format(&self, other: Format) -> Format {
        self.format.unwrap_or(other)
    }

    /// Opens the image in the format given with the path, or else in `other`.
    pub fn open(&self, other: Format) -> anyhow::Result<Image> {
        if self.format.is_none() {
            prefix::check(&self.path)?;
        }
        let format = self.format(other);
        if format == Format::RAW && device::is_at(&self.path) {
            let (image, file) = device::open_raw(&self.path)?;
            ram_lock::check_not_restored(&file, &format!("{:?}", self.path))?;
            return Ok(image);
        }
        format.open(&self.path)
    }
}

/// The formats in which images are read.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Formats {
    /// The format of images given without one before their path (raw:FILE, sealed:FILE,
    /// packed:FILE)
    ///
    /// A raw image contains only bytes that the guest wrote, so it is never recognized. If the
    /// first image of a chain is raw, it is read as a full image unless an option states that it is
    /// a diff. Later raw images are read as diffs.
    #[arg(long, default_value = "auto", value_parser = Format::parser())]
    pub format: Format,
}

/// Properties that raw images do not record.
#[derive(Clone, Debug, Default, Args)]
pub struct RawImages {
    /// The page size of raw images, such as 16KiB; by default 4 KiB
    #[arg(long, value_name = "SIZE", value_parser = page_size)]
    pub page_size: Option<u64>,
    /// Treat the holes of raw diffs as clean pages even if the file system reports holes unreliably
    #[arg(long)]
    pub trust_holes: bool,
}

/// The destination of an image.
#[derive(Clone, Debug, Args)]
pub struct Output {
    /// The file to write; it appears when it is complete
    #[arg(id = "output", short = 'o', long, value_name = "FILE")]
    pub path: PathBuf,
    /// Replace the output if it exists; its owner, group, mode, access control list and extended
    /// attributes are kept as far as permitted
    #[arg(long)]
    pub force: bool,
}

/// The size of the smallest page of a guest in bytes.
const SMALLEST_PAGE: u64 = 4096;

/// Data that the image records beside its pages.
#[derive(Clone, Debug, Default, Args)]
pub struct Extras {
    /// Store the bytes of this file in the image, for example the state of the vCPUs
    #[arg(long, value_name = "FILE", requires = "output")]
    pub metadata: Option<PathBuf>,
    /// A range of guest-physical addresses that the RAM has, as ADDRESS:SIZE (0x100000000:2GiB) or
    /// START-END; repeat it in ascending order
    #[arg(long, value_name = "ADDRESS:SIZE", value_parser = range, requires = "output")]
    pub region_at: Vec<Range<u64>>,
    /// The machine whose RAM is at the addresses of the guest's RAM, in place of --region-at
    #[arg(
        long,
        value_name = "MACHINE",
        value_parser = vmm::machines(),
        conflicts_with = "region_at",
        requires = "output",
    )]
    pub guest: Option<Machine>,
}

impl Extras {
    /// Adds these values to `seal`, which is for `ram_bytes` bytes of RAM.
    pub fn add_to(&self, seal: Seal, ram_bytes: u64) -> anyhow::Result<Seal> {
        Ok(self.read()?.add_to(seal, ram_bytes)?)
    }

    /// Reads the files, and makes all checks that do not need the RAM.
    pub fn read(&self) -> anyhow::Result<ReadExtras> {
        let metadata = self.metadata.as_deref().map(read_metadata).transpose()?;
        if !self.region_at.is_sorted_by(|a, b| a.end <= b.start) {
            return Err(Failure::RegionsOverlap.into());
        }
        if let Some(region) = self
            .region_at
            .iter()
            .find(|it| it.start % SMALLEST_PAGE != 0)
        {
            let start = region.start;
            return Err(Failure::RegionInsidePage { start }.into());
        }
        Ok(ReadExtras {
            metadata,
            regions: self.region_at.clone(),
            guest: self.guest,
        })
    }

    /// Returns the given regions of RAM of this size, or none.
    pub fn regions_of(&self, ram_bytes: u64) -> Result<Vec<Range<u64>>, Failure> {
        regions(&self.region_at, self.guest, ram_bytes)
    }

    /// Returns `inputs` and the files that these arguments name.
    pub fn and_inputs(&self, inputs: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
        inputs.into_iter().chain(self.metadata.clone()).collect()
    }

    /// Refuses regions other than `of_guest`, which the image that these are for must have to fit.
    pub fn check_regions(&self, of_guest: Option<&[Range<u64>]>) -> Result<(), Failure> {
        let Some(of_guest) = of_guest else {
            return Ok(());
        };
        let sizes = of_guest.iter().map(|region| region.end - region.start);
        let given = self.regions_of(sizes.sum())?;
        match given.is_empty() || input::same_regions(&given, of_guest) {
            true => Ok(()),
            false => Err(Failure::OtherRegionsGiven {
                regions: text_of(of_guest),
            }),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.metadata.is_none() && self.region_at.is_empty() && self.guest.is_none()
    }
}

/// [`Extras`] with the contents of their files.
#[derive(Debug)]
pub struct ReadExtras {
    metadata: Option<Vec<u8>>,
    regions: Vec<Range<u64>>,
    guest: Option<Machine>,
}

impl ReadExtras {
    /// Adds these values to `seal`, which is for `ram_bytes` bytes of RAM.
    pub fn add_to(self, mut seal: Seal, ram_bytes: u64) -> Result<Seal, Failure> {
        if let Some(bytes) = self.metadata {
            seal = seal.metadata(bytes);
        }
        let regions = regions(&self.regions, self.guest, ram_bytes)?;
        Ok(match regions.is_empty() {
            true => seal,
            false => seal.regions(regions),
        })
    }
}

/// Returns the given regions, or those of the machine. They have all of the RAM.
fn regions(
    given: &[Range<u64>],
    guest: Option<Machine>,
    ram_bytes: u64,
) -> Result<Vec<Range<u64>>, Failure> {
    if let Some(machine) = guest {
        let layout = machine.layout(ram_bytes);
        let layout = layout.map_err(|source| Failure::NotOfMachine {
            machine: machine.name(),
            source,
        })?;
        return Ok(layout.addresses().collect());
    }
    let sizes = given.iter().map(|region| region.end - region.start);
    let sum: u128 = sizes.map(u128::from).sum();
    match given.is_empty() || sum == ram_bytes.into() {
        true => Ok(given.to_vec()),
        false => Err(Failure::NoLayout { ram_bytes, sum }),
    }
}

/// Parses an id, as `ramsnap info` prints it.
pub fn image_id(text: &str) -> Result<ImageId, String> {
    text.parse()
        .map_err(|error: ParseIdError| error.to_string())
}

fn read_metadata(path: &Path) -> anyhow::Result<Vec<u8>> {
    let failed = || format!("cannot read the metadata {path:?}");
    let file = File::open(path).with_context(failed)?;
    let mut bytes = Vec::new();
    let most = Footer::MAX_METADATA as u64;
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .with_context(failed)?;
    if bytes.len() as u64 > most {
        let path = path.to_owned();
        return Err(Failure::TooMuchMetadata { path }.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use memory_image::Layout;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::plain("full.mem", "full.mem", None)]
    #[case::raw("raw:full.mem", "full.mem", Some(Format::Layout(Layout::Raw)))]
    #[case::with_a_directory("packed:/a/b:c", "/a/b:c", Some(Format::Layout(Layout::Packed)))]
    #[case::a_name_that_begins_like_one("./raw:full.mem", "./raw:full.mem", None)]
    #[case::of_no_format("tar:full.mem", "tar:full.mem", None)]
    fn a_format_may_stand_before_a_path(
        #[case] text: &str,
        #[case] path: &str,
        #[case] format: Option<Format>,
    ) {
        let file = ImageFile::parse(OsStr::new(text));
        assert_eq!((file.path, file.format), (path.into(), format));
    }
}
