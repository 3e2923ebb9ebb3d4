//! The format of memory images: what makes one mean the same everywhere.
//!
//! A raw image is bytes at their guest offsets; which pages of a raw diff are there, and which of them are zeros, only the holes of its file
//! tell, and a copy may dig or fill those. A *sealed* image ends in a [`Footer`], which says it: each run of pages is *present* (its
//! bytes are in the file), *zero* (they are not, and read as zeros) or, in a diff, *clean* (not in this image). It names the image and its
//! parent, and has a checksum for each [chunk](CHUNK_SIZE) of RAM.
//!
//! Two placements have the same footer. *In place*, present pages are at their guest offsets, and the first `ram_size` bytes map as
//! before. *Packed*, they stand one after another behind a header, and the footer says where.
//!
//! No file is taken for an image because of bytes that a guest controls, and none that was cut off at a block's boundary is taken for anything:
//! see [below](#what-a-reader-recognises).
//!
//! # By task
//! **Write a footer** after the pages, computing checksums while they pass by:
//! ```
//! use std::fs::File;
//! use std::os::unix::fs::FileExt;
//!
//! use image_format::{Checksums, Footer, ImageId, Kind, Placement, Run, Version, packed_start};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("diff.mem");
//! let (ram_size, page_size) = (1 << 30, 4096);
//! let file = File::create_new(&path)?;
//! let page = [7; 4096];
//! let start = packed_start(page_size); // behind the header, which is written with the footer
//! file.write_all_at(&page, start)?;
//!
//! let mut checksums = Checksums::new(ram_size);
//! checksums.feed(8192, &page); // a guest offset, not the file's
//! let footer = Footer {
//!     version: Version::CURRENT,
//!     id: ImageId::random()?,
//!     kind: Kind::Diff { parent: None },
//!     placement: Placement::Packed,
//!     ram_size,
//!     page_size,
//!     regions: vec![0..ram_size],
//!     runs: vec![Run::present(8192..12288, start), Run::zeros(16384..20480)],
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
//! **Read one of version 1 that is as long as raw RAM**: [`Footer::read_as`], for callers that know what the file is.
//!
//! **Check a chunk**: [`Footer::chunks`] names every chunk that has bytes in the file, with the sum that they must have.
//!
//! # Limitations
//! The reader keeps runs and checksums in memory: 32 bytes a run, twice that while the list grows, and 32 bytes a MiB of present RAM. It takes no more of
//! them than the file proves to have, and refuses a footer of more than [`MAX_FOOTER`] bytes. [`Footer::write_with`] writes runs that are not in memory.

#![doc = include_str!("../FORMAT.md")]
#![forbid(unsafe_code)]

mod checksums;
mod error;
mod footer;
mod header;
mod id;
mod read;
mod write;

pub use checksums::{CHUNK_SIZE, Checksum, Checksums, ChunkSum};
pub use error::{FooterError, Invalid};
pub use footer::{
    Chunk, Footer, Kind, MAX_RAM_SIZE, Placement, RAW_UNIT, Run, Stored, Version, check_metadata,
    check_regions, packed_start,
};
pub use header::{HEADER_PAGE, Header};
pub use id::{ImageId, ParseIdError};
pub use read::MAX_FOOTER;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
