//! `ramsnap metadata`: the data that an image records beside its pages.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use atomic_file::AtomicWriter;
use clap::Args;
use memory_image::Image;

use crate::args::{Formats, FromDir, ImageFile};
use crate::exit_status::ExitStatus;
use crate::failure::{Failure, ImagesFailure};
use crate::print::{self, size};
use crate::session::Session;
use crate::{input, memory_reserve, save, stream};

/// Extract the metadata of an image, such as the state of the vCPUs
///
/// The bytes are those that `--metadata` stored, or the writer of the image. They describe the
/// state that the image represents, so give the newest image of a chain. Without --output they are
/// printed to stdout, which must be a file or a pipe.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap metadata d2.mem -o vcpus.bin\n  \
    ramsnap metadata --chain snapshots d2.mem -o vcpus.bin\n  \
    ramsnap metadata d2.mem | xxd | head")]
pub struct Metadata {
    /// The image
    #[arg(value_name = "FILE", value_parser = ImageFile::parser())]
    file: ImageFile,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// The file to write; it appears when it is complete
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the output if it exists
    #[arg(long, requires = "output")]
    force: bool,
}

impl Metadata {
    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let output = self.output.iter().cloned();
        [self.file.path.clone()].into_iter().chain(output).collect()
    }

    /// Finds the image in the directory.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find_newest(&mut self.file)
    }

    /// Returns whether the bytes are printed, rather than written to a file.
    pub fn prints_bytes(&self) -> bool {
        self.output.is_none()
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        match &self.output {
            None => stream::check_stdout()?,
            Some(path) => {
                save::check_is_no_stream(path)?;
                memory_reserve::check_new(path)?;
                save::check_is_no_input(path, &input::paths(std::slice::from_ref(&self.file)))?;
                if !self.force && path.symlink_metadata().is_ok() {
                    let path = path.clone();
                    return Err(Failure::OutputExists { path }.into());
                }
            }
        }
        let image = self.file.open(self.formats.format)?;
        let bytes = bytes_of(&image)?;
        match &self.output {
            None => {
                let mut out = print::stdout().context("cannot write to stdout")?;
                out.write_all(bytes).context("cannot write to stdout")?;
            }
            Some(path) => self.write(session, path.clone(), bytes)?,
        }
        Ok(ExitStatus::Success)
    }

    fn write(&self, session: &Session, path: PathBuf, bytes: &[u8]) -> anyhow::Result<()> {
        let options = AtomicWriter::options()
            .preserve(save::preserve())
            .no_clobber(!self.force);
        session.hold();
        let mut writer = options.open(&path)?;
        save::warn_of_lost(session, &path, writer.not_preserved());
        let written = writer.write_all(bytes);
        written.with_context(|| format!("cannot write the metadata to {path:?}"))?;
        save::put_in_place(session, writer, || {
            let (path, bytes) = (print::path(&path), size(bytes.len() as u64));
            Ok(session.report(&format!("{path}: {bytes} of metadata"))?)
        })
    }
}

fn bytes_of(image: &Image) -> Result<&[u8], ImagesFailure> {
    let footer = image.footer().filter(|footer| !footer.metadata.is_empty());
    footer
        .map(|footer| &footer.metadata[..])
        .ok_or_else(|| ImagesFailure::NoMetadata {
            path: image.path().to_owned(),
        })
}
