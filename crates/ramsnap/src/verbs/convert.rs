//! `ramsnap convert`: an image in another layout, as a stream, or from and to files of other VMMs.

mod input_format;
mod vmm;

mod sending;

use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::AtomicWriter;
use clap::Args;
use image_format::{Footer, Header, Version};
use memory_image::{Chain, Image, Layout};
use memory_writer::{ImageId, MemoryWriter, MemoryWriterOptions, Seal, SnapshotError};
use sparse_file::PageHoles;

use crate::args::{
    self, Extras, Format, Formats, ImageFile, Output, RawImages, ReadExtras, VmmFiles, image_id,
    kept_seal, layouts,
};
use crate::chain_lock::{ChainLock, Sharing};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::session::Session;
use crate::stream::{self, Incoming, is_compressed, is_stream};
use crate::verbs::merge::layout_of_first;
use crate::{free_space, input, memory_reserve, print, save};

/// Write an image in another layout, as a stream, or from and to files of other VMMs
///
/// The result has the same pages, id, parent, regions and metadata. A raw image has none of these,
/// and gets a new id. Stored pages of zeros take no space in the result, except in a raw diff and
/// in a packed image that is sent or received unchanged; a diff records them as zeros, which are
/// not clean pages.
///
/// With --zstd, `-` stands for stdin or stdout, and carries the compressed bytes of a packed image.
/// A file whose name ends in .zst has the same bytes. Input is checked before the output appears,
/// and takes no more space than the header of the image states.
///
/// Files of other VMMs are named by their format (elf:FILE), and become full images with the
/// addresses of the RAM, without the state of devices. --to writes such files.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap convert full.mem -o full.raw --layout raw\n  \
    ramsnap convert elf:guest.elf -o full.mem\n  \
    ramsnap convert raw:fc.mem --guest firecracker -o guest.elf --to elf\n  \
    ramsnap convert raw:old.raw -o old.mem --layout sealed\n  \
    ramsnap convert raw:base.raw -o base.mem --layout sealed --id 88213de4bd9147c6bc3d68ecae6fdb8a\n  \
    ramsnap convert full.mem -o - --zstd | ssh host ramsnap convert - --zstd -o full.mem\n  \
    ramsnap convert full.mem -o full.mem.zst\n  \
    ramsnap convert d1.raw --raw-diff --parent old.mem -o d1.mem --layout packed")]
pub struct Convert {
    /// The image; `-` for a stream on stdin
    #[arg(value_name = "FILE", value_parser = ImageFile::parser())]
    input: ImageFile,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    output: Output,
    /// The layout of the result; by default that of the image
    #[arg(long, value_parser = layouts())]
    layout: Option<Layout>,
    /// `-` is a compressed stream
    #[arg(long)]
    zstd: bool,
    /// The page size of the result; by default that of the image
    #[arg(long, value_name = "SIZE", value_parser = crate::numbers::page_size)]
    page_size: Option<u64>,
    /// The image is a raw diff
    #[arg(long, conflicts_with = "format")]
    raw_diff: bool,
    /// The sealed or packed image that the raw diff was taken after
    #[arg(long, value_name = "FILE", requires = "raw_diff", value_parser = ImageFile::parser())]
    parent: Option<ImageFile>,
    /// The id of the state that the raw image represents; by default a new one
    ///
    /// Use it to seal a raw copy of an image that diffs name as their parent.
    #[arg(long, value_name = "ID", value_parser = image_id)]
    id: Option<ImageId>,
    /// Treat the holes of the raw diff as clean pages, even if the file system reports holes
    /// unreliably
    #[arg(long, requires = "raw_diff")]
    trust_holes: bool,
    /// Do not compare the image with its checksums first
    #[arg(long)]
    no_verify: bool,
    /// Store the pages of zeros that the image stores
    #[arg(long)]
    keep_zeros: bool,
    #[command(flatten)]
    extras: Extras,
    #[command(flatten)]
    vmm: VmmFiles,
}

