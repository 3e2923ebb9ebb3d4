//! `memsnap convert`: the same image in another layout, or on its way to elsewhere.

use std::fs::File;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::{Chain, Image};
use memory_writer::{MemoryWriter, Options};

use crate::Verdict;
use crate::args::{Extras, Format, Formats, ImageFile, Layout, Output, RawImages};
use crate::failure::Failure;
use crate::session::Session;
use crate::stream::{self, Received, is_stream};
use crate::verbs::merge::layout_of_first;
use crate::{input, save};

/// Write an image in another layout, or as a stream
///
/// The result has the same pages, id, parent, regions and metadata. A raw image has none of these, and gets a new id.
///
/// With --zstd, `-` stands for stdin or stdout: the bytes of a packed image, compressed. What comes in is checked before the output
/// appears.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    memsnap convert full.mem -o full.raw --layout raw\n  \
    memsnap convert raw:old.raw -o old.mem --layout sealed\n  \
    memsnap convert full.mem -o - --zstd | ssh host memsnap convert - --zstd -o full.mem\n  \
    memsnap convert d1.raw --raw-diff --parent old.mem -o d1.mem --layout packed")]
pub struct Convert {
    /// The image; `-` for a stream on stdin
    #[arg(value_name = "FILE", value_parser = ImageFile::parser())]
    input: ImageFile,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    output: Output,
    /// How the pages stand in the result; as in the image unless told
    #[arg(long)]
    layout: Option<Layout>,
    /// `-` is a compressed stream
    #[arg(long)]
    zstd: bool,
    /// The page of the result; the image's unless told
    #[arg(long, value_name = "SIZE", value_parser = crate::args::page_size)]
    page_size: Option<u64>,
    /// The image is raw, and a diff
    #[arg(long, conflicts_with = "format")]
    raw_diff: bool,
    /// The sealed or packed image that the raw diff was taken after
    #[arg(long, value_name = "FILE", requires = "raw_diff", value_parser = ImageFile::parser())]
    parent: Option<ImageFile>,
    /// Take the holes of the raw diff for clean pages, also where the file system can't be believed
    #[arg(long)]
    trust_holes: bool,
    /// Don't compare the image with its checksums first
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    extras: Extras,
}

impl Convert {
    pub fn run(&self, session: &Session) -> anyhow::Result<Verdict> {
        self.check()?;
        if !is_stream(&self.input.path) {
            let chain = self.open(session, self.open_input()?)?;
            return self.convert(session, &chain, !self.no_verify);
        }
        let received = Received::from_stdin(session, &self.dir())?;
        let from_stdin = || "the image that came by stdin is not usable";
        let image = Image::open(received.path()).with_context(from_stdin)?;
        let found = input::sum(session, &image).with_context(from_stdin)?.found;
        if found > 0 {
            return Err(Failure::StreamDamaged { found }.into());
        }
        self.convert(session, &self.open(session, image)?, false)
    }

    fn open_input(&self) -> anyhow::Result<Image> {
        if !self.raw_diff {
            return Ok(self.input.open(self.formats.format)?);
        }
        // Nothing that a guest can write makes this an image.
        if Image::open(&self.input.path).is_ok() {
            let path = self.input.path.clone();
            return Err(Failure::NotARawDiff { path }.into());
        }
        Ok(self.input.open(Format::Raw)?)
    }

    fn check(&self) -> Result<(), Failure> {
        let streams = [&self.input.path, &self.output.path].map(|path| is_stream(path));
        match (streams.contains(&true), self.zstd) {
            (true, false) => return Err(Failure::StreamNotCompressed),
            (false, true) => return Err(Failure::NoStream),
            _ => {}
        }
        if streams[1] {
            if self.layout.is_some_and(|layout| layout != Layout::Packed) {
                return Err(Failure::StreamLayout);
            }
            stream::check_stdout()?;
            return stream::check_is_not_stdout(&self.inputs());
        }
        if self.layout == Some(Layout::Raw) && !(self.extras.is_empty() && self.parent.is_none()) {
            let path = self.output.path.clone();
            return Err(Failure::RawHasNoSeal { path });
        }
        if streams[0] {
            stream::check_is_not_stdin(&self.output.path)?;
        }
        save::check_output(&self.output, &self.inputs())
    }

