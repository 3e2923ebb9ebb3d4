//! Sending a packed image to stdout, or to a compressed file.

use std::fs::File;

use anyhow::Context;
use atomic_file::AtomicWriter;
use memory_image::{Chain, Layout};
use memory_writer::MemoryWriterOptions;

use crate::args::ReadExtras;
use crate::exit_status::ExitStatus;
use crate::print::{self, size};
use crate::session::Session;
use crate::verbs::convert::Convert;
use crate::{memory_reserve, save, stream};

impl Convert {
    /// Stages a file at the output, unless that is stdout. `options` has the seal of the image.
    pub(super) fn stage_compressed(
        &self,
        session: &Session,
        options: &MemoryWriterOptions,
    ) -> anyhow::Result<Option<AtomicWriter>> {
        if self.sends() {
            return Ok(None);
        }
        let staged = save::stage_early(session, &self.output)?;
        options.check_replaced(&staged)?;
        Ok(Some(staged))
    }

    /// Compresses the packed image in `file` to what is `staged` for the output, or to stdout.
    pub(super) fn send(
        &self,
        session: &Session,
        file: File,
        staged: Option<AtomicWriter>,
    ) -> anyhow::Result<()> {
        let (input, output) = (&self.input.path, &self.output.path);
        let Some(staged) = staged else {
            return stream::to_stdout(session, file, input);
        };
        let len = file.metadata()?.len();
        let sent = stream::to_file(session, file, input, staged.file());
        let compressed = sent.with_context(|| format!("cannot write {output:?}"))?;
        save::put_in_place(session, staged, || {
            let (path, len, compressed) = (print::path(output), size(len), size(compressed));
            let text = format!("{path}: packed image of {len}, compressed to {compressed}");
            Ok(session.report(&text)?)
        })
    }

    /// Packs the image in a file without a name, and sends it.
    pub(super) fn pack_and_send(
        &self,
        session: &Session,
        chain: &Chain,
        extras: ReadExtras,
        check: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitStatus> {
        let (size, page_size) = (chain.ram_size(), self.page_size_of(chain)?);
        memory_reserve::check_image(&self.output.path, size, page_size)?;
        let options = self.options(session, chain, Layout::Packed, extras)?;
        let staged = self.stage_compressed(session, &options)?;
        // Another user could create a file of a fixed name first.
        let dir = tempfile::Builder::new()
            .prefix("ramsnap-stream-")
            .tempdir_in(std::env::temp_dir())
            .context("cannot make a directory to pack the stream in")?;
        let dest = dir.path().join("image");
        let mut writer = options.open(dest, size, page_size)?;
        save::check_room_for(session, &writer, chain)?;
        check()?;
        save::write_chain(&mut writer, chain)?;
        let packed = writer.finish()?;
        let file = packed
            .file()
            .try_clone()
            .context("cannot send the packed image")?;
        packed.discard()?;
        dir.close()
            .context("cannot remove the directory that the stream was packed in")?;
        if staged.is_none() {
            session.release()?;
        }
        self.send(session, file, staged)?;
        Ok(ExitStatus::Success)
    }
}
