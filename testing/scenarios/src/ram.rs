//! Guest memory whose every word shows which version of the RAM it is of, and where it belongs.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use page_reader::PageReader;

const WORD: u64 = 8;
const CHUNK: usize = 1 << 20;

/// RAM whose every word is of version `stamp`, made when it is read. A stamp from 1 on never makes
/// a word of zeros.
#[derive(Clone, Copy, Debug)]
pub struct Stamped {
    pub stamp: u32,
    pub size: u64,
}

impl Stamped {
    pub fn new(stamp: u32, size: u64) -> Self {
        Self { stamp, size }
    }

    /// The bytes of a range whose start is a multiple of 8.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("fits memory")];
        self.fill(range.start, &mut bytes);
        bytes
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) {
        let stamp = u64::from(self.stamp) << 32;
        let (words, rest) = buf.as_chunks_mut::<{ WORD as usize }>();
        let mut number = offset / WORD;
        for word in words {
            *word = (stamp | (number & u64::from(u32::MAX))).to_le_bytes();
            number += 1;
        }
        let last = (stamp | (number & u64::from(u32::MAX))).to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

impl PageReader for Stamped {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.fill(offset, buf);
        Ok(())
    }
}

/// What a file is, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All of it is of this version.
    Whole(u32),
    /// Not one version from its first byte to its last.
    Torn {
        at: u64,
    },
    WrongSize(u64),
    Missing,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(stamp) => write!(f, "version {stamp}, whole"),
            Self::Torn { at } => write!(f, "torn at byte {at}"),
            Self::WrongSize(size) => write!(f, "{size} bytes long"),
            Self::Missing => f.write_str("missing"),
        }
    }
}

/// Reads all of `path`.
pub fn content(path: &Path, size: u64) -> io::Result<Content> {
    match File::open(path) {
        Ok(file) => content_of(&file, size),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Content::Missing),
        Err(error) => Err(error),
    }
}

/// Reads all of an open file.
pub fn content_of(file: &File, size: u64) -> io::Result<Content> {
    let found = file.metadata()?.len();
    if found != size {
        return Ok(Content::WrongSize(found));
    }
    let mut first = [0; WORD as usize];
    file.read_exact_at(&mut first, 0)?;
    let stamp = (u64::from_le_bytes(first) >> 32) as u32;
    let differs = first_difference(file, 0..size, &Stamped::new(stamp, size))?;
    Ok(differs.map_or(Content::Whole(stamp), |at| Content::Torn { at }))
}

/// The first byte of `range` at which `file` is not what `ram` says.
pub fn first_difference(
    file: &File,
    range: Range<u64>,
    ram: &dyn PageReader,
) -> io::Result<Option<u64>> {
    let chunk = (range.end - range.start).min(CHUNK as u64) as usize;
    let (mut found, mut wanted) = (vec![0; chunk], vec![0; chunk]);
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(CHUNK as u64) as usize;
        file.read_exact_at(&mut found[..len], at)?;
        ram.read_at(at, &mut wanted[..len])?;
        if found[..len] != wanted[..len] {
            let byte = found[..len]
                .iter()
                .zip(&wanted[..len])
                .position(|(found, wanted)| found != wanted);
            return Ok(byte.map(|byte| at + byte as u64));
        }
        at += len as u64;
    }
    Ok(None)
}

/// Memory of zeros.
#[derive(Debug)]
pub struct Zeros;

impl PageReader for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}
