//! The layouts that images are written in, and the formats that they are read in.

use std::path::Path;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use memory_image::{Image, Layout};
use memory_writer::Seal;

use super::vmm::format_value;
use crate::failure::Failure;
use crate::ram_lock;

/// Returns the parser of `--layout`.
pub fn layouts() -> impl TypedValueParser<Value = Layout> {
    let value = |layout: Layout| {
        PossibleValue::new(layout.name()).help(match layout {
            Layout::Raw => "Bytes of RAM and nothing else; `cp` of a diff loses its pages of zeros",
            Layout::Sealed => "Bytes of RAM and a footer of ids, a map and checksums",
            Layout::Packed => "Present pages one after another and such a footer",
        })
    };
    PossibleValuesParser::new(Layout::ALL.map(value)).try_map(|name| {
        let named = |layout: &Layout| layout.name() == name;
        Layout::ALL.into_iter().find(named).ok_or("no such layout")
    })
}

/// Refuses an image without a footer at `output` if it is to record `more` than pages.
pub fn check_records(layout: Layout, more: bool, output: &Path) -> Result<(), Failure> {
    match more && !layout.has_footer() {
        true => Err(Failure::RawHasNoSeal {
            path: output.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Returns `seal`, without metadata for a layout that stores none. A raw image records nothing
/// else, and a raw diff needs the images that the seal names nevertheless.
pub fn kept_seal(layout: Layout, seal: Seal) -> Seal {
    match layout.has_footer() {
        true => seal,
        false => seal.metadata(Vec::new()),
    }
}

/// The format that an image is read in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The layout that the footer names; never raw.
    #[default]
    Auto,
    Layout(Layout),
    /// A file of another VMM, which only `convert` reads.
    Vmm(vmm_files::Format),
}

impl Format {
    pub const RAW: Self = Self::Layout(Layout::Raw);

    /// Returns all formats.
    pub fn all() -> impl Iterator<Item = Self> {
        let layouts = Layout::ALL.into_iter().map(Self::Layout);
        let vmms = vmm_files::Format::ALL.into_iter().map(Self::Vmm);
        std::iter::once(Self::Auto).chain(layouts).chain(vmms)
    }

    /// Returns the name, which may stand before a path.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Layout(layout) => layout.name(),
            Self::Vmm(format) => format.name(),
        }
    }

    /// Returns the parser of `--format`.
    pub fn parser() -> impl TypedValueParser<Value = Self> {
        let value = |format: Self| {
            PossibleValue::new(format.name()).help(match format {
                Self::Auto => "Sealed or packed, as the file records; never raw",
                Self::Layout(Layout::Raw) => "Bytes of RAM and nothing else",
                Self::Layout(Layout::Sealed) => "Bytes of RAM and a footer",
                Self::Layout(Layout::Packed) => "Present pages one after another and a footer",
                Self::Vmm(format) => return format_value(format),
            })
        };
        PossibleValuesParser::new(Self::all().map(value)).try_map(|name| {
            let named = |format: &Self| format.name() == name;
            Self::all().find(named).ok_or("no such format")
        })
    }

    pub(super) fn open(self, path: &Path) -> anyhow::Result<Image> {
        let image = match self {
            Self::Auto => Image::open(path)?,
            Self::Layout(layout) => Image::open_as(path, layout)?,
            Self::Vmm(format) => {
                let path = path.to_owned();
                return Err(Failure::OnlyConverted { path, format }.into());
            }
        };
        if image.footer().is_none() {
            // It may be RAM.
            ram_lock::check_not_restored(image.version()?.file(), &format!("{path:?}"))?;
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[arg(long, value_parser = layouts())]
        layout: Layout,
        #[arg(long, value_parser = Format::parser())]
        format: Format,
    }

    #[test]
    fn each_layout_is_a_value_of_both_options() {
        for layout in Layout::ALL {
            let name = layout.name();
            let line = Line::try_parse_from(["", "--layout", name, "--format", name]).unwrap();
            assert_eq!((line.layout, line.format), (layout, Format::Layout(layout)));
        }
        let error = Line::try_parse_from(["", "--layout", "odd", "--format", "auto"]).unwrap_err();
        assert!(error.to_string().contains("raw, sealed, packed"), "{error}");
    }
}
