//! The format of the input of a conversion.

use anyhow::Context;
use memory_image::Image;

use super::Convert;
use crate::args::Format;
use crate::failure::{Failure, FormatFailure};

impl Convert {
    pub(super) fn open_input(&self) -> anyhow::Result<Image> {
        if !self.raw_diff {
            let image = self.input.open(self.formats.format);
            return image.map_err(|error| self.with_format_named(error));
        }
        // Bytes that a guest can write never make a file an image here.
        if Image::open(&self.input.path).is_ok() {
            let path = self.input.path.clone();
            return Err(Failure::NotARawDiff { path }.into());
        }
        self.input.open(Format::RAW)
    }

    /// Returns the format of an input that is a file of another VMM. A directory, and the state
    /// file of VMware, are no RAM and so have no bytes of a guest at their start: only these are
    /// recognized.
    pub(super) fn vmm_format(&self) -> anyhow::Result<Option<vmm_files::Format>> {
        let path = &self.input.path;
        match self.input.format(self.formats.format) {
            Format::Vmm(format) => Ok(Some(format)),
            Format::Layout(_) => Ok(None),
            Format::Auto => {
                let extension = path.extension().unwrap_or_default();
                let is_state = extension == "vmsn" || extension == "vmss";
                if self.raw_diff || !(is_state || path.is_dir()) {
                    return Ok(None);
                }
                let found = vmm_files::Format::detect(path);
                found.with_context(|| format!("cannot open {path:?}"))
            }
        }
    }

    /// Refuses --ram-block for a file that has none.
    pub(super) fn check_ram_blocks(&self) -> Result<(), FormatFailure> {
        let has_some = matches!(
            self.input.format(self.formats.format),
            Format::Vmm(vmm_files::Format::Qemu | vmm_files::Format::Libvirt)
        );
        match has_some || self.vmm.ram_block.is_empty() {
            true => Ok(()),
            false => Err(FormatFailure::NoRamBlocks {
                path: self.input.path.clone(),
            }),
        }
    }

    /// Returns the error of a file that is no image, with the format to name if it has one.
    fn with_format_named(&self, error: anyhow::Error) -> anyhow::Error {
        let path = self.input.path.clone();
        let is_auto = self.input.format(self.formats.format) == Format::Auto;
        match vmm_files::Format::detect(&path) {
            Ok(Some(format)) if is_auto => Failure::FormatNotNamed { path, format }.into(),
            _ => error,
        }
    }
}
