//! Staging and committing an image.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::{AtomicWriter, Symlinks, check_destination};
use memory_image::{Chain, Image, Layout, MergeError};
use memory_writer::{
    MemoryWriter, MemoryWriterOptions, NotPreserved, OpenError, Preserve, SnapshotError,
};

use crate::args::Output;
use crate::failure::Failure;
use crate::image_info::ImageInfo;
use crate::session::Session;
use crate::stream::is_stream;
use crate::zeros::without_zeros;
use crate::{free_space, input, memory_reserve, print};

/// Refuses an output that exists, or is an input by any name, or that cannot be replaced, or that
/// there is too little memory to write, before anything is read.
///
/// `inputs` are all files that the verb reads, including metadata and parents.
pub fn check_output(output: &Output, inputs: &[PathBuf]) -> anyhow::Result<()> {
    check_is_no_stream(&output.path)?;
    memory_reserve::check_new(&output.path)?;
    check_is_no_input(&output.path, inputs)?;
    let path = output.path.clone();
    if !output.force && path.symlink_metadata().is_ok() {
        return Err(Failure::OutputExists { path }.into());
    }
    let checked = check_destination(&path, Symlinks::default());
    Ok(checked.map_err(SnapshotError::Open)?)
}

/// Refuses `-`, which stands for stdout in other verbs.
pub fn check_is_no_stream(path: &Path) -> Result<(), Failure> {
    match is_stream(path) {
        true => Err(Failure::OutputIsStream),
        false => Ok(()),
    }
}

