//! The properties of an image, as text and as JSON.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use image_format::{Footer, ImageKind, Storage};
use memory_image::{Image, ReadImageError};
use serde::Serialize;
use sparse_file::{
    HolesUnknown, PageHoles, PagesUnknown, allocated_bytes, extents, file_system_name,
};

use crate::print::{self, JsonPath, count, size};

/// The properties of a file.
#[derive(Debug, Serialize)]
pub struct ImageInfo {
    file: JsonPath,
    layout: &'static str,
    /// `None` for a raw image, which does not record it.
    kind: Option<&'static str>,
    id: Option<String>,
    parent: Option<String>,
    ram_bytes: u64,
    page_bytes: Option<u64>,
    regions: Vec<Region>,
    present: Pages,
    zero: Option<Pages>,
    clean: Option<Pages>,
    metadata_bytes: u64,
    file_bytes: u64,
    allocated_bytes: u64,
    holes: Option<Holes>,
}

#[derive(Debug, Serialize)]
struct Region {
    guest_address: u64,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Pages {
    bytes: u64,
    runs: u64,
}

/// The reliability of the holes of a raw file.
#[derive(Debug, Serialize)]
struct Holes {
    file_system: Option<String>,
    /// Whether unwritten pages of 4 KiB can be distinguished from zeros, by the type of the file
    /// system and its options. A verb that depends on this examines more.
    tell_clean_from_zero: Option<bool>,
}

impl ImageInfo {
    /// Returns the properties of an image. Of a raw image, only the list of extents is read.
    /// Nothing is written or synced.
    pub fn of(image: &Image) -> anyhow::Result<Self> {
        let path = image.path();
        let version = match image.version() {
            // A block device.
            Err(ReadImageError::NoFile { .. }) => None,
            version => Some(version?),
        };
        let file = version.as_ref().map(|version| &**version.file());
        let looking = || format!("cannot look at {path:?}");
        let common = Self {
            file: path.to_owned().into(),
            layout: image.layout().name(),
            kind: None,
            id: None,
            parent: None,
            ram_bytes: image.ram_size(),
            page_bytes: None,
            regions: Vec::new(),
            present: Pages::default(),
            zero: None,
            clean: None,
            metadata_bytes: 0,
            file_bytes: match file {
                Some(file) => file.metadata().with_context(looking)?.len(),
                None => image.ram_size(),
            },
            allocated_bytes: match file {
                Some(file) => allocated_bytes(file).with_context(looking)?,
                None => image.ram_size(),
            },
            holes: None,
        };
        match image.footer() {
            Some(footer) => Ok(common.sealed(footer)),
            None => match file {
                Some(file) => common.raw(file, path),
                None => Ok(common.on_device()),
            },
        }
    }

    fn sealed(self, footer: &Footer) -> Self {
        let regions = footer.regions.iter().map(|region| Region {
            guest_address: region.start,
            bytes: region.end - region.start,
        });
        let pages = |zero| {
            let mut pages = Pages::default();
            for run in &footer.runs {
                if (run.stored == Storage::Zeros) == zero {
                    pages.add(run.len);
                }
            }
            pages
        };
        let (present, zero) = (pages(false), pages(true));
        Self {
            kind: Some(match footer.kind {
                ImageKind::Full => "full",
                ImageKind::Diff { .. } => "diff",
            }),
            id: Some(footer.id.to_string()),
            parent: footer.parent().map(|parent| parent.to_string()),
            page_bytes: Some(footer.page_size),
            regions: regions.collect(),
            present,
            zero: Some(zero),
            clean: Some(clean(footer)),
            metadata_bytes: footer.metadata.len() as u64,
            ..self
        }
    }

    /// A device has no holes.
    fn on_device(mut self) -> Self {
        self.present.add(self.ram_bytes);
        self.zero = Some(Pages::default());
        self.holes = Some(Holes {
            file_system: None,
            tell_clean_from_zero: Some(false),
        });
        self
    }

