//! `ramsnap cat`: bytes of the RAM by address.

mod hexdump;

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::Chain;
use page_reader::SecretBuffer;

use crate::args::{Formats, FromDir, ImageFile, RawImages};
use crate::exit_status::ExitStatus;
use crate::failure::ImagesFailure;
use crate::numbers::{address, size, text_of};
use crate::session::Session;
use crate::{input, print, stream};
use hexdump::Hexdump;

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;

/// Print bytes of the RAM, by guest-physical address
///
/// The images are those of a chain, oldest first. The checksums are not compared: run `ramsnap
/// verify` first if that matters. A raw image records no regions: its RAM begins at address 0. A
/// line that is the same as the one before is printed as `*` once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap cat full.mem d1.mem --at 0x100000 --len 64\n  \
    ramsnap cat --chain snapshots d1.mem --at 0x100000000 --len 4KiB --bytes > page\n  \
    ramsnap cat raw:ram --at 4096")]
pub struct Cat {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// The guest-physical address of the first byte, hexadecimal after 0x
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    at: u64,
    /// The number of bytes
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = size)]
    len: u64,
    /// Print the bytes themselves, to a file or a pipe
    #[arg(long)]
    bytes: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Cat {
    /// Returns the files that are read.
    pub fn files(&self) -> Vec<PathBuf> {
        input::paths(&self.files)
    }

    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        if self.bytes {
            stream::check_stdout()?;
        }
        let chain = self.from.open(0, &self.files, |files| {
            input::chain(session, files, self.formats, &self.raw)
        })?;
        let offsets = self.offsets(&chain)?;
        let mut out = print::stdout().context("cannot write to stdout")?;
        let mut dump = Hexdump::new(self.at);
        let mut buffer = SecretBuffer::new();
        for start in offsets.clone().step_by(PIECE as usize) {
            let len = PIECE.min(offsets.end - start);
            let piece = buffer.sized(len as usize);
            chain.read(start, piece)?;
            let text;
            let bytes = match self.bytes {
                true => &piece[..],
                false => {
                    text = dump.lines(piece);
                    text.as_bytes()
                }
            };
            match out.write_all(bytes) {
                // As for `| head`.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                    return Ok(ExitStatus::Success);
                }
                written => written.context("cannot write to stdout")?,
            }
        }
        if !self.bytes {
            print::line(&dump.end())?;
        }
        chain.check_unchanged()?;
        Ok(ExitStatus::Success)
    }

    /// Returns the offsets in the RAM of the requested addresses.
    fn offsets(&self, chain: &Chain) -> Result<Range<u64>, ImagesFailure> {
        let all = [0..chain.ram_size()];
        let regions = input::regions(chain).filter(|regions| !regions.is_empty());
        let regions = regions.unwrap_or(&all);
        let end = self.at.saturating_add(self.len);
        offset_of(regions, self.at..end).ok_or_else(|| ImagesFailure::NotRamAddress {
            start: self.at,
            end,
            regions: text_of(regions),
        })
    }
}

/// Returns the offsets in the RAM of guest-physical `addresses`, which may span adjacent regions.
fn offset_of(regions: &[Range<u64>], addresses: Range<u64>) -> Option<Range<u64>> {
    let (mut offset, mut found) = (0, None);
    let mut next = addresses.start;
    for region in regions {
        if region.contains(&next) {
            found.get_or_insert(offset + (next - region.start));
            next = region.end;
        }
        offset += region.end - region.start;
        if addresses.end <= next {
            break;
        }
    }
    let start = found.filter(|_| addresses.end <= next)?;
    Some(start..start + (addresses.end - addresses.start))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::in_the_first(0x1000..0x1010, Some(0..0x10))]
    #[case::up_to_its_end(0x1ff0..0x2000, Some(0xff0..0x1000))]
    #[case::over_adjacent_ones(0x1ff0..0x2010, Some(0xff0..0x1010))]
    #[case::after_the_gap(0x8000..0x9000, Some(0x2000..0x3000))]
    #[case::into_the_gap(0x2ff0..0x3010, None)]
    #[case::over_the_gap(0x2ff0..0x8010, None)]
    #[case::below(0xff0..0x1010, None)]
    #[case::past_the_end(0x9000..0x9001, None)]
    fn addresses_are_offsets_within_regions(
        #[case] addresses: Range<u64>,
        #[case] offsets: Option<Range<u64>>,
    ) {
        let regions = [0x1000..0x2000, 0x2000..0x3000, 0x8000..0x9000];
        assert_eq!(offset_of(&regions, addresses), offsets);
    }
}