/// Refuses an output that is an input, also through links.
pub fn check_is_no_input(path: &Path, inputs: &[PathBuf]) -> Result<(), Failure> {
    match input::is_one_of(path, inputs) {
        true => Err(Failure::OutputIsInput {
            path: path.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Stages an image of `ram_size` bytes of RAM at the output. The owner, group, mode, access control
/// list and extended attributes of a replaced file are kept as far as permitted.
pub fn stage(
    session: &Session,
    output: &Output,
    options: MemoryWriterOptions,
    ram_size: u64,
    page_size: u64,
) -> anyhow::Result<MemoryWriter> {
    let staged = stage_for(session, output, &options, ram_size, page_size)?;
    Ok(for_output(options, output).open_on(staged, ram_size, page_size)?)
}

/// Stages a file at the output for an image of `ram_size` bytes of RAM, as [`stage`] does.
pub fn stage_for(
    session: &Session,
    output: &Output,
    options: &MemoryWriterOptions,
    ram_size: u64,
    page_size: u64,
) -> anyhow::Result<AtomicWriter> {
    memory_reserve::check_image(&output.path, ram_size, page_size)?;
    stage_with(session, output, &for_output(options.clone(), output))
}

/// Stages a file at the output, for an image whose RAM size is not known yet. Errors of the commit
/// that can be foreseen are returned here, except that a diff would replace an image which it
/// needs: [`MemoryWriterOptions::open_on`] and [`MemoryWriterOptions::check_replaced`] find that.
pub fn stage_early(session: &Session, output: &Output) -> anyhow::Result<AtomicWriter> {
    let options = for_output(MemoryWriter::options(), output);
    stage_with(session, output, &options)
}

/// Adds the options that decide which file is replaced, and which of its attributes are kept.
fn for_output(options: MemoryWriterOptions, output: &Output) -> MemoryWriterOptions {
    options.no_clobber(!output.force).preserve(preserve())
}

fn stage_with(
    session: &Session,
    output: &Output,
    options: &MemoryWriterOptions,
) -> anyhow::Result<AtomicWriter> {
    if free_space::is_on_hugetlbfs(dir_of(&output.path)) {
        let path = output.path.clone();
        return Err(Failure::NoWritesThere { path }.into());
    }
    session.hold();
    match options.stage(&output.path) {
        Ok(staged) => {
            warn_of_lost(session, &output.path, staged.not_preserved());
            Ok(staged)
        }
        Err(SnapshotError::Open(OpenError::AlreadyExists { path })) => {
            Err(Failure::OutputExists { path }.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns the attributes of a replaced file that are kept.
pub fn preserve() -> Preserve {
    Preserve::all().if_permitted(true)
}

/// Warns of the attributes of a replaced file that could not be kept.
pub fn warn_of_lost(session: &Session, path: &Path, lost: &[NotPreserved]) {
    for lost in lost {
        session.warn(&format!("{path:?}: {lost}"));
    }
}

/// Refuses an image that the file system of the output cannot hold, before the images are read.
fn check_room(writer: &MemoryWriter, chain: &Chain) -> Result<(), Failure> {
    let raw_diff = writer.image_id().is_none() && !chain.is_full();
    let dir = dir_of(writer.staged_path());
    free_space::check_new(writer.dest_path(), dir, chain, raw_diff)
}

/// Makes the same check for a file that has no space for zeros if the writer skips them.
pub fn check_room_for(
    session: &Session,
    writer: &MemoryWriter,
    chain: &Chain,
) -> anyhow::Result<()> {
    let raw_diff = writer.image_id().is_none() && !chain.is_full();
    match writer.skips_zeros() && !raw_diff {
        true => check_room_but_zeros(session, writer, chain),
        false => Ok(check_room(writer, chain)?),
    }
}

/// Makes the same check for a file that is sparse where the RAM is zero. If the stored pages do not
/// all fit, the images are read to find the pages that are zeros.
pub fn check_room_but_zeros(
    session: &Session,
    writer: &MemoryWriter,
    chain: &Chain,
) -> anyhow::Result<()> {
    if check_room(writer, chain).is_ok() {
        return Ok(());
    }
    let stored: Vec<_> = chain.stored_runs().collect();
    let needed = without_zeros(session, chain, &stored)?;
    let dir = dir_of(writer.staged_path());
    Ok(free_space::check_runs(writer.dest_path(), dir, needed)?)
}

/// Returns the page size of an image made of `chain`. The pages of `chain` may be smaller than
/// those of any image that is written today.
pub fn page_size(chain: &Chain) -> Result<u64, Failure> {
    let page_size = chain.writable_page_size();
    let of_diffs = !chain.is_full() && page_size > chain.page_size();
    if of_diffs || !chain.ram_size().is_multiple_of(page_size) {
        let page_size = chain.page_size();
        return Err(Failure::OldPages { page_size });
    }
    Ok(page_size)
}

/// Returns the directory of `path`.
pub fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Writes all pages of `chain`, and checks that its images did not change in the meantime.
pub fn write_chain(writer: &mut MemoryWriter, chain: &Chain) -> anyhow::Result<()> {
    match chain.write_to(writer) {
        Ok(_) => Ok(chain.check_unchanged()?),
        Err(MergeError::Write(why)) => Err(why.into()),
        Err(other) => Err(other.into()),
    }
}

/// Commits the image unless a signal came before, and reports what it is.
pub fn commit(session: &Session, writer: MemoryWriter) -> anyhow::Result<()> {
    commit_as(session, writer, false)
}

/// Commits the image as [`commit`] does. A raw image does not record whether it is a diff, so
/// `is_diff` is what the report calls it.
pub fn commit_as(session: &Session, writer: MemoryWriter, is_diff: bool) -> anyhow::Result<()> {
    session.check("nothing was written")?;
    let content = Content::of(writer.image_id().is_some(), is_diff);
    put_image_in_place(session, writer.finish()?, content)
}

/// Commits a sealed or packed image that was not written by a [`MemoryWriter`], unless a signal
/// came before, and reports what it is.
pub fn commit_staged(session: &Session, staged: AtomicWriter) -> anyhow::Result<()> {
    put_image_in_place(session, staged, Content::Footer)
}

/// Where the content of a staged image is described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Its footer.
    Footer,
    /// The caller: the image is raw.
    RawFull,
    RawDiff,
}

impl Content {
    pub fn of(has_footer: bool, is_diff: bool) -> Self {
        match (has_footer, is_diff) {
            (true, _) => Self::Footer,
            (false, false) => Self::RawFull,
            (false, true) => Self::RawDiff,
        }
    }
}

/// Commits an image as [`put_in_place`] does, and reports what it is.
///
/// The report describes the file that was written. Another one may be at its path by then, or none.
pub fn put_image_in_place(
    session: &Session,
    staged: AtomicWriter,
    content: Content,
) -> anyhow::Result<()> {
    let path = staged.dest_path().to_owned();
    let written = staged.file().try_clone();
    let written = written.with_context(|| format!("cannot open {path:?} again to describe it"))?;
    put_in_place(session, staged, || {
        let described = describe(&path, written, content);
        let text =
            described.with_context(|| format!("{path:?} is in place, but cannot be described"))?;
        Ok(session.report(&text)?)
    })
}

/// Commits a complete staged file unless a signal came before, and calls `report`.
pub fn put_in_place(
    session: &Session,
    staged: AtomicWriter,
    report: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let path = staged.dest_path().to_owned();
    // The sync may take long. The commit, which signals do not end, syncs only the rest.
    let synced = staged.file().sync_all();
    synced.with_context(|| format!("cannot bring {path:?} to its disk; nothing was replaced"))?;
    session.check("nothing was written")?;
    let critical = session.commit(&path);
    staged.commit().map_err(SnapshotError::from)?;
    critical.done();
    report()
}

fn describe(path: &Path, written: File, content: Content) -> anyhow::Result<String> {
    let options = Image::options().name(path);
    let options = match content {
        Content::Footer => options,
        Content::RawFull | Content::RawDiff => options.layout(Layout::Raw),
    };
    let info = ImageInfo::of(&options.open_file(written)?)?;
    let info = match content {
        Content::RawDiff => info.of_raw_diff(),
        Content::Footer | Content::RawFull => info,
    };
    Ok(format!("{}: {}", print::path(path), info.summary()))
}
