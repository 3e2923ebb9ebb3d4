//! `ramsnap verify`: checks that images are complete and linked.

use std::path::PathBuf;

use clap::Args;
use memory_image::{ChainError, Damage, Image, OpenImageError, VerifyReport};
use serde::Serialize;

use crate::args::{Formats, FromDir, ImageFile, RawImages};
use crate::exit_status::ExitStatus;
use crate::failure::ImagesFailure;
use crate::input;
use crate::print::{self, JsonPath, count, size};
use crate::session::Session;
use crate::{library_errors, words};

/// Check that images are complete and, if there are several, that each follows the one before
///
/// Every page is read and compared with the checksums. A raw image has no checksums:
/// it cannot be checked, which is a failure.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  ramsnap verify full.mem\n  ramsnap verify full.mem d1.mem d2.mem --json\n  ramsnap verify --chain snapshots d2.mem"
)]
pub struct Verify {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// Only print a warning for raw images
    #[arg(long)]
    allow_raw: bool,
    /// As JSON: an object, sizes and offsets in bytes. A path that is not UTF-8 is an object: text,
    /// and bytes_hex
    #[arg(long)]
    json: bool,
}

impl Verify {
    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read.
    pub fn files(&self) -> Vec<PathBuf> {
        input::paths(&self.files)
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let checked = |files: &[ImageFile]| self.check(session, files);
        let good = |checked: &anyhow::Result<(Report, Vec<_>)>| matches!(checked, Ok((report, failures)) if report.good && failures.is_empty());
        let (report, mut failures) = self.from.attempt(0, &self.files, checked, good)??;
        let last = failures.pop();
        for other in failures {
            words::print_error(&other);
        }
        if self.json {
            print::json(&report)?;
        } else {
            print::line(&report.text())?;
        }
        match last {
            None => Ok(ExitStatus::of_check(report.good)),
            Some(error) => Err(error),
        }
    }

    /// Checks the files, and returns the report and the errors. A failure does not prevent the
    /// other files from being checked.
    fn check(
        &self,
        session: &Session,
        files: &[ImageFile],
    ) -> anyhow::Result<(Report, Vec<anyhow::Error>)> {
        let (mut checked, mut failures) = (Vec::new(), Vec::new());
        for file in files {
            let found = Checked::file(session, file, self.formats);
            checked.push(found.unwrap_or_else(|error| {
                let why = words::text(&error);
                failures.push(error);
                let file = file.path.clone().into();
                let state = State::Unreadable { why };
                Checked { file, state }
            }));
        }
        let links = match failures.is_empty() {
            true => self.links(session, files, &checked)?,
            false => None,
        };
        let good = checked.iter().all(|file| file.is_good(self.allow_raw));
        let report = Report {
            good: good && links.as_ref().is_none_or(Links::are_good),
            files: checked,
            links,
        };
        Ok((report, failures))
    }

    fn links(
        &self,
        session: &Session,
        files: &[ImageFile],
        checked: &[Checked],
    ) -> anyhow::Result<Option<Links>> {
        if checked.len() < 2 {
            return Ok(None);
        }
        if let Some(file) = checked.iter().find(|file| !file.has_links(self.allow_raw)) {
            let why = format!("{} cannot be linked", print::path(&file.file));
            return Ok(Some(Links::Unknown { why }));
        }
        let raw = RawImages {
            page_size: None,
            trust_holes: true,
        };
        match input::chain(session, files, self.formats, &raw) {
            Ok(chain) => {
                let names = |image: &Image| image.footer().is_some_and(|it| it.parent().is_some());
                let unnamed = chain.images().skip(1).filter(|image| !names(image));
                let unchecked: Vec<_> = unnamed.map(|it| it.path().to_owned().into()).collect();
                Ok(Some(match unchecked.is_empty() {
                    true => Links::Good,
                    false => Links::Unnamed { unchecked },
                }))
            }
            Err(error) if is_broken_link(&error) => {
                let why = words::text(&error);
                Ok(Some(Links::Broken { why }))
            }
            Err(error) => Err(error),
        }
    }
}

/// Returns whether the files are no chain, in any order: this is what is checked.
fn is_broken_link(error: &anyhow::Error) -> bool {
    library_errors::exit_status(error) == ExitStatus::CheckFailed
        || matches!(error.downcast_ref(), Some(ChainError::Link { .. }))
        || matches!(error.downcast_ref(), Some(ImagesFailure::OutOfOrder { .. }))
}

#[derive(Debug, Serialize)]
struct Report {
    good: bool,
    files: Vec<Checked>,
    /// Present if there are several files.
    links: Option<Links>,
}

#[derive(Debug, Serialize)]
struct Checked {
    file: JsonPath,
    #[serde(flatten)]
    state: State,
}

#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum State {
    Whole {
        bytes: u64,
        chunks: u64,
    },
    Damaged {
        chunks: u64,
        found: u64,
        damages: Vec<Place>,
    },
    /// The footer is not usable, so the pages are unknown.
    Unusable {
        why: String,
    },
    /// The file could not be opened or read.
    Unreadable {
        why: String,
    },
    Raw,
}

/// The location of damage.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Place {
    Chunk {
        chunk: u64,
        guest_start: u64,
        guest_end: u64,
        file_offset: u64,
        /// The error of the system, if the chunk cannot be read.
        #[serde(skip_serializing_if = "Option::is_none")]
        unreadable: Option<String>,
    },
    NotZero {
        not_zero_at: u64,
    },
    /// Bytes between pages.
    Unreadable {
        file_offset: u64,
        unreadable: String,
    },
}