impl Convert {
    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let output = Some(&self.output.path).filter(|path| !is_stream(path));
        self.inputs().into_iter().chain(output.cloned()).collect()
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        self.check()?;
        let extras = self.extras.read()?;
        if is_compressed(&self.input.path) {
            return self.receive(session, extras);
        }
        if let Some(format) = self.vmm_format()? {
            return self.convert_guest(session, format, extras);
        }
        let mut image = self.open_input()?;
        let is_diff = image.is_diff() || self.raw_diff;
        let _lock = is_diff.then(|| self.lock(session)).transpose()?;
        if is_diff {
            image = self.open_input()?;
        }
        let chain = self.open(session, image)?;
        if let Some(to) = self.vmm.to {
            return self.export_chain(session, to, &chain);
        }
        let check = || match self.no_verify {
            true => Ok(()),
            false => input::check_sums(session, chain.images()),
        };
        if !is_compressed(&self.output.path) {
            return self.convert(session, &chain, extras, None, check);
        }
        let is_current = |footer: &Footer| footer.version == Version::CURRENT;
        let packed = layout_of_first(&chain) == Layout::Packed;
        let as_it_is = packed && chain.images().filter_map(Image::footer).all(is_current);
        if as_it_is && self.keeps_pages() {
            let image = chain.images().next().context("there is no image")?;
            let staged = self.stage_compressed(session, &needs_of(image))?;
            check()?;
            // Not opened by its path, which may lead to another file now.
            let file = image.version()?.file().try_clone();
            let file = file.with_context(|| format!("cannot send {:?}", self.input.path))?;
            self.send(session, file, staged)?;
            // The receiver finds the damage by the checksums; the sender fails too.
            chain.check_unchanged()?;
            return Ok(ExitStatus::Success);
        }
        self.pack_and_send(session, &chain, extras, check)
    }

    /// Locks the directories of the files: a diff that is written builds on an image that another
    /// run must not replace meanwhile.
    fn lock(&self, session: &Session) -> anyhow::Result<ChainLock> {
        let files = [Some(&self.input), self.parent.as_ref()];
        let files = files.into_iter().flatten().map(|file| &file.path);
        let files = files.chain([&self.output.path]).cloned();
        let files: Vec<_> = files.filter(|path| !is_stream(path)).collect();
        ChainLock::take(session, &files, Sharing::Shared)
    }

    /// Returns whether the result is sent to stdout.
    pub fn sends(&self) -> bool {
        is_stream(&self.output.path)
    }

    /// Makes all checks that do not need the stream before its first byte is read, and all checks
    /// that need only its first page before the rest is read.
    fn receive(&self, session: &Session, extras: ReadExtras) -> anyhow::Result<ExitStatus> {
        let staged = match is_compressed(&self.output.path) {
            true => None,
            false => Some(save::stage_early(session, &self.output)?),
        };
        let dir = match &staged {
            Some(staged) => save::dir_of(staged.staged_path()).to_owned(),
            None => std::env::temp_dir(),
        };
        let as_it_is = self.keeps_pages() && self.layout.is_none_or(|it| it == Layout::Packed);
        let file = match &staged {
            Some(staged) if as_it_is => staged.file().try_clone()?,
            _ => stream::spool(&dir)?,
        };
        stream::check_path_of(&file)?;
        let incoming = Incoming::begin(session, &self.input.path)?;
        self.check_header(incoming.header(), staged.as_ref(), as_it_is, &dir)?;
        let is_diff = incoming.header().is_diff();
        let _lock = is_diff.then(|| self.lock(session)).transpose()?;
        incoming.write_to(&file, &dir)?;

        let path = print::path(&self.input.path);
        let from_stdin = || format!("the image in the stream {path} is not usable");
        let image = Image::open_as(stream::path_of(&file), Layout::Packed);
        let image = image.with_context(from_stdin)?;
        let found = input::sum(session, &image)
            .with_context(from_stdin)?
            .damage_count;
        if found > 0 {
            return Err(Failure::StreamDamaged { found }.into());
        }
        match staged {
            Some(staged) if as_it_is => {
                needs_of(&image).check_replaced(&staged)?;
                drop((image, file));
                save::commit_staged(session, staged)?;
                Ok(ExitStatus::Success)
            }
            None if as_it_is => {
                let staged = self.stage_compressed(session, &needs_of(&image))?;
                self.send(session, file, staged)?;
                Ok(ExitStatus::Success)
            }
            Some(_) => {
                let chain = self.open(session, image)?;
                self.convert(session, &chain, extras, staged, || Ok(()))
            }
            None => {
                let chain = self.open(session, image)?;
                self.pack_and_send(session, &chain, extras, || Ok(()))
            }
        }
    }

    /// Refuses an image that cannot be converted as requested, by its first page.
    fn check_header(
        &self,
        header: Header,
        staged: Option<&AtomicWriter>,
        as_it_is: bool,
        dir: &Path,
    ) -> anyhow::Result<()> {
        let page_size = header.most_page_size();
        if header.is_diff() && self.page_size.is_some_and(|asked| asked > page_size) {
            return Err(Failure::DiffInLargerPages { page_size }.into());
        }
        if let (true, Some(Layout::Raw), Some(staged)) = (header.is_diff(), self.layout, staged) {
            let page_size = self.page_size.unwrap_or(page_size);
            PageHoles::check_new(staged.file(), page_size).map_err(|why| {
                SnapshotError::AmbiguousDiff {
                    dest: staged.dest_path().to_owned(),
                    source: why.into(),
                }
            })?;
        }
        // Where it is written a second time, its pages are.
        let again = if as_it_is { 0 } else { header.present_bytes() };
        let needed = header.len().saturating_add(again);
        free_space::check_bytes(&self.output.path, dir, needed)?;
        Ok(())
    }

    fn check(&self) -> anyhow::Result<()> {
        self.check_ram_blocks()?;
        let paths = [&self.input.path, &self.output.path];
        let streams = paths.map(|path| is_compressed(path));
        if paths.iter().any(|path| is_stream(path)) && !self.zstd {
            return Err(Failure::StreamNotCompressed.into());
        }
        if self.zstd && !streams.contains(&true) {
            return Err(Failure::NoStream.into());
        }
        let format = self.input.format(self.formats.format);
        let packed = [Format::Auto, Format::Layout(Layout::Packed)];
        let is_packed = packed.contains(&format) && !self.raw_diff;
        if streams[0] {
            if is_stream(&self.input.path) {
                stream::check_stdin()?;
            }
            if !is_packed {
                return Err(Failure::StreamFormat.into());
            }
        }
        if streams[1] {
            if self.layout.is_some_and(|layout| layout != Layout::Packed) {
                return Err(Failure::StreamLayout.into());
            }
            if !is_stream(&self.output.path) {
                return save::check_output(&self.output, &self.inputs());
            }
            memory_reserve::check_new(&self.output.path)?;
            return Ok(stream::check_stdout()?);
        }
        if let Some(layout) = self.layout {
            self.check_records(layout)?;
        }
        if is_stream(&self.input.path) {
            stream::check_is_not_stdin(&self.output.path)?;
        }
        save::check_output(&self.output, &self.inputs())
    }

    /// Refuses a layout that does not record what the command line adds.
    fn check_records(&self, layout: Layout) -> Result<(), Failure> {
        let more = !self.extras.is_empty() || self.parent.is_some() || self.id.is_some();
        args::check_records(layout, more, &self.output.path)
    }

    /// Returns all files that are read.
    fn inputs(&self) -> Vec<PathBuf> {
        let image = Some(&self.input).filter(|input| !is_stream(&input.path));
        let images = image.into_iter().chain(&self.parent);
        self.extras.and_inputs(images.map(|file| file.path.clone()))
    }

    /// Opens the image as a chain of one, with a page size that divides that of the image and that
    /// of the result.
    fn open(&self, session: &Session, image: Image) -> anyhow::Result<Chain> {
        let page_size = match (image.footer(), self.page_size) {
            (Some(footer), Some(asked)) if image.is_diff() && asked > footer.page_size => {
                let page_size = footer.page_size;
                return Err(match page_size < image_format::RAW_UNIT {
                    true => Failure::OldPages { page_size },
                    false => Failure::DiffInLargerPages { page_size },
                }
                .into());
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

    /// Writes the image to the output, or to what is `staged` for it, and checks it once there is a
    /// place for the result.
    fn convert(
        &self,
        session: &Session,
        chain: &Chain,
        extras: ReadExtras,
        staged: Option<AtomicWriter>,
        check: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitStatus> {
        let (size, page_size) = (chain.ram_size(), self.page_size_of(chain)?);
        let layout = self.layout.unwrap_or_else(|| layout_of_first(chain));
        self.check_records(layout)?;
        let options = self.options(session, chain, layout, extras)?;
        let mut writer = match staged {
            Some(staged) => {
                memory_reserve::check_image(&self.output.path, size, page_size)?;
                options.open_on(staged, size, page_size)?
            }
            None => save::stage(session, &self.output, options, size, page_size)?,
        };
        save::check_room_for(session, &writer, chain)?;
        check()?;
        save::write_chain(&mut writer, chain)?;
        save::commit_as(session, writer, !chain.is_full())?;
        Ok(ExitStatus::Success)
    }

    fn page_size_of(&self, chain: &Chain) -> Result<u64, Failure> {
        let page_size = save::page_size(chain)?;
        Ok(self.page_size.unwrap_or(page_size))
    }

    fn options(
        &self,
        session: &Session,
        chain: &Chain,
        layout: Layout,
        extras: ReadExtras,
    ) -> anyhow::Result<MemoryWriterOptions> {
        let mut seal = chain.seal();
        if let Some(id) = self.id {
            if chain.id().is_some() {
                let path = self.input.path.clone();
                return Err(Failure::HasId { path }.into());
            }
            seal = seal.id(id);
        }
        if let Some(file) = &self.parent {
            let parent = file.open(Format::Auto)?;
            let (old, new) = (parent.ram_size(), chain.ram_size());
            if old != new {
                return Err(Failure::OtherGuest { old, new }.into());
            }
            let Some(id) = parent.id() else {
                let path = file.path.clone();
                return Err(Failure::ParentIsRaw { path }.into());
            };
            // The regions of the guest, which a raw diff does not record.
            let regions = parent.footer().map(|footer| &footer.regions[..]);
            self.extras.check_regions(regions)?;
            seal = seal
                .parent(id)
                .ancestors(parent.footer().and_then(Footer::parent))
                .regions(regions.unwrap_or_default().iter().cloned());
        }
        self.extras.check_regions(input::regions(chain))?;
        let seal = extras.add_to(seal, chain.ram_size())?;
        Ok(session
            .options("converting")
            .layout(layout)
            .seal(kept_seal(layout, seal))
            .skip_untouched(true)
            .skip_zeros(!self.keep_zeros)
            .ram_start(0))
    }

    /// Whether the result has the pages and all else of a packed image, so that its bytes are the
    /// image's.
    fn keeps_pages(&self) -> bool {
        self.page_size.is_none() && self.extras.is_empty() && self.id.is_none()
    }
}

/// Returns the options of a writer of the same image. It is written without one.
fn needs_of(image: &Image) -> MemoryWriterOptions {
    let parent = image.footer().and_then(Footer::parent);
    MemoryWriter::options().seal(parent.map_or_else(Seal::new, |it| Seal::new().parent(it)))
}
