//! Sending a packed image to stdout, or to a compressed file.

use std::fs::File;

use anyhow::Context;
use memory_image::{Chain, Layout};

use crate::args::ReadExtras;
use crate::exit_status::ExitStatus;
use crate::print::{self, size};
use crate::session::Session;
use crate::verbs::convert::Convert;
use crate::{memory_reserve, save, stream};

impl Convert {
    /// Compresses the packed image in `file` to the output.
    pub(super) fn send(&self, session: &Session, file: File) -> anyhow::Result<()> {
        let (input, output) = (&self.input.path, &self.output.path);
        if self.sends() {
            return stream::to_stdout(session, file, input);
        }
        let len = file.metadata()?.len();
        let staged = save::stage_early(session, &self.output)?;
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
        let stage = writer.finish()?;
        let file = stage
            .file()
            .try_clone()
            .context("cannot send the packed image")?;
        stage.discard()?;
        dir.close()
            .context("cannot remove the directory that the stream was packed in")?;
        session.release()?;
        self.send(session, file)?;
        Ok(ExitStatus::Success)
    }
}