#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Links {
    Good,
    /// No link is wrong, and some files do not name their parent: raw diffs, and diffs on raw
    /// images. They may be of another guest.
    Unnamed {
        unchecked: Vec<JsonPath>,
    },
    Broken {
        why: String,
    },
    Unknown {
        why: String,
    },
}

impl Links {
    fn are_good(&self) -> bool {
        matches!(self, Self::Good | Self::Unnamed { .. })
    }
}

impl Checked {
    fn file(session: &Session, file: &ImageFile, formats: Formats) -> anyhow::Result<Self> {
        let state = match file.open(formats.format) {
            Ok(image) if image.footer().is_none() => State::Raw,
            Ok(image) => State::of(input::sum(session, &image)?),
            Err(error) => match error.downcast_ref() {
                Some(OpenImageError::Footer { .. } | OpenImageError::NotRaw { .. })
                    if library_errors::exit_status(&error) == ExitStatus::CheckFailed =>
                {
                    let why = words::text(&error);
                    State::Unusable { why }
                }
                _ => return Err(error),
            },
        };
        let file = file.path.clone().into();
        Ok(Self { file, state })
    }

    fn is_good(&self, allow_raw: bool) -> bool {
        match self.state {
            State::Whole { .. } => true,
            State::Raw => allow_raw,
            State::Damaged { .. } | State::Unusable { .. } | State::Unreadable { .. } => false,
        }
    }

    /// Returns whether the file records which image it follows.
    fn has_links(&self, allow_raw: bool) -> bool {
        match self.state {
            State::Whole { .. } | State::Damaged { .. } => true,
            State::Raw => allow_raw,
            State::Unusable { .. } | State::Unreadable { .. } => false,
        }
    }

    fn text(&self) -> String {
        let file = print::path(&self.file);
        match &self.state {
            State::Whole { bytes, chunks } => {
                let (bytes, chunks) = (size(*bytes), count(*chunks, "chunk"));
                format!("{file}: whole, {bytes} in {chunks}")
            }
            State::Damaged { found, damages, .. } => {
                let mut text = format!("{file}: DAMAGED in {}", count(*found, "place"));
                for place in damages {
                    text += &format!("\n  {}", place.text());
                }
                let more = found - damages.len() as u64;
                if more > 0 {
                    text += &format!("\n  and {more} more");
                }
                text
            }
            State::Unusable { why } => format!("{file}: UNUSABLE: {why}"),
            State::Unreadable { why } => format!("{file}: NOT READ: {why}"),
            State::Raw => format!(
                "{file}: NOT CHECKED: it is raw and has no checksums; \
                 seal it with `ramsnap convert --layout sealed` while it is known to be right"
            ),
        }
    }
}

impl State {
    fn of(found: VerifyReport) -> Self {
        let (bytes, chunks) = (found.bytes, found.chunks);
        if found.is_ok() {
            return Self::Whole { bytes, chunks };
        }
        Self::Damaged {
            chunks,
            found: found.damage_count,
            damages: found.damage.iter().map(Place::of).collect(),
        }
    }
}

impl Place {
    fn of(damage: &Damage) -> Self {
        match damage {
            Damage::Chunk {
                number,
                guest,
                offset,
            } => Self::Chunk {
                chunk: *number,
                guest_start: guest.start,
                guest_end: guest.end,
                file_offset: *offset,
                unreadable: None,
            },
            Damage::Unreadable {
                chunk: Some((number, guest)),
                offset,
                reason,
            } => Self::Chunk {
                chunk: *number,
                guest_start: guest.start,
                guest_end: guest.end,
                file_offset: *offset,
                unreadable: Some(reason.clone()),
            },
            Damage::Unreadable {
                chunk: None,
                offset,
                reason,
            } => Self::Unreadable {
                file_offset: *offset,
                unreadable: reason.clone(),
            },
            other => Self::NotZero {
                not_zero_at: other.offset(),
            },
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Chunk {
                chunk,
                guest_start,
                guest_end,
                file_offset,
                unreadable,
            } => {
                let why = unreadable.as_ref().map(|why| format!(": NOT READ: {why}"));
                format!(
                    "chunk {chunk}: RAM {guest_start:#x}..{guest_end:#x}, from {file_offset:#x} on in the file{}",
                    why.unwrap_or_default()
                )
            }
            Self::Unreadable {
                file_offset,
                unreadable,
            } => format!("from {file_offset:#x} on in the file: NOT READ: {unreadable}"),
            Self::NotZero { not_zero_at } => {
                format!("{not_zero_at:#x} in the file: not zero, and nothing was written there")
            }
        }
    }
}

impl Report {
    fn text(&self) -> String {
        let mut lines: Vec<_> = self.files.iter().map(Checked::text).collect();
        match &self.links {
            None => {}
            Some(Links::Good) => lines.push("each follows the one before".to_owned()),
            Some(Links::Unnamed { unchecked }) => lines.extend(unchecked.iter().map(|file| {
                format!(
                    "{}: link NOT CHECKED: it names no parent, and may be the diff of another guest",
                    print::path(file)
                )
            })),
            Some(Links::Broken { why }) => lines.push(format!("NOT LINKED: {why}")),
            Some(Links::Unknown { why }) => lines.push(format!("links NOT CHECKED: {why}")),
        }
        lines.join("\n")
    }
}
