//! Reads the log of the writes to a disk, and derives the contents of the disk after a power loss.
//! The log is that of QEMU's `blklogwrites`, in the format of Linux's dm-log-writes
//! (`Documentation/admin-guide/device-mapper/log-writes.rst`, `drivers/md/dm-log-writes.c`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::bail;
use random::Random;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// A command that the disk received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Write { offset: u64, bytes: Vec<u8> },
    Flush,
}

impl Entry {
    /// How many blocks it writes, at least one.
    pub fn blocks(&self) -> u64 {
        match self {
            Self::Write { bytes, .. } => (bytes.len() as u64).div_ceil(BLOCK).max(1),
            Self::Flush => 1,
        }
    }
}

/// What became of the writes that no flush had followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    pub flushed: usize,
    pub kept: usize,
    pub torn: usize,
    pub dropped: usize,
}

/// Of a write that no flush has followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Kept,
    /// Only so many blocks of it got there.
    Torn(u64),
    Dropped,
}

impl Fate {
    /// Chooses the fate of a write of so many blocks.
    pub fn random(random: &mut Random, blocks: u64) -> Self {
        match random.below(4) {
            3 => Self::Kept,
            2 => Self::Torn(random.below(blocks)),
            _ => Self::Dropped,
        }
    }
}

/// The size of a block that a disk writes atomically.
pub const BLOCK: u64 = 4096;

/// Writes the bytes that a disk with a volatile cache may have after `entries`: all writes before
/// the last flush, and the part of each later write that `fate` returns for its blocks.
pub fn apply(
    entries: &[Entry],
    fate: &mut dyn FnMut(u64) -> Fate,
    write: &dyn Fn(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Cut> {
    let last_flush = entries.iter().rposition(|entry| *entry == Entry::Flush);
    let mut cut = Cut::default();
    for (n, entry) in entries.iter().enumerate() {
        let Entry::Write { offset, bytes } = entry else {
            continue;
        };
        let part = if last_flush.is_some_and(|last| n < last) {
            cut.flushed += 1;
            bytes.len()
        } else {
            match fate(entry.blocks()) {
                Fate::Dropped | Fate::Torn(0) => {
                    cut.dropped += 1;
                    0
                }
                Fate::Torn(blocks) => {
                    cut.torn += 1;
                    (blocks * BLOCK) as usize
                }
                Fate::Kept => {
                    cut.kept += 1;
                    bytes.len()
                }
            }
        };
        write(*offset, &bytes[..part])?;
    }
    Ok(cut)
}

/// The entries of a log whose writer was killed: the last ones may be missing.
pub fn read(log: &File) -> anyhow::Result<Vec<Entry>> {
    let mut head = [0; 28];
    log.read_exact_at(&mut head, 0)?;
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(word)
    };
    if head == [0; 28] {
        // Not even its head was written: the disk was given nothing.
        return Ok(Vec::new());
    }
    if word(0) != MAGIC {
        bail!("not a log of writes");
    }
    let count = word(16);
    let sector = u64::from(u32::from_le_bytes([head[24], head[25], head[26], head[27]]));
    if !sector.is_power_of_two() {
        bail!("a log with sectors of {sector} bytes");
    }
    let size = log.metadata()?.len();
    let mut entries = Vec::new();
    let mut at = sector;
    while (entries.len() as u64) < count && at + sector <= size {
        let mut fields = [0; 32];
        log.read_exact_at(&mut fields, at)?;
        let field = |n: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&fields[n * 8..][..8]);
            u64::from_le_bytes(word)
        };
        let (offset, len, flags) = (field(0) * sector, field(1) * sector, field(2));
        at += sector;
        if flags & FLUSH != 0 {
            entries.push(Entry::Flush);
        } else if flags & DISCARD != 0 {
            // What is discarded may be kept: an empty write keeps the count.
            entries.push(Entry::Write {
                offset,
                bytes: Vec::new(),
            });
        } else if len == 0 || at + len > size {
            // Counted and never written: the writer was killed in between.
            break;
        } else {
            let mut bytes = vec![0; usize::try_from(len)?];
            log.read_exact_at(&mut bytes, at)?;
            at += len;
            entries.push(Entry::Write { offset, bytes });
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn log(entries: &[(u64, &[u8], u64)]) -> File {
        let file = tempfile::tempfile().expect("a file");
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 1;
        bytes[16] = entries.len() as u8;
        bytes[24..28].copy_from_slice(&512_u32.to_le_bytes());
        for (sector, data, flags) in entries {
            let mut head = vec![0; 512];
            head[..8].copy_from_slice(&sector.to_le_bytes());
            head[8..16].copy_from_slice(&(data.len() as u64 / 512).to_le_bytes());
            head[16..24].copy_from_slice(&flags.to_le_bytes());
            bytes.extend(head);
            bytes.extend(*data);
        }
        file.write_all_at(&bytes, 0).expect("written");
        file
    }

    #[test]
    fn what_was_flushed_stays_and_what_was_not_may_go() {
        let (a, b) = ([1; 1024], [2; 512]);
        let entries = read(&log(&[(4, &a, 0), (0, &[], FLUSH), (6, &b, 0)])).expect("a log");
        let done = RefCell::new(Vec::new());
        let write = |offset, bytes: &[u8]| {
            done.borrow_mut().push((offset, bytes.len()));
            Ok(())
        };
        let dropping = apply(&entries, &mut |_| Fate::Dropped, &write).expect("applied");
        assert_eq!((dropping.flushed, dropping.dropped), (1, 1));
        assert_eq!(done.take(), [(2048, 1024), (3072, 0)]);
        let keeping = apply(&entries, &mut |_| Fate::Kept, &write).expect("applied");
        assert_eq!((keeping.flushed, keeping.kept), (1, 1));
        assert_eq!(done.take(), [(2048, 1024), (3072, 512)]);
    }

    #[test]
    fn a_log_of_a_disk_that_was_given_nothing_is_empty() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("grown");
        assert_eq!(read(&file).expect("a log"), []);
    }

    #[test]
    fn an_entry_that_was_counted_and_never_written_ends_the_log() {
        let file = log(&[(4, &[1; 512], 0), (0, &[], 0), (9, &[3; 512], 0)]);
        assert_eq!(read(&file).expect("a log").len(), 1);
    }
}
