//! The footer that makes a memory image mean the same everywhere.
//!
//! A raw image is bytes at their guest offsets; which pages of a raw diff are there, and which of them are zeros, only the holes of its file
//! tell, and a copy may dig or fill those. A *sealed* image ends in a [`Footer`], which says it: each run of pages is *present* (its
//! bytes are in the file), *zero* (they are not, and read as zeros) or, in a diff, *clean* (not in this image). It names the image and its
//! parent, and has a checksum for each [chunk](CHUNK_SIZE) of RAM.
//!
//! Two placements have the same footer. *In place*, present pages are at their guest offsets, and the first `ram_size` bytes map as
//! before. *Packed*, they stand one after another, and the footer says where.
//!
//! # By task
//! **Write a footer** after the pages, computing checksums while they pass by:
//! ```
//! use std::fs::File;
//! use std::os::unix::fs::FileExt;
//!
//! use image_format::{Checksums, Footer, ImageId, Kind, Placement, Run};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("diff.mem");
//! let (ram_size, page_size) = (1 << 30, 4096);
//! let file = File::create_new(&path)?;
//! let page = [7; 4096];
//! file.write_all_at(&page, 0)?;
//!
//! let mut checksums = Checksums::new(ram_size);
//! checksums.feed(8192, &page); // a guest offset, not the file's
//! let footer = Footer {
//!     id: ImageId::random()?,
//!     kind: Kind::Diff { parent: None },
//!     placement: Placement::Packed,
//!     ram_size,
//!     page_size,
//!     regions: vec![0..ram_size],
//!     runs: vec![Run::present(8192..12288, 0), Run::zeros(16384..20480)],
//!     checksums: checksums.finish(),
//!     metadata: b"vCPU state, say".to_vec(),
//! };
//! footer.write(&file)?; // one more run of 4 KiB would not be checked by any sum: that is an error
//!
//! // And read it back, believing nothing before it is checked.
//! let read = Footer::read(&File::open(&path)?)?;
//! assert_eq!(read, footer);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **Look whether a file is sealed**: [`Footer::find`] gives `None` for one that isn't.
//!
//! **Check a chunk**: [`Footer::chunks`] names every chunk that has bytes in the file, with the sum that they must have.
//!
//! # Layout
//! All integers are little-endian; the footer stands after the last byte of the pages, which is a multiple of the page size.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `memsnap` and a zero byte |
//! | 4 | version: 1 |
//! | 1 | placement: 0 in place, 1 packed |
//! | 1 | kind: 0 full, 1 diff |
//! | 1 | 1 if a parent is named, else 0 |
//! | 1 | zero |
//! | 16 | id |
//! | 16 | the parent's id, or zeros |
//! | 8 | RAM size in bytes |
//! | 8 | page size in bytes, a power of two |
//! | 8 | number of regions |
//! | 8 | number of runs |
//! | 8 | number of checksums |
//! | 8 | length of the metadata in bytes |
//! | 16 a region | guest-physical address, size in bytes |
//! | 24 a run | guest offset, length in bytes, offset in the file (all bits set for zeros) |
//! | 32 a checksum | BLAKE3 of the chunk's present bytes in ascending order |
//! | n | metadata |
//! | then, the last 64: 32 | BLAKE3 of everything in the footer before |
//! | 8 | offset of the footer in the file |
//! | 8 | its length without these last 64 bytes |
//! | 4 | version: 1 |
//! | 4 | zero |
//! | 8 | `memsnap` and a byte of all bits set |
//!
//! Runs are ascending, of whole pages, and don't overlap; those that are present fill the file's bytes before the footer without gap or overlap
//! if it is packed, and are where they are in RAM if not. A full image has every page in a run. A checksum stands for each chunk that has a present
//! byte, ascending.
//!
//! # Limitations
//! The reader keeps runs and checksums in memory: 24 bytes a run, 32 bytes a MiB of RAM. It takes no more of them than the file proves to
//! have, and refuses a footer of more than [`MAX_FOOTER`] bytes.

#![forbid(unsafe_code)]

mod checksums;
mod error;
mod footer;
mod id;
mod read;
mod write;

pub use checksums::{CHUNK_SIZE, Checksum, Checksums, ChunkSum};
pub use error::{FooterError, Invalid};
pub use footer::{Chunk, Footer, Kind, Placement, Run, Stored};
pub use id::{ImageId, ParseIdError};
pub use read::MAX_FOOTER;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
