//! `ramsnap info`: the properties of images.

use std::path::PathBuf;

use clap::Args;

use crate::args::{Formats, FromDir, ImageFile};
use crate::exit_status::ExitStatus;
use crate::image_info::ImageInfo;
use crate::print;
use crate::{input, words};

/// Show whether files are full images or diffs, of which guest, and which pages they hold
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ramsnap info full.mem d1.mem raw:/dev/shm/guest")]
pub struct InfoArgs {
    /// Images
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// As JSON: a list of objects, sizes in bytes. A path that is not UTF-8 is an object: text, and
    /// bytes_hex
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read.
    pub fn files(&self) -> Vec<PathBuf> {
        input::paths(&self.files)
    }

    pub fn run(&self) -> anyhow::Result<ExitStatus> {
        let info = |file: &ImageFile| ImageInfo::of(&file.open(self.formats.format)?);
        let all = |files: &[ImageFile]| {
            let (mut infos, mut failures) = (Vec::new(), Vec::new());
            for file in files {
                match info(file) {
                    Ok(info) => infos.push(info),
                    Err(error) => failures.push(error),
                }
            }
            (infos, failures)
        };
        let good = |(_, failures): &(_, Vec<_>)| failures.is_empty();
        let (infos, mut failures) = self.from.attempt(0, &self.files, all, good)?;
        if self.json {
            print::json(&infos)?;
        } else {
            for info in &infos {
                print::line(&info.text())?;
            }
        }
        // A failure does not prevent the other files from being inspected.
        let last = failures.pop();
        for other in failures {
            words::print_error(&other);
        }
        last.map_or(Ok(ExitStatus::Success), Err)
    }
}
