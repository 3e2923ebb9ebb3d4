//! Zeros that images store.

use std::io;
use std::ops::Range;

use memory_image::Chain;
use page_reader::{PageReader, SecretBuffer, is_zeros};

use crate::session::Session;

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;
/// The unit in which zeros are detected, in bytes.
const BLOCK: u64 = 4096;

/// Returns the parts of `runs` that are not zeros, in blocks of 4 KiB.
pub fn without_zeros(
    session: &Session,
    chain: &Chain,
    runs: &[Range<u64>],
) -> anyhow::Result<Vec<Range<u64>>> {
    let mut found = Vec::<Range<u64>>::new();
    let mut buffer = SecretBuffer::new();
    let bar = session.bar("looking for zeros");
    bar.set_length(chain.ram_size());
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            session.check("nothing was written")?;
            let end = run.end.min((at / CHUNK + 1) * CHUNK);
            let bytes = buffer.sized((end - at) as usize);
            chain.read_at(at, bytes).map_err(unwrapped)?;
            for block in blocks(at, bytes) {
                if block.is_zero {
                    continue;
                }
                match found.last_mut() {
                    Some(last) if last.end == block.range.start => last.end = block.range.end,
                    _ => found.push(block.range),
                }
            }
            bar.set_position(end);
            at = end;
        }
    }
    Ok(found)
}

/// Returns the error that a chain wraps in an I/O error.
pub fn unwrapped(error: io::Error) -> anyhow::Error {
    match error.downcast::<memory_image::ReadImageError>() {
        Ok(error) => error.into(),
        Err(error) => error.into(),
    }
}

/// A part of a range of RAM that is in one block.
pub struct Block {
    pub range: Range<u64>,
    pub is_zero: bool,
}

/// Returns the blocks of `bytes`, which are at `offset` in the RAM.
pub fn blocks(offset: u64, bytes: &[u8]) -> impl Iterator<Item = Block> {
    let end = offset + bytes.len() as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / BLOCK + 1) * BLOCK);
        let block = bytes.get((start - offset) as usize..(at - offset) as usize)?;
        let is_zero = is_zeros(block);
        (start < end).then_some(Block {
            range: start..at,
            is_zero,
        })
    })
}