    /// All files that are read.
    fn inputs(&self) -> Vec<PathBuf> {
        let image = Some(&self.input).filter(|input| !is_stream(&input.path));
        let images = image.into_iter().chain(&self.parent);
        self.extras.and_inputs(images.map(|file| file.path.clone()))
    }

    /// Where there is room for the image while it is checked or packed.
    fn dir(&self) -> PathBuf {
        if is_stream(&self.output.path) {
            return std::env::temp_dir();
        }
        save::dir_of(&self.output.path).to_owned()
    }

    /// The image alone, in pages that both it and the result have whole.
    fn open(&self, session: &Session, image: Image) -> anyhow::Result<Chain> {
        let page_size = match (image.footer(), self.page_size) {
            (Some(footer), Some(asked)) if image.is_diff() && asked > footer.page_size => {
                let page_size = footer.page_size;
                return Err(Failure::DiffInLargerPages { page_size }.into());
            }
            (Some(footer), Some(asked)) => Some(asked.min(footer.page_size)),
            (_, asked) => asked,
        };
        let raw = RawImages {
            page_size,
            trust_holes: self.trust_holes,
        };
        input::put_together(session, vec![image], &raw, self.raw_diff)
    }

    /// Checks the sums, if asked to, once there is a place for the result.
    fn convert(&self, session: &Session, chain: &Chain, check: bool) -> anyhow::Result<Verdict> {
        let page_size = self.page_size.unwrap_or(chain.page_size());
        let layout = self.layout.unwrap_or_else(|| layout_of_first(chain));
        let check = || match check {
            true => input::check_sums(session, chain.images()),
            false => Ok(()),
        };
        if is_stream(&self.output.path) {
            let packed = if self.is_as_wanted(chain) {
                check()?;
                File::open(&self.input.path)?
            } else {
                self.packed(session, chain, page_size, check)?
            };
            stream::to_stdout(session, packed)?;
            return Ok(Verdict::Good);
        }
        let options = self.options(session, chain, layout)?;
        let mut writer = save::stage(session, &self.output, options, chain.size(), page_size)?;
        save::check_room(&writer, chain)?;
        check()?;
        save::write_chain(&mut writer, chain)?;
        save::commit(session, writer)?;
        Ok(Verdict::Good)
    }

    fn options(&self, session: &Session, chain: &Chain, layout: Layout) -> anyhow::Result<Options> {
        let mut seal = self.extras.add_to(chain.seal(), chain.size())?;
        if let Some(file) = &self.parent {
            let parent = file.open(Format::Auto)?;
            let (old, new) = (parent.ram_size(), chain.size());
            if old != new {
                return Err(Failure::OtherGuest { old, new }.into());
            }
            let Some(id) = parent.id() else {
                let path = file.path.clone();
                return Err(Failure::ParentIsRaw { path }.into());
            };
            seal = seal.parent(id);
        }
        Ok(session
            .options("converting")
            .layout(layout.with(seal))
            .skip_untouched(true)
            .ram_start(0))
    }

    /// Whether the image's file is what is to be sent.
    fn is_as_wanted(&self, chain: &Chain) -> bool {
        let same_pages = self.page_size.is_none() && self.extras.is_empty();
        same_pages && !is_stream(&self.input.path) && layout_of_first(chain) == Layout::Packed
    }

    /// The image, packed, in a file without a name.
    fn packed(
        &self,
        session: &Session,
        chain: &Chain,
        page_size: u64,
        check: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<File> {
        let options = self.options(session, chain, Layout::Packed)?;
        // A fixed name could be taken by another user.
        let dir = tempfile::Builder::new()
            .prefix("memsnap-stream-")
            .tempdir_in(self.dir())?;
        let dest = dir.path().join("image");
        let mut writer: MemoryWriter = options.open(dest, chain.size(), page_size)?;
        save::check_room(&writer, chain)?;
        check()?;
        save::write_chain(&mut writer, chain)?;
        let stage = writer.finish()?;
        let file = stage.file().try_clone()?;
        stage.discard()?;
        dir.close()?;
        session.release()?;
        Ok(file)
    }
}