    fn raw(mut self, file: &File, path: &Path) -> anyhow::Result<Self> {
        let mut hole = Pages::default();
        let listing = || format!("cannot list the extents of {path:?}");
        for extent in extents(file).with_context(listing)? {
            let extent = extent.with_context(listing)?;
            let len = extent.range.end - extent.range.start;
            match extent.kind {
                sparse_file::ExtentKind::Data => self.present.add(len),
                sparse_file::ExtentKind::Hole => hole.add(len),
            }
        }
        self.holes = Some(Holes {
            file_system: file_system_name(file).ok(),
            tell_clean_from_zero: match PageHoles::check_new(file, 4096) {
                Ok(()) => Some(true),
                Err(PagesUnknown::Holes(HolesUnknown::Io(_))) => None,
                Err(_) => Some(false),
            },
        });
        self.zero = Some(hole);
        Ok(self)
    }

    /// Returns the properties of a raw image that is known to be a diff.
    pub fn of_raw_diff(self) -> Self {
        let kind = Some("diff");
        Self { kind, ..self }
    }

    /// Returns a summary on one line.
    pub fn summary(&self) -> String {
        let layout = self.layout_and_kind();
        let (ram, present) = (size(self.ram_bytes), size(self.present.bytes));
        let id = self.id.as_ref().map(|id| format!(", id {id}"));
        format!(
            "{layout} of {ram} of RAM, {present} present{}",
            id.unwrap_or_default()
        )
    }

    fn layout_and_kind(&self) -> String {
        match self.kind {
            Some(kind) => format!("{} {kind} image", self.layout),
            None => format!("{} image", self.layout),
        }
    }

    /// Returns all properties, a line each.
    pub fn text(&self) -> String {
        let mut lines = vec![format!(
            "{}: {}",
            print::path(&self.file),
            self.layout_and_kind()
        )];
        let mut add = |name: &str, value: String| lines.push(format!("  {name:<9} {value}"));
        if let Some(id) = &self.id {
            add("id", id.clone());
        }
        if self.kind == Some("diff") {
            let parent = self.parent.as_deref();
            add("parent", parent.unwrap_or("not named").to_owned());
        }
        let page = self
            .page_bytes
            .map(|page| format!(", in pages of {}", size(page)));
        add("RAM", size(self.ram_bytes) + &page.unwrap_or_default());
        for region in &self.regions {
            let (start, end) = (
                region.guest_address,
                region.guest_address.saturating_add(region.bytes),
            );
            add(
                "region",
                format!("{start:#x}..{end:#x}, {}", size(region.bytes)),
            );
        }
        match &self.holes {
            None => {
                add("present", self.present.text("run"));
                add("zero", self.zero.unwrap_or_default().text("run"));
                add("clean", self.clean.unwrap_or_default().text("run"));
                add("metadata", size(self.metadata_bytes));
            }
            Some(holes) => {
                add("data", self.present.text("extent"));
                add("holes", self.zero.unwrap_or_default().text("extent"));
                add("so", holes.text());
            }
        }
        let (file, allocated) = (size(self.file_bytes), size(self.allocated_bytes));
        add("file", format!("{file}, {allocated} allocated"));
        lines.join("\n")
    }
}

impl Pages {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.runs += 1;
    }

    fn text(self, unit: &str) -> String {
        format!("{} in {}", size(self.bytes), count(self.runs, unit))
    }
}

impl Holes {
    fn text(&self) -> String {
        let file_system = self.file_system.as_deref().unwrap_or("this file system");
        match self.tell_clean_from_zero {
            Some(true) => {
                format!(
                    "on {file_system}, holes are exactly the unwritten pages, \
                     unless a copy punched or filled holes"
                )
            }
            Some(false) => {
                format!("on {file_system}, holes do not identify unwritten pages")
            }
            None => "it is unknown whether holes identify unwritten pages".to_owned(),
        }
    }
}

/// Returns the ranges between the runs.
fn clean(footer: &Footer) -> Pages {
    let mut clean = Pages::default();
    let mut at = 0;
    let end = image_format::Run::zeros(footer.ram_size..footer.ram_size);
    for run in footer.runs.iter().chain([&end]) {
        if run.start > at {
            clean.add(run.start - at);
        }
        at = run.range().end;
    }
    clean
}
